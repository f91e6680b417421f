// Shared by the programs of this folder. Each runs kernels of csrc/cpu at odd sizes and on several
// threads, in arrays without space after their last element, so that sanitizers find accesses
// beyond it. It exits with status 1 and a message if results depend on the number of threads.
//
//   PROGRAM [--quick] [--results FILE] [INSTRUCTION_SET ...]
//
// runs the named instruction sets, by default all of the processor, with --quick at the smallest
// sizes only. FILE receives all results that depend on the instruction set, as float64.
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

// The arguments of a program.
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

  // Fails unless an operation has kernels exactly for the available instruction sets.
  template <typename Find>
  void CheckNames(const std::string& operation, const Find& find) const {
    for (const std::string name : {"avx512_bf16", "avx512", "avx2", "portable", "sse", ""}) {
      if (find(name) != Available(name)) {
        Fail(operation + ": kernels of " + name + (find(name) ? " run" : " do not run") +
             ", the list of its instruction sets says otherwise");
      }
    }
  }

  // Prints that `program` has finished, and with which instruction sets.
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

// Exactly `count` numbers on the heap, so that a sanitizer finds an access to the next one.
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

// Fails unless the results of a call are finite and bitwise the same on any number of threads.
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
      Fail(what_ + ": " + std::to_string(threads) + " threads change the results");
    }
  }

 private:
  std::string what_;
  std::vector<T> first_;
};

#endif  // DIFFMIC_TESTS_NATIVE_SUPPORT_H_
