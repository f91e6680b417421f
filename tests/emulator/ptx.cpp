// The functions of include/cuda/common/ptx.cuh that are not inline. This file is compiled without
// instrumentation: each function reports the memory that it accesses on behalf of a kernel.
#include "cuda/common/ptx.cuh"

#include <bit>
#include <cstring>

#include "launch_state.h"

namespace diffmic::cuda {
namespace {

struct Operands {
  std::uint32_t a[4], b[2];
};

float Half(std::uint32_t word, int high) {
  return std::bit_cast<float>(high ? word & 0xFFFF0000u : word << 16);
}

}  // namespace

// Adds the products in the order of columns. The order of the hardware is not documented.
void MmaBf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  Operands own;
  std::memcpy(own.a, a, sizeof own.a);
  std::memcpy(own.b, b, sizeof own.b);
  emulator::Count(emulator::Event::kMatrix);
  const unsigned char* slots =
      emulator::Exchange(0xFFFFFFFFu, "mma.sync", &own, sizeof own, __builtin_return_address(0));
  Operands of[32];
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(&of[lane], slots + sizeof own * static_cast<std::size_t>(lane), sizeof own);
  }
  const int group = static_cast<int>(emulator::Lane()) / 4;
  const int pair = static_cast<int>(emulator::Lane()) % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + 8 * (i / 2);
    const int column = 2 * pair + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Operands& left = of[row % 8 * 4 + k % 8 / 2];
      const Operands& right = of[column * 4 + k % 8 / 2];
      d[i] += Half(left.a[row / 8 + 2 * (k / 8)], k % 2) * Half(right.b[k / 8], k % 2);
    }
  }
}

std::uint32_t AddRelease(std::uint32_t* counter, std::uint32_t value) {
  emulator::OnAtomic(counter, 4, __builtin_return_address(0));
  emulator::Atomic(counter, 4, emulator::Order::kRelease);
  emulator::EndInterval();
  const std::uint32_t before = *counter;
  *counter = before + value;
  return before;
}

std::uint32_t LoadAcquire(const std::uint32_t* counter) {
  auto* address = const_cast<std::uint32_t*>(counter);
  emulator::OnAtomic(address, 4, __builtin_return_address(0));
  emulator::Atomic(address, 4, emulator::Order::kAcquire);
  return *counter;
}

}  // namespace diffmic::cuda
