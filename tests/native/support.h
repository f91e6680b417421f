// Shared by the programs of this folder. Each runs kernels of csrc/cpu on odd sizes and with
// several threads, in arrays that end at their last element so that sanitizers catch overruns, and
// checks that results do not depend on the number of threads. On failure: a message, and exit
// status 1.
//
//   PROGRAM [--quick] [--results FILE] [INSTRUCTION_SET ...]
//
// runs the named instruction sets, or all that the processor has; --quick: the smallest sizes only.
// FILE receives every result that depends on the instruction set, as float64.
#ifndef DIFFMIC_TESTS_NATIVE_SUPPORT_H_
#define DIFFMIC_TESTS_NATIVE_SUPPORT_H_

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

[[noreturn]] inline void Fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

// The command line of a program.
class Request {
 public:
  Request(int count, char** arguments, const std::vector<std::string>& available) {
    for (int i = 1; i < count; ++i) {
      const std::string argument = arguments[i];
      if (argument == "--quick") {
        quick_ = true;
      } else if (argument == "--results" && i + 1 < count) {
        Results().open(arguments[++i], std::ios::binary);
        if (!Results()) Fail(std::string("cannot write ") + arguments[i]);
      } else {
        sets_.push_back(argument);
      }
    }
    available_ = available;
    if (sets_.empty()) sets_ = available;
    for (const std::string& set : sets_) {
      if (!Available(set)) Fail("no instruction set " + set + " on this processor");
    }
  }

  bool quick() const { return quick_; }
  const std::vector<std::string>& sets() const { return sets_; }

  // Checks that an operation has kernels for the available names and for no others.
  template <typename Find>
  void CheckNames(const std::string& operation, const Find& find) const {
    for (const std::string name : {"avx512_bf16", "avx512", "avx2", "portable", "sse", ""}) {
      if (find(name) != Available(name)) {
        Fail(operation + ": " + name + (find(name) ? " is" : " is not") +
             " available, its list of instruction sets disagrees");
      }
    }
  }

  // Reports that `program` finished, and the instruction sets that it ran.
  void Finish(const std::string& program) const {
    Results().flush();
    if (Results().is_open() && !Results()) Fail("the results could not be written");
    std::string names;
    for (const std::string& set : sets_) names += " " + set;
    std::printf("%s ran:%s\n", program.c_str(), names.c_str());
  }

  template <typename T>
  static void Record(const std::vector<T>& values) {
    if (!Results().is_open()) return;
    const std::vector<double> wide(values.begin(), values.end());
    Results().write(reinterpret_cast<const char*>(wide.data()),
                    static_cast<std::streamsize>(wide.size() * sizeof(double)));
  }

 private:
  static std::ofstream& Results() {
    static std::ofstream results;
    return results;
  }

  bool Available(const std::string& set) const {
    for (const std::string& name : available_) {
      if (name == set) return true;
    }
    return false;
  }

  bool quick_ = false;
  std::vector<std::string> available_, sets_;
};

// `count` random numbers in an allocation of exactly their size.
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

// Checks that results of one call with different numbers of threads are finite and bitwise equal.
template <typename T>
class Trace {
 public:
  explicit Trace(std::string what) : what_(std::move(what)) {}

  void Compare(const std::vector<T>& found, int threads) {
    for (const T value : found) {
      if (!std::isfinite(value)) Fail(what_ + ": a result is not finite");
    }
    if (first_.empty()) {
      first_ = found;
      Request::Record(found);
    }
    if (found.size() != first_.size() ||
        std::memcmp(found.data(), first_.data(), found.size() * sizeof(T)) != 0) {
      Fail(what_ + ": the result with " + std::to_string(threads) + " threads differs");
    }
  }

 private:
  std::string what_;
  std::vector<T> first_;
};

#endif  // DIFFMIC_TESTS_NATIVE_SUPPORT_H_
