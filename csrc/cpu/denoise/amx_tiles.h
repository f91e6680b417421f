// The tile registers of AMX and their instructions. Inline assembly: GCC's intrinsics require
// literal tile numbers and do not accept template arguments, and GCC 12's _tile_loadconfig declares
// 8 of the 64 bytes that it reads.
//
// A tile holds up to 16 rows of 64 bytes. EmulatedTiles (amx_emulated_tiles.h) has the same
// members.
#ifndef DIFFMIC_CPU_DENOISE_AMX_TILES_H_
#define DIFFMIC_CPU_DENOISE_AMX_TILES_H_

#include <cstdint>

#include "cpu/common/simd.h"

// In the namespace of the instruction set: the linker never merges functions of different ones.
namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

// Operand of LDTILECFG for palette 1.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// The tiles of the calling thread, configured for the lifetime of the object. Unless they are
// released, every context switch saves 8 KB of tile data.
struct HardwareTiles {
  explicit HardwareTiles(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  ~HardwareTiles() { asm volatile("tilerelease"); }
  HardwareTiles(const HardwareTiles&) = delete;
  HardwareTiles& operator=(const HardwareTiles&) = delete;

  template <int kT>
  void Zero() {
    asm volatile("tilezero %%tmm%c0" : : "n"(kT));
  }
  template <int kT>
  void Load(const void* base, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(base), "r"(stride), "n"(kT) : "memory");
  }
  template <int kT>
  void Store(void* base, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(base), "r"(stride), "n"(kT) : "memory");
  }
  // C += A . B for pairs of bfloat16, and for int8 in fours.
  template <int kC, int kA, int kB>
  void DotBFloat16() {
    asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "n"(kB), "n"(kA), "n"(kC));
  }
  template <int kC, int kA, int kB>
  void DotInt8() {
    asm volatile("tdpbssd %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "n"(kB), "n"(kA), "n"(kC));
  }
};

}  // namespace
}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_DENOISE_AMX_TILES_H_
