// What the programs of this folder share. Each runs kernels of csrc/cpu on odd sizes and several
// threads, in arrays that end where their last element does, for the sanitizers to look at, and
// checks that the number of threads leaves no trace. Exit status 1 with a sentence where it does.
#ifndef DIFFMIC_TESTS_NATIVE_SUPPORT_H_
#define DIFFMIC_TESTS_NATIVE_SUPPORT_H_

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

[[noreturn]] inline void Fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

// Exactly `count` numbers on the heap: a sanitizer sees the first one beyond.
template <typename T>
class NumbersOf {
 public:
  NumbersOf(std::int64_t count, double low, double high)
      : count_(static_cast<std::size_t>(count)), values_(new T[count_]) {
    static std::mt19937 generator(7);
    std::uniform_real_distribution<double> draw(low, high);
    for (std::size_t i = 0; i < count_; ++i) values_[i] = static_cast<T>(draw(generator));
  }
  T* get() const { return values_.get(); }
  std::vector<T> copy() const { return {values_.get(), values_.get() + count_}; }

 private:
  std::size_t count_;
  std::unique_ptr<T[]> values_;
};

using Numbers = NumbersOf<float>;

// The results of one call on different numbers of threads must have the same bits, and be numbers.
template <typename T>
class Trace {
 public:
  explicit Trace(std::string what) : what_(std::move(what)) {}

  void Compare(const std::vector<T>& found, int threads) {
    for (const T value : found) {
      if (!std::isfinite(value)) Fail(what_ + ": a result is not finite");
    }
    if (first_.empty()) first_ = found;
    if (found.size() != first_.size() ||
        std::memcmp(found.data(), first_.data(), found.size() * sizeof(T)) != 0) {
      Fail(what_ + ": " + std::to_string(threads) + " threads leave a trace");
    }
  }

 private:
  std::string what_;
  std::vector<T> first_;
};

#endif  // DIFFMIC_TESTS_NATIVE_SUPPORT_H_
