// The AVX-512 operations of simd.h, and the functions there that use them, on random bit patterns,
// denormals, infinities and NaN included. Prints one line per operation, its name and a digest of
// its results; compiled for AVX-512 and, with avx512_on_avx2.h, for AVX2, the lines are the same.
#define DIFFMIC_SIMD_AVX512
#define DIFFMIC_SIMD_AVX512_BF16
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>

#include "cpu/common/simd.h"

namespace {

using diffmic::cpu::avx512_bf16::Ints;
using diffmic::cpu::avx512_bf16::kLanes;
using diffmic::cpu::avx512_bf16::Vec;
namespace simd = diffmic::cpu::avx512_bf16;

constexpr int kRounds = 100'000;

// Words of 32 bits.
class Random {
 public:
  // float32: zero, denormal, infinite, NaN, tiny, random bits, or near 1.
  std::uint32_t Float() {
    const auto bits = static_cast<std::uint32_t>(generator_());
    switch (generator_() % 12) {
      case 0:
        return bits & 0x80000000u;
      case 1:
        return bits & 0x807FFFFFu;
      case 2:
        return (bits & 0x80000000u) | 0x7F800000u;
      case 3:
        return bits | 0x7F800000u;
      case 4:
      case 5:
        return bits & 0x81FFFFFFu;
      case 6:
      case 7:
      case 8:
        return bits;
      default:
        return (bits & 0x80FFFFFFu) | 0x3F000000u;
    }
  }
  std::uint32_t BFloat16Pair() {
    const std::uint32_t even = Float() >> 16;
    return even | (Float() & 0xFFFF0000u);
  }
  std::uint32_t Any() { return static_cast<std::uint32_t>(generator_()); }
  // float32 in [low, high].
  std::uint32_t Between(double low, double high) {
    const double share = static_cast<double>(generator_() >> 11) * 0x1p-53;
    return std::bit_cast<std::uint32_t>(static_cast<float>(low + share * (high - low)));
  }
  std::uint32_t Whole(std::int32_t low, std::int32_t high) {
    const auto count = static_cast<std::uint64_t>(high - low + 1);
    const auto value = low + static_cast<std::int32_t>(generator_() % count);
    return std::bit_cast<std::uint32_t>(static_cast<float>(value));
  }

 private:
  std::mt19937_64 generator_{7};
};

struct Words {
  alignas(64) std::uint32_t at[kLanes] = {};

  Vec vec() const { return simd::Load(reinterpret_cast<const float*>(at)); }
  Ints ints() const {
    Ints a;
    std::memcpy(&a, at, sizeof at);
    return a;
  }
  static Words Of(Vec a) {
    Words words;
    simd::Store(reinterpret_cast<float*>(words.at), a);
    return words;
  }
  static Words Of(Ints a) {
    Words words;
    std::memcpy(words.at, &a, sizeof words.at);
    return words;
  }
};

// An operation of up to three arguments. Which NaN an arithmetic operation propagates depends on
// the order of its operands, which the compiler chooses: `any_nan` treats all NaNs alike.
template <typename Draw, typename Operation>
[[gnu::noinline]] void Check(const char* name, bool any_nan, const Draw& draw,
                             const Operation& operation) {
  Random random;
  std::uint64_t digest = 0xCBF29CE484222325u;
  for (int round = 0; round < kRounds; ++round) {
    Words arguments[3];
    for (Words& argument : arguments) {
      for (std::uint32_t& word : argument.at) word = draw(random);
    }
    const Words result = operation(arguments[0], arguments[1], arguments[2]);
    for (std::uint32_t word : result.at) {
      if (any_nan && (word & 0x7FFFFFFFu) > 0x7F800000u) word = 0x7FC00000u;
      digest = (digest ^ word) * 0x100000001B3u;
    }
  }
  std::printf("%s %016llx\n", name, static_cast<unsigned long long>(digest));
}

// Sums near 2^-126 of a normal number and a product.
[[gnu::noinline]] void CheckTinyDots() {
  std::uint64_t digest = 0xCBF29CE484222325u;
  std::mt19937_64 generator(11);
  const auto draw = [&](std::uint32_t count) {
    return static_cast<std::uint32_t>(generator() % count);
  };
  for (int round = 0; round < kRounds; ++round) {
    Words sum, a, b;
    for (int i = 0; i < kLanes; ++i) {
      const std::uint32_t exponent = 40 + draw(60);
      const std::uint32_t other = 105 - exponent - draw(6);
      sum.at[i] = 0x00800000u + draw(64);
      sum.at[i] |= draw(2) << 31;
      a.at[i] = exponent << 23;
      b.at[i] = (draw(2) << 8 | other) << 23;
      if (draw(2) != 0) a.at[i] |= draw(128) << 16;
      if (draw(2) != 0) b.at[i] |= draw(128) << 16;
    }
    const Words result =
        Words::Of(Vec{_mm512_dpbf16_ps(sum.vec().v, (__m512bh)a.ints().v, (__m512bh)b.ints().v)});
    for (const std::uint32_t word : result.at) digest = (digest ^ word) * 0x100000001B3u;
  }
  std::printf("dpbf16_tiny %016llx\n", static_cast<unsigned long long>(digest));
}

void CheckArithmetic() {
  const auto draw = [](Random& random) { return random.Float(); };
  using W = const Words&;
  Check("add", true, draw, [](W a, W b, W) { return Words::Of(a.vec() + b.vec()); });
  Check("subtract", true, draw, [](W a, W b, W) { return Words::Of(a.vec() - b.vec()); });
  Check("multiply", true, draw, [](W a, W b, W) { return Words::Of(a.vec() * b.vec()); });
  Check("divide", true, draw, [](W a, W b, W) { return Words::Of(a.vec() / b.vec()); });
  Check("fma", true, draw, [](W a, W b, W c) { return Words::Of(Fma(a.vec(), b.vec(), c.vec())); });
  Check("add_product", true, draw, [](W a, W b, W c) {
    Vec sum = c.vec();
    simd::AddProduct(a.vec(), b.vec(), sum);
    return Words::Of(sum);
  });
  Check("max", false, draw, [](W a, W b, W) { return Words::Of(Max(a.vec(), b.vec())); });
  Check("negative_abs", false, draw, [](W a, W, W) { return Words::Of(NegativeAbs(a.vec())); });
  Check("round", true, draw, [](W a, W, W) { return Words::Of(Round(a.vec())); });
  Check("fold", true, draw, [](W a, W, W) {
    Words words;
    const simd::Quad four = Fold(a.vec());
    std::memcpy(words.at, &four, sizeof four);
    words.at[4] = std::bit_cast<std::uint32_t>(Sum(a.vec()));
    return words;
  });
  Check(
      "power_of_two", false, [](Random& random) { return random.Whole(-126, 127); },
      [](W a, W, W) { return Words::Of(PowerOfTwo(a.vec())); });
  Check(
      "exp_of_negative", false, [](Random& random) { return random.Between(-90, 0); },
      [](W a, W, W) { return Words::Of(ExpOfNegative(a.vec())); });
  Check(
      "log1p", false, [](Random& random) { return random.Between(0, 1); },
      [](W a, W, W) { return Words::Of(Log1p(a.vec())); });
  Check("softplus", true, draw, [](W a, W, W) { return Words::Of(Softplus(a.vec())); });
}

void CheckMemory() {
  const auto draw = [](Random& random) { return random.Float(); };
  using W = const Words&;
  Check("load_part", false, draw, [](W a, W b, W) {
    const int count = 1 + static_cast<int>(b.at[0] % 16);
    return Words::Of(simd::LoadPart(reinterpret_cast<const float*>(a.at), count));
  });
  Check("store_part", false, draw, [](W a, W b, W c) {
    Words to = c;
    simd::StorePart(reinterpret_cast<float*>(to.at), a.vec(), 1 + static_cast<int>(b.at[0] % 16));
    return to;
  });
}

void CheckBFloat16() {
  const auto draw = [](Random& random) { return random.Float(); };
  const auto pairs = [](Random& random) { return random.BFloat16Pair(); };
  using W = const Words&;
  Check("even", false, pairs, [](W a, W, W) { return Words::Of(simd::Even(a.ints())); });
  Check("odd", false, pairs, [](W a, W, W) { return Words::Of(simd::Odd(a.ints())); });
  Check("round_to_bfloat16", false, draw,
        [](W a, W, W) { return Words::Of(RoundToBFloat16(a.vec())); });
  Check("store_bfloat16", false, draw, [](W a, W, W) {
    Words to;
    simd::StoreBFloat16(reinterpret_cast<std::uint16_t*>(to.at), RoundToBFloat16(a.vec()));
    return to;
  });
  Check(
      "dpbf16", false, [&](Random& random) { return random.BFloat16Pair(); },
      [](W sum, W a, W b) {
        return Words::Of(
            Vec{_mm512_dpbf16_ps(sum.vec().v, (__m512bh)a.ints().v, (__m512bh)b.ints().v)});
      });
  CheckTinyDots();
}

void CheckIntegers() {
  const auto draw = [](Random& random) { return random.Any(); };
  using W = const Words&;
  Check("to_float", false, draw, [](W a, W, W) { return Words::Of(ToFloat(a.ints())); });
  Check(
      "to_ints", false, [](Random& random) { return random.Float(); },
      [](W a, W, W) { return Words::Of(simd::ToInts(a.vec())); });
  Check("load_byte_pairs", false, draw, [](W a, W, W) {
    return Words::Of(simd::LoadBytePairs(reinterpret_cast<const std::int8_t*>(a.at)));
  });
  Check("set_pair", false, draw, [](W a, W, W) { return Words::Of(simd::SetFourBytes(a.at)); });
  Check("add_products", false, draw, [](W a, W b, W c) {
    Ints sum = c.ints();
    simd::AddProducts(a.ints(), b.ints(), sum);
    Words to;
    simd::StoreInts(to.at, sum);
    return to;
  });
  Check("dpbusd", false, draw, [](W sum, W a, W b) {
    return Words::Of(Ints{_mm512_dpbusd_epi32(sum.ints().v, a.ints().v, b.ints().v)});
  });
}

}  // namespace

int main() {
  CheckArithmetic();
  CheckMemory();
  CheckBFloat16();
  CheckIntegers();
}
