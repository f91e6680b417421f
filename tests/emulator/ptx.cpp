// Twins of csrc/cuda/common/ptx.cuh that need more than a line. Not instrumented: what they touch
// on behalf of a kernel, they report themselves.
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

// Sums in the order of columns; hardware has another.
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

void LoadMatrices(std::uint32_t (&r)[4], const void* shared) {
  const void* place = __builtin_return_address(0);
  emulator::OnAccess(const_cast<void*>(shared), 16, false, place);
  std::uint32_t row[4];
  std::memcpy(row, shared, sizeof row);
  const unsigned char* slots =
      emulator::Exchange(0xFFFFFFFFu, "ldmatrix.sync", row, sizeof row, place);
  const unsigned lane = emulator::Lane();
  for (unsigned i = 0; i < 4; ++i) {
    std::memcpy(&r[i], slots + sizeof row * (8 * i + lane / 4) + 4 * (lane % 4), 4);
  }
}

std::uint32_t AddRelease(std::uint32_t* counter, std::uint32_t value) {
  emulator::OnAtomic(counter, 4, __builtin_return_address(0));
  emulator::Atomic(counter, 4, emulator::Order::kRelease);
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
