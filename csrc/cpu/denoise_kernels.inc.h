// The kernels of `denoise`, compiled once an instruction set (denoise_avx2.cpp and its sisters):
// what is fused around the products of denoise_products.inc.h, and the probes that benchmarks hold
// them against.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "cpu/denoise_kernels.h"
#include "cpu/denoise_layout.inc.h"
#include "cpu/denoise_products.inc.h"
#include "cpu/simd.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

// scale and shift [slots, kChunk] of a layer's units from `first` on; the step of the units' bytes
// goes into the scale.
void FoldTimesteps(const ConditionalLayerView& layer, const RowsView& rows, std::int64_t first,
                   int units, float* scale, float* shift) {
  for (std::int64_t slot = 0; slot < rows.slots; ++slot) {
    const float* gamma = layer.gamma + rows.timesteps[slot] * layer.gamma_stride + first;
    for (int n = 0; n < units; n += kLanes) {
      const int count = std::min(kLanes, units - n);
      Vec s = LoadPart(gamma + n, count) * LoadPart(layer.gain + first + n, count);
      Store(shift + slot * kChunk + n, Fma(s, LoadPart(layer.bias + first + n, count),
                                           LoadPart(layer.offset + first + n, count)));
      if (layer.unit_scale != nullptr) s = s * LoadPart(layer.unit_scale + first + n, count);
      Store(scale + slot * kChunk + n, s);
    }
  }
}

int UnitsOf(const DenoiserView& model, std::int64_t chunk) {
  return static_cast<int>(std::min(kChunk, model.features - chunk * kChunk));
}

// Leaves activations as the product behind takes them, or as float32 where a row has to be whole
// before it can be made bytes.
template <typename Product>
class Leave {
 public:
  Leave(const DenoiserView& model, const Tiles& tiles, std::int64_t row, void* out)
      : to_(static_cast<float*>(out) + row * model.stride),
        row_(tiles, row, model.stride * 4, out) {}

  void operator()(std::int64_t unit, Vec value, int count) const {
    if constexpr (Product::kScaled) {
      count == kLanes ? Store(to_ + unit, value) : StorePart(to_ + unit, value, count);
    } else {
      typename Product::Activation numbers[kLanes];
      Product::Round(value, numbers);
      row_.Set(unit, numbers, count);
    }
  }

 private:
  float* to_;
  ActivationRow<Product> row_;
};

constexpr std::int64_t kRowsAhead = 4;

template <typename Product>
void FirstOf(const DenoiserView& model, const RowsView& rows, std::int64_t chunk, float* scratch,
             void* out) {
  const std::int64_t first = chunk * kChunk;
  const int units = UnitsOf(model, chunk);
  float* scale = scratch;
  float* shift = scratch + rows.slots * kChunk;
  FoldTimesteps(model.layers[0], rows, first, units, scale, shift);
  const std::int64_t classes = model.classes;
  const Tiles tiles(rows.count);
  for (std::int64_t row = 0; row < rows.count; ++row) {
    const Leave<Product> leave(model, tiles, row, out);
    const float* y = rows.y + row * classes;
    const float* guidance = rows.guidance[row];
    const std::int64_t slot = rows.slot[row] * kChunk;
    // Rows of x are pages apart, which no prefetching of the processor's foresees.
    const float* ahead = rows.features[std::min(row + kRowsAhead, rows.count - 1)] + first;
    for (int n = 0; n < units; n += 16) Prefetch(ahead + n);
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
      leave(first + n, x * h, count);
    }
  }
}

// A hidden layer: its product, then of_row(row), which gives what is called with
// (unit, softplus of scale and shift, count).
template <typename Product, typename OfRow>
void HiddenOf(const DenoiserView& model, const ConditionalLayerView& layer, const RowsView& rows,
              std::int64_t chunk, const void* in, const float* row_scale, float* scratch,
              const OfRow& of_row) {
  const std::int64_t first = chunk * kChunk;
  const int units = UnitsOf(model, chunk);
  float* scale = scratch;
  float* shift = scratch + rows.slots * kChunk;
  float* sums = scratch + 2 * rows.slots * kChunk;
  FoldTimesteps(layer, rows, first, units, scale, shift);
  ChunkProduct<Product>(layer.weight + chunk * ChunkBytesOf<Product>(model.features),
                        model.features, rows.count, in, model.stride * 4, sums);
  for (std::int64_t row = 0; row < rows.count; ++row) {
    const std::int64_t slot = rows.slot[row] * kChunk;
    const auto& each = of_row(row);
    for (int n = 0; n < units; n += kLanes) {
      Vec sum = Load(sums + row * kChunk + n);
      if constexpr (Product::kScaled) sum = sum * Set(row_scale[row]);
      each(n, Softplus(Fma(sum, Load(scale + slot + n), Load(shift + slot + n))),
           std::min(kLanes, units - n));
    }
  }
}

template <typename Product>
void SecondOf(const DenoiserView& model, const RowsView& rows, std::int64_t chunk, const void* in,
              const float* row_scale, float* scratch, void* out) {
  const Tiles tiles(rows.count);
  HiddenOf<Product>(
      model, model.layers[1], rows, chunk, in, row_scale, scratch, [&](std::int64_t row) {
        const Leave<Product> leave(model, tiles, row, out);
        return [leave, chunk](int n, Vec h, int count) { leave(chunk * kChunk + n, h, count); };
      });
}

template <typename Product>
void ThirdOf(const DenoiserView& model, const RowsView& rows, std::int64_t chunk, const void* in,
             const float* row_scale, float* scratch, float* partial) {
  const int units = UnitsOf(model, chunk);
  Vec hidden[kChunk / kLanes];
  HiddenOf<Product>(
      model, model.layers[2], rows, chunk, in, row_scale, scratch, [&](std::int64_t row) {
        return [&, row](int n, Vec h, int) {
          hidden[n / kLanes] = h;
          if (n + kLanes < units) return;
          for (std::int64_t c = 0; c < model.classes; ++c) {
            const float* weight = model.output_weight + c * model.stride + chunk * kChunk;
            Vec sum = Zero();
            for (int i = 0; i < units; i += kLanes) {
              sum = Fma(hidden[i / kLanes], Load(weight + i), sum);  // 0 past the end
            }
            partial[row * model.classes + c] = Sum(sum);
          }
        };
      });
}

// Calls work.operator()<Product>() with the products of a precision.
template <typename Work>
auto WithProduct(Precision precision, const Work& work) {
  switch (precision) {
    case Precision::kBFloat16:
      return work.template operator()<BFloat16Product>();
    case Precision::kInt8:
      return work.template operator()<Int8Product>();
    default:
      return work.template operator()<Float32Product>();
  }
}

void First(const DenoiserView& model, Precision precision, const RowsView& rows, std::int64_t chunk,
           float* scratch, void* out) {
  WithProduct(precision,
              [&]<typename Product>() { FirstOf<Product>(model, rows, chunk, scratch, out); });
}

void Second(const DenoiserView& model, Precision precision, const RowsView& rows,
            std::int64_t chunk, const void* in, const float* row_scale, float* scratch, void* out) {
  WithProduct(precision, [&]<typename Product>() {
    SecondOf<Product>(model, rows, chunk, in, row_scale, scratch, out);
  });
}

void Third(const DenoiserView& model, Precision precision, const RowsView& rows, std::int64_t chunk,
           const void* in, const float* row_scale, float* scratch, float* partial) {
  WithProduct(precision, [&]<typename Product>() {
    ThirdOf<Product>(model, rows, chunk, in, row_scale, scratch, partial);
  });
}

std::int64_t TilesOf(std::int64_t rows) { return Tiles(rows).count; }

// A few elements of all rows after the other, since rows of a tile share cache lines.
void ToBytes(const DenoiserView& model, std::int64_t rows, std::int64_t tile, const float* in,
             void* out, float* scale) {
  constexpr std::int64_t kPart = 64;
  const Tiles tiles(rows);
  const std::int64_t begin = tiles.Begin(tile);
  float inverse[kTileRows];
  for (int m = 0; m < tiles.Size(tile); ++m) {
    scale[begin + m] = ByteScale(in + (begin + m) * model.stride, model.features, inverse + m);
  }
  for (std::int64_t first = 0; first < model.features; first += kPart) {
    for (int m = 0; m < tiles.Size(tile); ++m) {
      const ActivationRow<Int8Product> to(tiles, begin + m, model.stride * 4, out);
      ForBytes(in + (begin + m) * model.stride + first, std::min(kPart, model.features - first),
               inverse[m], [&](std::int64_t k, const std::int32_t* numbers, int count) {
                 Int8Product::Activation bytes[kLanes];
                 for (int i = 0; i < count; ++i) {
                   bytes[i] =
                       static_cast<Int8Product::Activation>(numbers[i] + Int8Product::kOffset);
                 }
                 to.Set(first + k, bytes, count);
               });
    }
  }
}

std::int64_t ChunkBytes(Precision precision, std::int64_t features) {
  return WithProduct(precision,
                     [&]<typename Product>() { return ChunkBytesOf<Product>(features); });
}

void PackChunk(Precision precision, const float* weight, std::int64_t stride, int units,
               std::int64_t features, std::byte* out, float* unit_scale) {
  WithProduct(precision, [&]<typename Product>() {
    PackChunkOf<Product>(weight, stride, units, features, out, unit_scale);
  });
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

// Multiply-adds of a precision's instructions, one for each element, in chains enough to hide each
// other's latency: in registers alone, or where one instruction does all of it, a tile's own on one
// group of elements. float32's bound the bfloat16 that is widened to it, too.
float MultiplyAddAll(Precision precision, std::int64_t count) {
  const auto run = [&]<typename Product>() {
    constexpr int kRows = 6;
    const typename Product::Activation a[kRows * 4] = {};
    const typename Product::Weight weights[kPanel * 4] = {};
    float sums[kRows * kChunk] = {};
    alignas(64) const std::byte front[4 * kPanel] = {};
    Sums<Product, kRows> tile;
    tile.Begin(front);
    const auto* hidden_a = a;
    const auto* hidden_w = weights;
    for (std::int64_t i = 0; i < count; i += kRows * kPanel * Product::kGroup) {
      Hide(hidden_a);
      Hide(hidden_w);
      tile.AddGroup(hidden_a, hidden_w);
    }
    tile.End(true, sums);
    return std::accumulate(sums, sums + kRows * kChunk, 0.0f);
  };
  constexpr int kSums = 12;
  if (precision == Precision::kInt8) {
    if constexpr (Int8Product::kOffset != 0) return run.template operator()<Int8Product>();
    Ints whole[kSums];
#pragma GCC unroll 12
    for (int s = 0; s < kSums; ++s) whole[s] = ZeroInts();
    const std::int16_t pair[2] = {1, -1};
    Ints factor = SetPair(pair);
    for (std::int64_t i = 0; i < count; i += kSums * kLanes * 2) {
      Hide(factor);  // or its product would be made once
#pragma GCC unroll 12
      for (int s = 0; s < kSums; ++s) AddProducts(factor, factor, whole[s]);
    }
    Vec total = Zero();
#pragma GCC unroll 12
    for (int s = 0; s < kSums; ++s) total = total + ToFloat(whole[s]);
    return Sum(total);
  }
  if (precision == Precision::kBFloat16 && !std::is_same_v<BFloat16Product::Activation, float>) {
    return run.template operator()<BFloat16Product>();
  }
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
    DIFFMIC_SIMD_NAME, First,     Second,      Third,   TilesOf,        ToBytes,
    ChunkBytes,        PackChunk, SoftplusAll, ReadAll, MultiplyAddAll,
};

}  // namespace

}  // namespace diffmic::cpu::DIFFMIC_SIMD
