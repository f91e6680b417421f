// The tile instructions of amx_tiles.h emulated with AVX2 and FMA, bitwise identical to the
// hardware. Its behaviour was measured on a Granite Rapids class Xeon, and agrees with the
// pseudocode of Intel's instruction set reference:
//
//   TDPBF16PS, one element of C: the even elements of k are summed in one chain of fused
//     multiply-adds, the odd ones in a second, both from +0 and in ascending order of k; then
//     C += (even chain + odd chain). Each operation rounds to nearest even, regardless of MXCSR.
//     Denormals in A, B and C are zero of their sign, and a result that is denormal (as rounded
//     with an unbounded exponent) becomes zero of its sign. An operation with a NaN returns the
//     first NaN of (a, b, c), quiet; an invalid one the default NaN.
//   TDPBSSD: C + the sum of a b, modulo 2^32.
//   Rows and bytes beyond a tile's configured size are 0 after TILELOADD, TDP* and TILEZERO.
//
// AVX follows the same rules with DAZ and FTZ set in MXCSR, except for the choice among several
// NaNs: elements whose result is NaN are recomputed one by one.
#ifndef DIFFMIC_CPU_DENOISE_AMX_EMULATED_TILES_H_
#define DIFFMIC_CPU_DENOISE_AMX_EMULATED_TILES_H_

#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/denoise/amx_tiles.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

class EmulatedTiles {
 public:
  explicit EmulatedTiles(const TileConfig& config) : config_(config) {}

  template <int kT>
  void Zero() {
    std::memset(&tiles_[kT], 0, sizeof(Tile));
  }
  template <int kT>
  void Load(const void* base, std::int64_t stride) {
    Zero<kT>();
    for (int r = 0; r < config_.rows[kT]; ++r) {
      std::memcpy(tiles_[kT].row[r], static_cast<const char*>(base) + r * stride,
                  config_.row_bytes[kT]);
    }
  }
  template <int kT>
  void Store(void* base, std::int64_t stride) const {
    for (int r = 0; r < config_.rows[kT]; ++r) {
      std::memcpy(static_cast<char*>(base) + r * stride, tiles_[kT].row[r], config_.row_bytes[kT]);
    }
  }
  template <int kC, int kA, int kB>
  void DotBFloat16() {
    const unsigned mxcsr = _mm_getcsr();
    _mm_setcsr(kTileMxcsr);
    AddBFloat16(config_.rows[kC], config_.row_bytes[kA] / 4, tiles_[kA], tiles_[kB], &tiles_[kC]);
    _mm_setcsr(mxcsr);
    ClearBeyond(kC);
  }
  template <int kC, int kA, int kB>
  void DotInt8() {
    AddInt8(config_.rows[kC], config_.row_bytes[kA] / 4, tiles_[kA], tiles_[kB], &tiles_[kC]);
    ClearBeyond(kC);
  }

 private:
  struct alignas(64) Tile {
    std::uint8_t row[16][64];
  };
  // Exceptions masked, round to nearest even, DAZ and FTZ.
  static constexpr unsigned kTileMxcsr = 0x9FC0;

  template <typename T>
  static T Get(const Tile& tile, int row, int column) {
    T value;
    std::memcpy(&value, tile.row[row] + 4 * column, sizeof value);
    return value;
  }

  void ClearBeyond(int t) {
    for (int r = 0; r < 16; ++r) {
      const int kept = r < config_.rows[t] ? config_.row_bytes[t] : 0;
      std::memset(tiles_[t].row[r] + kept, 0, static_cast<std::size_t>(64 - kept));
    }
  }

  // Not inlined: no arithmetic may move out of the region with the changed MXCSR.
  [[gnu::noinline]] static void AddBFloat16(int rows, int groups, const Tile& a, const Tile& b,
                                            Tile* c) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    for (int m = 0; m < rows; ++m) {
      __m256 even[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
      __m256 odd[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
      for (int k = 0; k < groups; ++k) {
        const auto pair = Get<std::uint32_t>(a, m, k);
        const __m256 a_even = _mm256_set1_ps(std::bit_cast<float>(pair << 16));
        const __m256 a_odd = _mm256_set1_ps(std::bit_cast<float>(pair & 0xFFFF0000u));
        for (int half = 0; half < 2; ++half) {
          const __m256i w =
              _mm256_load_si256(reinterpret_cast<const __m256i*>(b.row[k] + 32 * half));
          even[half] =
              _mm256_fmadd_ps(a_even, _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), even[half]);
          odd[half] =
              _mm256_fmadd_ps(a_odd, _mm256_castsi256_ps(_mm256_and_si256(w, high)), odd[half]);
        }
      }
      for (int half = 0; half < 2; ++half) {
        auto* to = reinterpret_cast<float*>(c->row[m] + 32 * half);
        const __m256 sum = _mm256_add_ps(_mm256_load_ps(to), _mm256_add_ps(even[half], odd[half]));
        const int nans = _mm256_movemask_ps(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
        float lanes[8];
        _mm256_storeu_ps(lanes, sum);
        for (int i = 0; i < 8; ++i) {
          if (nans >> i & 1)
            lanes[i] = Element(groups, a, b, m, 8 * half + i, Get<float>(*c, m, 8 * half + i));
        }
        std::memcpy(to, lanes, sizeof lanes);
      }
    }
  }

  static bool IsNan(float x) {
    return (std::bit_cast<std::uint32_t>(x) & 0x7FFFFFFFu) > 0x7F800000u;
  }
  // The first NaN of a, b and c, quiet; the default NaN if the result is invalid.
  static float NanOr(float a, float b, float c, float result) {
    for (const float x : {a, b, c}) {
      if (IsNan(x)) return std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) | 0x00400000u);
    }
    return IsNan(result) ? std::bit_cast<float>(0xFFC00000u) : result;
  }
  static float Fma(float a, float b, float c) {
    const __m128 r = _mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c));
    return NanOr(a, b, c, _mm_cvtss_f32(r));
  }
  static float Add(float a, float b) {
    return NanOr(a, b, 0.0f, _mm_cvtss_f32(_mm_add_ss(_mm_set_ss(a), _mm_set_ss(b))));
  }
  static float Element(int groups, const Tile& a, const Tile& b, int m, int n, float sum) {
    float even = 0.0f, odd = 0.0f;
    for (int k = 0; k < groups; ++k) {
      const auto x = Get<std::uint32_t>(a, m, k), w = Get<std::uint32_t>(b, k, n);
      even = Fma(std::bit_cast<float>(x << 16), std::bit_cast<float>(w << 16), even);
      odd = Fma(std::bit_cast<float>(x & 0xFFFF0000u), std::bit_cast<float>(w & 0xFFFF0000u), odd);
    }
    return Add(sum, Add(even, odd));
  }

  static void AddInt8(int rows, int groups, const Tile& a, const Tile& b, Tile* c) {
    for (int m = 0; m < rows; ++m) {
      for (int half = 0; half < 2; ++half) {
        auto* to = reinterpret_cast<__m256i*>(c->row[m] + 32 * half);
        __m256i sum = _mm256_load_si256(to);
        for (int k = 0; k < groups; ++k) {
          // Widened to 16 bits, so that the products of pairs and their sums are exact.
          const std::int8_t* four = reinterpret_cast<const std::int8_t*>(a.row[m] + 4 * k);
          const auto pair = [&](int i) {
            const auto low = static_cast<std::uint16_t>(std::int16_t{four[i]});
            const auto next = static_cast<std::uint16_t>(std::int16_t{four[i + 1]});
            return _mm256_set1_epi32(static_cast<std::int32_t>(low | std::uint32_t{next} << 16));
          };
          const __m256i w =
              _mm256_load_si256(reinterpret_cast<const __m256i*>(b.row[k] + 32 * half));
          // Bytes 0 and 1 of each group as 16 bits, then bytes 2 and 3.
          const __m256i low = Widen(w), next = Widen(_mm256_srli_epi32(w, 16));
          sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pair(0), low));
          sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pair(2), next));
        }
        _mm256_store_si256(to, sum);
      }
    }
  }
  // The two lower bytes of every 32 bits, sign-extended to 16 bits each.
  static __m256i Widen(__m256i w) {
    const __m256i first = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8);
    const __m256i second = _mm256_slli_epi32(_mm256_srai_epi16(w, 8), 16);
    return _mm256_blend_epi16(first, second, 0xAA);
  }

  TileConfig config_;
  Tile tiles_[8] = {};
};

}  // namespace
}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_DENOISE_AMX_EMULATED_TILES_H_
