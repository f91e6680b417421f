// Replaces csrc/cuda/common/loads.cuh, which documents each function.
#ifndef DIFFMIC_EMULATOR_CUDA_LOADS_H_
#define DIFFMIC_EMULATOR_CUDA_LOADS_H_

#include <cuda_runtime.h>

#include "emulator.h"

namespace diffmic::cuda {

template <typename T>
class InFlight {
 public:
  EMULATED InFlight() = default;
  EMULATED InFlight(const T& value) : value_(value) {}
  // A copy reads the register, and so waits.
  EMULATED InFlight(const InFlight& other) : value_(other) {}
  EMULATED InFlight(InFlight&& other) = default;
  EMULATED InFlight& operator=(const InFlight& other) {
    value_ = other;
    arrival_ = {};
    return *this;
  }
  EMULATED InFlight& operator=(InFlight&& other) = default;
  EMULATED InFlight(const T& value, const emulator::Rounds& arrival)
      : value_(value), arrival_(arrival) {}
  EMULATED operator T() const {
    emulator::Await(arrival_);
    return value_;
  }

 private:
  T value_{};
  emulator::Rounds arrival_;
};

template <typename T>
EMULATED InFlight<T> LoadAhead(const T* address) {
  emulator::BeginAhead();
  const T value = *address;
  return InFlight<T>(value, emulator::EndAhead());
}
template <typename T>
EMULATED InFlight<T> LoadAheadL2(const T* address) {
  return LoadAhead(address);
}
EMULATED void PrefetchL2(const void* address) { emulator::Prefetch(address); }

}  // namespace diffmic::cuda

#endif  // DIFFMIC_EMULATOR_CUDA_LOADS_H_
