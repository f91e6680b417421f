// The emulated tiles of AMX against scalar definitions of the instructions, and the AMX GEMM of
// `denoise` against sums in the order that denoise_amx.inc.h documents. Needs AVX2.
//
// `amx --hardware` compares the emulation with the processor's tiles bit for bit.
#define DIFFMIC_SIMD_AVX2
#define DIFFMIC_SIMD_AMX
#define DIFFMIC_SIMD_AMX_EMULATED
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/common/cpu_capabilities.h"
#include "cpu/denoise/denoise_kernels.inc.h"

namespace diffmic::cpu::amx_emulated {
namespace {

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "amx: %s\n", what.c_str());
  std::exit(1);
}

std::uint32_t BitsOf(float x) { return std::bit_cast<std::uint32_t>(x); }
float Widened(std::uint16_t x) { return std::bit_cast<float>(std::uint32_t{x} << 16); }
bool IsNan(float x) { return (BitsOf(x) & 0x7FFFFFFFu) > 0x7F800000u; }
float Quiet(float x) { return std::bit_cast<float>(BitsOf(x) | 0x00400000u); }
float DefaultNan() { return std::bit_cast<float>(0xFFC00000u); }
// Denormals are zero of their sign.
float Flush(float x) {
  return (BitsOf(x) & 0x7F800000u) == 0 ? std::bit_cast<float>(BitsOf(x) & 0x80000000u) : x;
}

// a b + c, rounded as by TDPBF16PS.
float ScalarFma(float a, float b, float c) {
  a = Flush(a), b = Flush(b), c = Flush(c);
  for (const float x : {a, b, c}) {
    if (IsNan(x)) return Quiet(x);
  }
  const float r = std::fma(a, b, c);
  if (IsNan(r)) return DefaultNan();
  if (std::abs(r) > 0x1p-126f || r == 0.0f) return r;
  // Denormal or close to it: rounded with an unbounded exponent. No operand can be large here.
  const float scaled = std::fma(a * 0x1p64f, b, c * 0x1p64f);
  return std::abs(scaled) < 0x1p-62f ? std::copysign(0.0f, r) : r;
}
float ScalarAdd(float a, float b) {
  a = Flush(a), b = Flush(b);
  for (const float x : {a, b}) {
    if (IsNan(x)) return Quiet(x);
  }
  const float r = a + b;
  return IsNan(r) ? DefaultNan() : Flush(r);
}
// The sum over `pairs` pairs of bfloat16. Pairs of w are `w_stride` numbers apart.
float ScalarDot(const std::uint16_t* a, const std::uint16_t* w, std::int64_t w_stride, int pairs,
                float sum) {
  float even = 0.0f, odd = 0.0f;
  for (int k = 0; k < pairs; ++k) {
    even = ScalarFma(Widened(a[2 * k]), Widened(w[k * w_stride]), even);
    odd = ScalarFma(Widened(a[2 * k + 1]), Widened(w[k * w_stride + 1]), odd);
  }
  return ScalarAdd(sum, ScalarAdd(even, odd));
}

std::mt19937_64 generator(11);

// Any bits; of similar exponents; with products near 2^-126; or with special values.
std::uint16_t RandomBFloat16(int kind) {
  const auto bits = static_cast<std::uint16_t>(generator());
  const auto sign_and_fraction = static_cast<std::uint16_t>(bits & 0x807Fu);
  constexpr std::uint16_t kSpecial[] = {0x0000, 0x8000, 0x7F80, 0xFF80,
                                        0x7FC1, 0xFF81, 0x0001, 0x807F};
  switch (kind) {
    case 0:
      return bits;
    case 1:
      return static_cast<std::uint16_t>(sign_and_fraction | (120 + bits % 16) << 7);
    case 2:  // products about 2^-126
      return static_cast<std::uint16_t>(sign_and_fraction | (62 + bits % 4) << 7);
    default:
      return generator() % 8 == 0 ? kSpecial[generator() % 8] : RandomBFloat16(1);
  }
}
float RandomSum(int kind) {
  const auto bits = static_cast<std::uint32_t>(generator());
  if (kind == 0) return std::bit_cast<float>(bits);
  const std::uint32_t exponent = kind == 2 ? bits % 3 : 118 + bits % 16;
  return std::bit_cast<float>((bits & 0x807FFFFFu) | exponent << 23);
}

TileConfig TileConfigOf(int rows, int groups) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = static_cast<std::uint16_t>(t == 1 ? 4 * groups : 64);
    config.rows[t] = static_cast<std::uint8_t>(t == 2 ? groups : rows);
  }
  return config;
}

template <typename Tiles>
void Run(bool bytes, int rows, int groups, const void* a, const void* b, void* c) {
  Tiles tiles(TileConfigOf(rows, groups));
  tiles.template Load<0>(c, 64);
  tiles.template Load<1>(a, 64);
  tiles.template Load<2>(b, 64);
  bytes ? tiles.template DotInt8<0, 1, 2>() : tiles.template DotBFloat16<0, 1, 2>();
  tiles.template Store<0>(c, 64);
}

void CheckInstructions(bool hardware) {
  alignas(64) std::uint16_t a[16][32], b[16][32];
  alignas(64) std::uint8_t a8[16][64], b8[16][64];
  alignas(64) float before[16][16], c[16][16];
  alignas(64) std::int32_t before8[16][16], c8[16][16];
  for (int round = 0; round < 2000; ++round) {
    const int kind = round % 4;
    const int rows = 1 + static_cast<int>(generator() % 16);
    const int groups = 1 + static_cast<int>(generator() % 16);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 32; ++j) a[i][j] = RandomBFloat16(kind), b[i][j] = RandomBFloat16(kind);
      for (int j = 0; j < 16; ++j) before[i][j] = RandomSum(kind);
      for (int j = 0; j < 16; ++j) before8[i][j] = static_cast<std::int32_t>(generator());
      for (int j = 0; j < 64; ++j) a8[i][j] = static_cast<std::uint8_t>(generator());
      for (int j = 0; j < 64; ++j) b8[i][j] = static_cast<std::uint8_t>(generator());
    }
    std::memcpy(c, before, sizeof c);
    std::memcpy(c8, before8, sizeof c8);
    if (hardware) {
      Run<HardwareTiles>(false, rows, groups, a, b, c);
      Run<HardwareTiles>(true, rows, groups, a8, b8, c8);
    } else {
      Run<EmulatedTiles>(false, rows, groups, a, b, c);
      Run<EmulatedTiles>(true, rows, groups, a8, b8, c8);
    }
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        float sum = before[m][n];
        std::uint32_t whole = static_cast<std::uint32_t>(before8[m][n]);
        if (m < rows) {
          sum = ScalarDot(a[m], b[0] + 2 * n, 32, groups, sum);
          for (int k = 0; k < 4 * groups; ++k) {
            whole += static_cast<std::uint32_t>(static_cast<std::int8_t>(a8[m][k]) *
                                                static_cast<std::int8_t>(b8[k / 4][4 * n + k % 4]));
          }
        }
        if (BitsOf(c[m][n]) != BitsOf(sum))
          Fail("TDPBF16PS differs, numbers of kind " + std::to_string(kind));
        if (static_cast<std::uint32_t>(c8[m][n]) != whole) Fail("TDPBSSD differs");
      }
    }
  }
}

// A GEMM: its sums, bitwise, in the documented order.
template <typename P>
void CheckGemm(std::int64_t rows, std::int64_t features, std::int64_t chunks) {
  using Number = typename P::Activation;
  constexpr bool kBytes = P::kQuantised;
  const std::int64_t channels = chunks * kChunk - 5;
  const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };
  std::vector<float> w(at(channels * features));
  std::normal_distribution<float> normal;
  for (float& x : w) x = normal(generator);
  std::vector<Number> x(at(rows * features)), packed_w(at(channels * features));
  for (Number& number : x) {
    number =
        static_cast<Number>(kBytes ? static_cast<int>(generator() % 255) - 127 : RandomBFloat16(1));
  }
  const std::int64_t chunk_bytes = ChunkBytes<P>(features);
  std::vector<std::byte> weights(at(chunks * chunk_bytes));
  std::vector<float> channel_scale(at(chunks * kChunk));
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const auto count = static_cast<int>(std::min(kChunk, channels - chunk * kChunk));
    PackChunk<P>(w.data() + chunk * kChunk * features, features, count, features,
                 weights.data() + chunk * chunk_bytes, channel_scale.data() + chunk * kChunk);
    for (std::int64_t n = chunk * kChunk; n < chunk * kChunk + count; ++n) {
      float inverse = 0.0f;
      if (kBytes) QuantisationScale(w.data() + n * features, features, &inverse);
      Convert(w.data() + n * features, features, inverse, packed_w.data() + n * features);
    }
  }
  const auto tiles = RowTiles::Of<P>(rows);
  DenoiserView model{};
  model.features = features;
  // Padding rows, and memory past the end of a row, may hold anything.
  std::vector<std::byte> in(at(tiles.count * tiles.size * RowBytes<P>(features)), std::byte{0xFF});
  for (Place place; place.row < rows; place.Next(tiles)) {
    const AmxRow<P> row(model, tiles, place, in.data());
    for (std::int64_t k = 0; k < features; k += kLanes) {
      row.Set(k, x.data() + place.row * features + k,
              static_cast<int>(std::min<std::int64_t>(kLanes, features - k)));
    }
  }
  const AmxSums sums_at(tiles, chunks);
  constexpr auto kSentinel = static_cast<typename P::Total>(12345);
  std::vector<typename P::Total> sums(at(sums_at.size() + 16), kSentinel);
  Gemm<P>(weights.data(), chunks, features, tiles, in.data(), 0, sums.data());
  for (std::int64_t i = sums_at.size(); i < sums_at.size() + 16; ++i) {
    if (sums[at(i)] != kSentinel) Fail("the GEMM wrote past its sums");
  }
  for (Place place; place.row < rows; place.Next(tiles)) {
    for (std::int64_t n = 0; n < channels; n += 1 + static_cast<std::int64_t>(generator() % 7)) {
      const Number* a = x.data() + place.row * features;
      const Number* b = packed_w.data() + n * features;
      const auto found = sums[at(sums_at(n / kChunk, place, n % kChunk))];
      typename P::Total expected{};
      if constexpr (kBytes) {
        for (std::int64_t k = 0; k < features; ++k) expected += a[k] * b[k];
      } else {
        for (std::int64_t k = 0; k < features; k += 32) {
          std::uint16_t pairs[2][32] = {};
          const std::int64_t count = std::min<std::int64_t>(32, features - k);
          std::copy_n(a + k, count, pairs[0]);
          std::copy_n(b + k, count, pairs[1]);
          expected = ScalarDot(pairs[0], pairs[1], 2, 16, expected);
        }
      }
      if (std::memcmp(&found, &expected, sizeof found) != 0) {
        Fail("the GEMM of " + std::to_string(rows) + " rows, " + std::to_string(features) +
             " features and " + std::to_string(chunks) + " chunks differs");
      }
    }
  }
}

void CheckObstacles() {
  const auto says = [](const AmxFacts& facts, const std::string& part) {
    const std::string obstacle = AmxObstacle(facts);
    return part.empty() ? obstacle.empty() : obstacle.find(part) != std::string::npos;
  };
  if (!says({}, "needs Linux") ||
      !says({true, true, false, false, 0}, "the processor has no AMX") ||
      !says({false, true, true, true, 0}, "assembler") ||
      !says({true, true, true, false, 0}, "does not enable AMX state") ||
      !says({true, true, true, true, EPERM}, "refused permission for AMX (arch_prctl: Operation") ||
      !says({true, true, true, true, ENOSPC}, "alternate signal stack is too small") ||
      !says({true, true, true, true, 0}, "")) {
    Fail("an obstacle is not reported");
  }
}

}  // namespace
}  // namespace diffmic::cpu::amx_emulated

int main(int argc, char** argv) {
  using namespace diffmic::cpu;
  using namespace diffmic::cpu::amx_emulated;
  const bool hardware = argc > 1 && std::string(argv[1]) == "--hardware";
  if (hardware && !WhyNoAmx().empty()) Fail(WhyNoAmx());
  CheckObstacles();
  CheckInstructions(hardware);
  for (const std::int64_t rows :
       {1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65, 81, 130, 241, 256}) {
    for (const std::int64_t features : {1, 31, 32, 33, 70, 300, 515}) {
      CheckGemm<AmxBFloat16>(rows, features, 1 + static_cast<std::int64_t>(generator() % 3));
      CheckGemm<AmxInt8>(rows, features, 1 + static_cast<std::int64_t>(generator() % 3));
    }
  }
  CheckGemm<AmxBFloat16>(70, 1030, 17);
  CheckGemm<AmxInt8>(70, 1030, 17);
  std::puts(hardware ? "amx ran: amx" : "amx ran: amx_emulated");
}
