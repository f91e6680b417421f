// The kernels of `denoise`, compiled once an instruction set (denoise_avx2.cpp and its sisters).
//
// A hidden layer is out[m, f] = sum over k of in[m, k] W[f, k]: both run along k, so W is read as
// it lies in the model, row by row, and is never packed. A thread owns kChunk rows of W at a time.
// Within them, kDepth elements of k at a time:
//
//   rows of activations, kRowPanel at a time (their kDepth elements stay in L2)
//     4 rows of W (16 KB: they stay in L1)
//       a tile of kTileRows rows of activations against these 4, sums in registers
//
// A sum therefore has one order, whatever the number of rows: lane by lane along k in pieces of
// kDepth, each piece folded to one number and added to those before it. Tiles of other shapes, for
// the rows left over and for one row alone (8 rows of W, to have enough sums in flight), keep it.
//
// Arithmetic at F = 6144, a step: 4 F^2 M operations against 8 F^2 bytes of weights (float32), 302
// MB. With two cores of 40 GB/s and 2 x 60 GFLOP/s the weights bound up to M = 4 rows or so, the
// multiply-adds beyond. Activations, 25 KB a row, are read from L2 and L3.
//
// bfloat16 weights are widened in registers: a word holds elements 2i and 2i + 1, so activations
// (rounded to bfloat16, kept as float32) lie as kLanes even elements, then kLanes odd ones.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/denoise_kernels.h"
#include "cpu/simd.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

constexpr std::int64_t kRowPanel = 64;
constexpr std::int64_t kFewRows = 6;
constexpr int kTileRows = kRegisters == 32 ? 6 : 3;
constexpr int kTileUnits = 4;

// ---- sums along k, by precision

struct Float32Product {
  using Weight = float;
  static constexpr bool kWiden = false;

  // acc[m][n] += a_m . w_n over `depth` elements.
  template <int kM, int kN>
  static void Accumulate(const float* a, std::int64_t a_stride, const float* w,
                         std::int64_t w_stride, std::int64_t depth, Vec (&acc)[kM][kN]) {
    std::int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
      Vec weight[kN];
      for (int n = 0; n < kN; ++n) weight[n] = Load(w + n * w_stride + k);
      for (int m = 0; m < kM; ++m) {
        const Vec activation = Load(a + m * a_stride + k);
        for (int n = 0; n < kN; ++n) acc[m][n] = Fma(activation, weight[n], acc[m][n]);
      }
    }
    if (k == depth) return;
    const int rest = static_cast<int>(depth - k);
    for (int n = 0; n < kN; ++n) {
      const Vec weight = LoadPart(w + n * w_stride + k, rest);
      for (int m = 0; m < kM; ++m) {
        acc[m][n] = Fma(Load(a + m * a_stride + k), weight, acc[m][n]);
      }
    }
  }

  // Activations of units [unit, unit + kLanes) of a row, `count` of them real.
  static void StoreUnits(float* row, std::int64_t unit, Vec value, int count) {
    if (count == kLanes) {
      Store(row + unit, value);
    } else {
      StorePart(row + unit, value, count);
    }
  }
};

struct BFloat16Product {
  using Weight = std::uint16_t;
  static constexpr bool kWiden = true;

  template <int kM, int kN>
  static void Accumulate(const float* a, std::int64_t a_stride, const std::uint16_t* w,
                         std::int64_t w_stride, std::int64_t depth, Vec (&acc)[kM][kN]) {
    constexpr int kStep = 2 * kLanes;
    std::int64_t k = 0;
    for (; k + kStep <= depth; k += kStep) {
      for (int n = 0; n < kN; ++n) Add<kM, kN>(a + k, a_stride, w + n * w_stride + k, n, acc);
    }
    if (k == depth) return;
    for (int n = 0; n < kN; ++n) {
      std::uint16_t rest[kStep] = {};
      std::copy_n(w + n * w_stride + k, depth - k, rest);
      Add<kM, kN>(a + k, a_stride, rest, n, acc);
    }
  }

  // Elements of W as float32, in the places of the activations: Float32Product then does with them
  // exactly what Accumulate does, and a tile of many rows pays for the widening once.
  static void Widen(const std::uint16_t* w, std::int64_t depth, float* out) {
    constexpr int kStep = 2 * kLanes;
    for (std::int64_t k = 0; k < depth; k += kStep) {
      std::uint16_t rest[kStep] = {};
      const std::uint16_t* part = w + k;
      if (depth - k < kStep) {
        std::copy_n(part, depth - k, rest);
        part = rest;
      }
      const Pairs pairs = LoadPairs(part);
      Store(out + k, Even(pairs));
      Store(out + k + kLanes, Odd(pairs));
    }
  }

  static void StoreUnits(float* row, std::int64_t unit, Vec value, int count) {
    float numbers[kLanes];
    Store(numbers, RoundToBFloat16(value));
    for (int i = 0; i < count; ++i) row[Place(unit + i)] = numbers[i];
  }

 private:
  // Where element k of a row lies.
  static std::int64_t Place(std::int64_t k) {
    constexpr std::int64_t kStep = 2 * kLanes;
    return k / kStep * kStep + k % 2 * kLanes + k % kStep / 2;
  }

  template <int kM, int kN>
  static void Add(const float* a, std::int64_t a_stride, const std::uint16_t* w, int n,
                  Vec (&acc)[kM][kN]) {
    const Pairs pairs = LoadPairs(w);
    const Vec even = Even(pairs);
    const Vec odd = Odd(pairs);
    for (int m = 0; m < kM; ++m) {
      acc[m][n] = Fma(Load(a + m * a_stride), even, acc[m][n]);
      acc[m][n] = Fma(Load(a + m * a_stride + kLanes), odd, acc[m][n]);
    }
  }
};

// sums[m * kChunk + n] += a_m . w_n.
template <typename Product, int kM, int kN>
void Tile(const float* a, std::int64_t a_stride, const typename Product::Weight* w,
          std::int64_t w_stride, std::int64_t depth, float* sums) {
  Vec acc[kM][kN];
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) acc[m][n] = Zero();
  }
  Product::template Accumulate<kM, kN>(a, a_stride, w, w_stride, depth, acc);
  for (int m = 0; m < kM; ++m) {
    float* sum = sums + m * kChunk;
    if constexpr (kN % 4 == 0) {
      for (int n = 0; n < kN; n += 4) {
        StoreQuad(sum + n,
                  AddQuads(LoadQuad(sum + n), SumQuads(Fold(acc[m][n]), Fold(acc[m][n + 1]),
                                                       Fold(acc[m][n + 2]), Fold(acc[m][n + 3]))));
      }
    } else {
      for (int n = 0; n < kN; ++n) sum[n] += Sum(acc[m][n]);
    }
  }
}

template <typename Product, int kN>
void TileOf(int rows, const float* a, std::int64_t a_stride, const typename Product::Weight* w,
            std::int64_t w_stride, std::int64_t depth, float* sums) {
  switch (rows) {
    case 1:
      return Tile<Product, 1, kN>(a, a_stride, w, w_stride, depth, sums);
    case 2:
      return Tile<Product, 2, kN>(a, a_stride, w, w_stride, depth, sums);
    case 3:
      return Tile<Product, 3, kN>(a, a_stride, w, w_stride, depth, sums);
    default:
      break;
  }
  if constexpr (kTileRows > 3) {
    switch (rows) {
      case 4:
        return Tile<Product, 4, kN>(a, a_stride, w, w_stride, depth, sums);
      case 5:
        return Tile<Product, 5, kN>(a, a_stride, w, w_stride, depth, sums);
      default:
        return Tile<Product, 6, kN>(a, a_stride, w, w_stride, depth, sums);
    }
  }
}

template <typename Product>
void TilesOf(int wide, int rows, const float* a, std::int64_t a_stride,
             const typename Product::Weight* w, std::int64_t w_stride, std::int64_t depth,
             float* sums) {
  if (wide == kTileUnits) {
    TileOf<Product, kTileUnits>(rows, a, a_stride, w, w_stride, depth, sums);
  } else {
    TileOf<Product, 1>(rows, a, a_stride, w, w_stride, depth, sums);
  }
}

// Elements that widening makes of `depth`: the last pairs are filled up with zeros.
constexpr std::int64_t RoundUpDepth(std::int64_t depth) {
  return (depth + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
}

// sums [rows, kChunk] = in . W^T for `units` rows of W from `first` on.
template <typename Product>
void ChunkProduct(const DenoiserView& model, const ConditionalLayerView& layer, std::int64_t rows,
                  const float* in, std::int64_t first, int units, float* sums) {
  using Weight = typename Product::Weight;
  const Weight* chunk = static_cast<const Weight*>(layer.weight) + first * layer.weight_stride;
  const std::int64_t stride = layer.weight_stride;
  std::fill_n(sums, rows * kChunk, 0.0f);
  if (rows <= kFewRows) {
    // Bound by reading W: along whole rows of it, for the sake of the processor's own prefetching.
    // kDepth still bounds a sum.
    for (int n = 0; n < units;) {
      const int wide = rows == 1 && units - n >= 8 ? 8 : units - n >= kTileUnits ? kTileUnits : 1;
      for (std::int64_t k = 0; k < model.features; k += kDepth) {
        const std::int64_t depth = std::min(kDepth, model.features - k);
        const Weight* w = chunk + n * stride + k;
        if (wide == 8) {
          Tile<Product, 1, 8>(in + k, model.stride, w, stride, depth, sums + n);
          continue;
        }
        for (std::int64_t row = 0; row < rows; row += kTileRows) {
          const int count = static_cast<int>(std::min<std::int64_t>(kTileRows, rows - row));
          TilesOf<Product>(wide, count, in + row * model.stride + k, model.stride, w, stride, depth,
                           sums + row * kChunk + n);
        }
      }
      n += wide;
    }
    return;
  }
  alignas(64) float widened[Product::kWiden ? kTileUnits * kDepth : 1];
  for (std::int64_t k = 0; k < model.features; k += kDepth) {
    const std::int64_t depth = std::min(kDepth, model.features - k);
    for (std::int64_t panel = 0; panel < rows; panel += kRowPanel) {
      const std::int64_t panel_end = std::min(rows, panel + kRowPanel);
      const std::int64_t tiles = (panel_end - panel + kTileRows - 1) / kTileRows;
      for (int n = 0; n < units;) {
        const int wide = units - n >= kTileUnits ? kTileUnits : 1;
        const Weight* w = chunk + n * stride + k;
        if constexpr (Product::kWiden) {
          for (int i = 0; i < wide; ++i)
            Product::Widen(w + i * stride, depth, widened + i * kDepth);
        }
        std::int64_t tile = 0;
        for (std::int64_t row = panel; row < panel_end; ++tile) {
          const int count = static_cast<int>((panel_end - row + tiles - tile - 1) / (tiles - tile));
          const float* a = in + row * model.stride + k;
          float* sum = sums + row * kChunk + n;
          if constexpr (Product::kWiden) {
            TilesOf<Float32Product>(wide, count, a, model.stride, widened, kDepth,
                                    RoundUpDepth(depth), sum);
          } else {
            TilesOf<Product>(wide, count, a, model.stride, w, stride, depth, sum);
          }
          row += count;
        }
        n += wide;
      }
    }
  }
}

// ---- around the products

// scale and shift [slots, kChunk] of a layer's units from `first` on.
void FoldTimesteps(const ConditionalLayerView& layer, const RowsView& rows, std::int64_t first,
                   int units, float* scale, float* shift) {
  for (std::int64_t slot = 0; slot < rows.slots; ++slot) {
    const float* gamma = layer.gamma + rows.timesteps[slot] * layer.gamma_stride + first;
    for (int n = 0; n < units; n += kLanes) {
      const int count = std::min(kLanes, units - n);
      const Vec s = LoadPart(gamma + n, count) * LoadPart(layer.gain + first + n, count);
      Store(scale + slot * kChunk + n, s);
      Store(shift + slot * kChunk + n, Fma(s, LoadPart(layer.bias + first + n, count),
                                           LoadPart(layer.offset + first + n, count)));
    }
  }
}

int UnitsOf(const DenoiserView& model, std::int64_t chunk) {
  return static_cast<int>(std::min(kChunk, model.features - chunk * kChunk));
}

template <typename Product>
void FirstOf(const DenoiserView& model, const RowsView& rows, std::int64_t chunk, float* scratch,
             float* out) {
  const std::int64_t first = chunk * kChunk;
  const int units = UnitsOf(model, chunk);
  float* scale = scratch;
  float* shift = scratch + rows.slots * kChunk;
  FoldTimesteps(model.layers[0], rows, first, units, scale, shift);
  const std::int64_t classes = model.classes;
  for (std::int64_t row = 0; row < rows.count; ++row) {
    const float* y = rows.y + row * classes;
    const float* guidance = rows.guidance[row];
    const std::int64_t slot = rows.slot[row] * kChunk;
    for (int n = 0; n < units; n += kLanes) {
      const int count = std::min(kLanes, units - n);
      const float* weight = model.label_weight + first + n;
      Vec sum = Zero();
      for (std::int64_t c = 0; c < classes; ++c) {
        sum = Fma(Set(y[c]), Load(weight + c * model.stride), sum);
      }
      for (std::int64_t c = 0; c < classes; ++c) {
        sum = Fma(Set(guidance[c]), Load(weight + (classes + c) * model.stride), sum);
      }
      const Vec h = Softplus(Fma(sum, Load(scale + slot + n), Load(shift + slot + n)));
      const Vec x = LoadPart(rows.features[row] + first + n, count);
      Product::StoreUnits(out + row * model.stride, first + n, x * h, count);
    }
  }
}

template <typename Product>
void SecondOf(const DenoiserView& model, const RowsView& rows, std::int64_t chunk, const float* in,
              float* scratch, float* out) {
  const std::int64_t first = chunk * kChunk;
  const int units = UnitsOf(model, chunk);
  float* scale = scratch;
  float* shift = scratch + rows.slots * kChunk;
  float* sums = scratch + 2 * rows.slots * kChunk;
  FoldTimesteps(model.layers[1], rows, first, units, scale, shift);
  ChunkProduct<Product>(model, model.layers[1], rows.count, in, first, units, sums);
  for (std::int64_t row = 0; row < rows.count; ++row) {
    const std::int64_t slot = rows.slot[row] * kChunk;
    for (int n = 0; n < units; n += kLanes) {
      const Vec h = Softplus(
          Fma(Load(sums + row * kChunk + n), Load(scale + slot + n), Load(shift + slot + n)));
      Product::StoreUnits(out + row * model.stride, first + n, h, std::min(kLanes, units - n));
    }
  }
}

template <typename Product>
void ThirdOf(const DenoiserView& model, const RowsView& rows, std::int64_t chunk, const float* in,
             float* scratch, float* partial) {
  const std::int64_t first = chunk * kChunk;
  const int units = UnitsOf(model, chunk);
  float* scale = scratch;
  float* shift = scratch + rows.slots * kChunk;
  float* sums = scratch + 2 * rows.slots * kChunk;
  FoldTimesteps(model.layers[2], rows, first, units, scale, shift);
  ChunkProduct<Product>(model, model.layers[2], rows.count, in, first, units, sums);
  for (std::int64_t row = 0; row < rows.count; ++row) {
    const std::int64_t slot = rows.slot[row] * kChunk;
    Vec h[kChunk / kLanes];
    for (int n = 0; n < units; n += kLanes) {
      h[n / kLanes] = Softplus(
          Fma(Load(sums + row * kChunk + n), Load(scale + slot + n), Load(shift + slot + n)));
    }
    for (std::int64_t c = 0; c < model.classes; ++c) {
      const float* weight = model.output_weight + c * model.stride + first;
      Vec sum = Zero();
      for (int n = 0; n < units; n += kLanes) {
        sum = Fma(h[n / kLanes], Load(weight + n), sum);  // 0 beyond the last unit
      }
      partial[row * model.classes + c] = Sum(sum);
    }
  }
}

void First(const DenoiserView& model, Precision precision, const RowsView& rows, std::int64_t chunk,
           float* scratch, float* out) {
  if (precision == Precision::kFloat32) {
    FirstOf<Float32Product>(model, rows, chunk, scratch, out);
  } else {
    FirstOf<BFloat16Product>(model, rows, chunk, scratch, out);
  }
}

void Second(const DenoiserView& model, Precision precision, const RowsView& rows,
            std::int64_t chunk, const float* in, float* scratch, float* out) {
  if (precision == Precision::kFloat32) {
    SecondOf<Float32Product>(model, rows, chunk, in, scratch, out);
  } else {
    SecondOf<BFloat16Product>(model, rows, chunk, in, scratch, out);
  }
}

void Third(const DenoiserView& model, Precision precision, const RowsView& rows, std::int64_t chunk,
           const float* in, float* scratch, float* partial) {
  if (precision == Precision::kFloat32) {
    ThirdOf<Float32Product>(model, rows, chunk, in, scratch, partial);
  } else {
    ThirdOf<BFloat16Product>(model, rows, chunk, in, scratch, partial);
  }
}

void RoundAll(const float* in, std::int64_t count, std::uint16_t* out) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const int part = static_cast<int>(std::min<std::int64_t>(kLanes, count - i));
    std::uint32_t bits[kLanes];
    float numbers[kLanes];
    Store(numbers, RoundToBFloat16(part == kLanes ? Load(in + i) : LoadPart(in + i, part)));
    std::memcpy(bits, numbers, sizeof bits);
    for (int j = 0; j < part; ++j) out[i + j] = static_cast<std::uint16_t>(bits[j] >> 16);
  }
}

void SoftplusAll(const float* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const int part = static_cast<int>(std::min<std::int64_t>(kLanes, count - i));
    StorePart(out + i, Softplus(LoadPart(in + i, part)), part);
  }
}

float ReadAll(const float* in, std::int64_t count) {
  constexpr int kStreams = 4;
  const std::int64_t part = count / kStreams / (2 * kLanes) * (2 * kLanes);
  Vec sums[2 * kStreams];
  for (Vec& sum : sums) sum = Zero();
  for (std::int64_t i = 0; i < part; i += 2 * kLanes) {
    for (int s = 0; s < kStreams; ++s) {
      sums[2 * s] = sums[2 * s] + Load(in + s * part + i);
      sums[2 * s + 1] = sums[2 * s + 1] + Load(in + s * part + i + kLanes);
    }
  }
  for (int s = 1; s < 2 * kStreams; ++s) sums[0] = sums[0] + sums[s];
  float rest = Sum(sums[0]);
  for (std::int64_t i = kStreams * part; i < count; ++i) rest += in[i];
  return rest;
}

float MultiplyAddAll(std::int64_t count) {
  constexpr int kSums = 12;
  Vec sums[kSums];
  for (int s = 0; s < kSums; ++s) sums[s] = Set(static_cast<float>(s));
  const Vec factor = Set(0.999f);
  const Vec term = Set(0.001f);
  for (std::int64_t i = 0; i < count; i += kSums * kLanes) {
    for (Vec& sum : sums) sum = Fma(sum, factor, term);
  }
  for (int s = 1; s < kSums; ++s) sums[0] = sums[0] + sums[s];
  return Sum(sums[0]);
}

constexpr DenoiseKernels kDenoiseKernels{
    DIFFMIC_SIMD_NAME, First, Second, Third, RoundAll, SoftplusAll, ReadAll, MultiplyAddAll,
};

}  // namespace

}  // namespace diffmic::cpu::DIFFMIC_SIMD
