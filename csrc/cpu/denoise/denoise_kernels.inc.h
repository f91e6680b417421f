// The kernels of `denoise`, compiled once an instruction set (denoise_avx2.cpp and its sisters):
// what is fused around the products of denoise_products.inc.h or denoise_amx.inc.h, and the probes
// that benchmarks hold them against.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/common/simd.h"
#include "cpu/denoise/denoise_kernel_table.h"
#include "cpu/denoise/denoise_layout.inc.h"
#include "cpu/denoise/denoise_products.inc.h"
#if defined(DIFFMIC_SIMD_AMX)
#include "cpu/denoise/denoise_amx.inc.h"
#endif
#include "cpu/denoise/denoise_probes.inc.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

// GEMM, activation layout and accumulator layout of each precision.
#if defined(DIFFMIC_SIMD_AMX)
using BFloat16 = AmxBFloat16;
using Int8 = AmxInt8;
template <typename Product>
using RowOf = std::conditional_t<Product::kAmx, AmxRow<Product>, VectorRow<Product>>;
template <typename Product>
using SumsOf = std::conditional_t<Product::kAmx, AmxSums, VectorSums>;
#else
using BFloat16 = VectorBFloat16;
using Int8 = VectorInt8;
template <typename Product>
using RowOf = VectorRow<Product>;
template <typename Product>
using SumsOf = VectorSums;
#endif

// Lanes of a partial sum of the last product, the unit n in lane n % kOutputLanes: those of a
// vector, or where other instruction sets must give the same bits, 16.
template <typename Product>
constexpr int kOutputLanes = Product::kScaled || kAmxSet ? 16 : kLanes;

// scale and shift [slots, kChunk] of a layer's units from `first` on; the scale of the units' bytes
// goes into the former.
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

// Stores activations as the next layer's product takes them, or as float32 where a row has to be
// complete before it can be converted to bytes.
template <typename Product>
class Activations {
 public:
  Activations(const DenoiserView& model, const RowTiles& tiles, const Place& place, void* out)
      : to_(static_cast<float*>(out) + place.row * model.stride), row_(model, tiles, place, out) {}

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
  RowOf<Product> row_;
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
  const auto tiles = RowTiles::Of<Product>(rows.count);
  for (Place place; place.row < rows.count; place.Next(tiles)) {
    const std::int64_t row = place.row;
    const Activations<Product> store(model, tiles, place, out);
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
      store(first + n, x * h, count);
    }
  }
}

// A hidden layer: its products of a group of chunks, then for each chunk and row of_row(chunk,
// place), which returns what is called with (unit of the chunk, output, count).
template <typename Product, typename OfRow>
void HiddenOf(const DenoiserView& model, const ConditionalLayerView& layer, const RowsView& rows,
              ChunkRange chunks, const void* in, const float* row_scale, float* scratch,
              const OfRow& of_row) {
  using Total = typename Product::Total;
  float* scale = scratch;
  float* shift = scratch + rows.slots * kChunk;
  auto* sums = reinterpret_cast<Total*>(scratch + 2 * rows.slots * kChunk);
  const auto tiles = RowTiles::Of<Product>(rows.count);
  const SumsOf<Product> at(tiles, chunks.count);
  const std::byte* weights = layer.weight + chunks.first * ChunkBytesOf<Product>(model.features);
  if constexpr (Product::kAmx) {
    TileProduct<Product>(weights, chunks.count, model.features, tiles, in, sums);
  } else {
    GroupProduct<Product>(weights, chunks.count, model.features, tiles, in, model.stride * 4, sums,
                          sums + at.size());
  }
  for (std::int64_t i = 0; i < chunks.count; ++i) {
    const std::int64_t chunk = chunks.first + i;
    const int units = UnitsOf(model, chunk);
    FoldTimesteps(layer, rows, chunk * kChunk, units, scale, shift);
    for (Place place; place.row < rows.count; place.Next(tiles)) {
      const std::int64_t slot = rows.slot[place.row] * kChunk;
      const auto& each = of_row(chunk, place);
      for (int n = 0; n < units; n += kLanes) {
        Vec sum = Product::ToVec(Product::LoadSum(sums + at(i, place, n)));
        if constexpr (Product::kScaled) sum = sum * Set(row_scale[place.row]);
        each(n, Softplus(Fma(sum, Load(scale + slot + n), Load(shift + slot + n))),
             std::min(kLanes, units - n));
      }
    }
  }
}

template <typename Product>
void SecondOf(const DenoiserView& model, const RowsView& rows, ChunkRange chunks, const void* in,
              const float* row_scale, float* scratch, void* out) {
  const auto tiles = RowTiles::Of<Product>(rows.count);
  HiddenOf<Product>(model, model.layers[1], rows, chunks, in, row_scale, scratch,
                    [&](std::int64_t chunk, const Place& place) {
                      const Activations<Product> store(model, tiles, place, out);
                      return [store, chunk](int n, Vec h, int count) {
                        store(chunk * kChunk + n, h, count);
                      };
                    });
}

// hidden [kChunk / kLanes] . weight, summed in `kOut` lanes, then the lanes by halves.
template <int kOut>
float OutputSum(const Vec* hidden, const float* weight, int units) {
  constexpr int kVectors = kOut / kLanes;
  Vec sums[kVectors];
  for (Vec& sum : sums) sum = Zero();
  for (int i = 0; i < units; i += kLanes) {
    Vec& sum = sums[i / kLanes % kVectors];
    sum = Fma(hidden[i / kLanes], Load(weight + i), sum);  // 0 past the end
  }
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
  }
  return Sum(sums[0]);
}

template <typename Product>
void ThirdOf(const DenoiserView& model, const RowsView& rows, ChunkRange chunks, const void* in,
             const float* row_scale, float* scratch, float* partial) {
  Vec hidden[kChunk / kLanes];
  HiddenOf<Product>(model, model.layers[2], rows, chunks, in, row_scale, scratch,
                    [&](std::int64_t chunk, const Place& place) {
                      return [&, chunk, row = place.row](int n, Vec h, int) {
                        hidden[n / kLanes] = h;
                        const int units = UnitsOf(model, chunk);
                        if (n + kLanes < units) return;
                        float* out = partial + (chunk * rows.count + row) * model.classes;
                        for (std::int64_t c = 0; c < model.classes; ++c) {
                          const float* weight =
                              model.output_weight + c * model.stride + chunk * kChunk;
                          out[c] = OutputSum<kOutputLanes<Product>>(hidden, weight, units);
                        }
                      };
                    });
}

// Calls work.operator()<Product>() with the products of a precision.
template <typename Work>
auto WithProduct(Precision precision, const Work& work) {
  switch (precision) {
    case Precision::kBFloat16:
      return work.template operator()<BFloat16>();
    case Precision::kInt8:
      return work.template operator()<Int8>();
    default:
      return work.template operator()<Float32>();
  }
}

void First(const DenoiserView& model, Precision precision, const RowsView& rows, std::int64_t chunk,
           float* scratch, void* out) {
  WithProduct(precision,
              [&]<typename Product>() { FirstOf<Product>(model, rows, chunk, scratch, out); });
}

void Second(const DenoiserView& model, Precision precision, const RowsView& rows, ChunkRange chunks,
            const void* in, const float* row_scale, float* scratch, void* out) {
  WithProduct(precision, [&]<typename Product>() {
    SecondOf<Product>(model, rows, chunks, in, row_scale, scratch, out);
  });
}

void Third(const DenoiserView& model, Precision precision, const RowsView& rows, ChunkRange chunks,
           const void* in, const float* row_scale, float* scratch, float* partial) {
  WithProduct(precision, [&]<typename Product>() {
    ThirdOf<Product>(model, rows, chunks, in, row_scale, scratch, partial);
  });
}

std::int64_t Group(Precision precision, std::int64_t rows) {
  return WithProduct(precision, [&]<typename Product>() { return Product::GroupChunks(rows); });
}

std::int64_t Scratch(Precision precision, std::int64_t rows, std::int64_t slots,
                     std::int64_t chunks) {
  const std::int64_t sums = WithProduct(precision, [&]<typename Product>() {
    // Vector products: the sums of a block besides.
    return SumsOf<Product>(RowTiles::Of<Product>(rows), chunks).size() +
           (Product::kAmx ? 0 : rows * kChunk);
  });
  return 2 * slots * kChunk + sums;
}

std::int64_t TilesOf(std::int64_t rows) { return RowTiles::Of<Int8>(rows).count; }

// Quantises the rows of a tile, kPart elements of each row at a time: they share cache lines.
void ToBytes(const DenoiserView& model, std::int64_t rows, std::int64_t tile, const float* in,
             void* out, float* scale) {
  constexpr std::int64_t kPart = 64;
  const auto tiles = RowTiles::Of<Int8>(rows);
  const std::int64_t begin = tiles.Begin(tile);
  float inverse[Int8::kMostRows];
  for (int m = 0; m < tiles.Size(tile); ++m) {
    scale[begin + m] = ByteScale(in + (begin + m) * model.stride, model.features, inverse + m);
  }
  for (std::int64_t first = 0; first < model.features; first += kPart) {
    for (int m = 0; m < tiles.Size(tile); ++m) {
      const RowOf<Int8> to(model, tiles, {begin + m, tile, m}, out);
      ForBytes(in + (begin + m) * model.stride + first, std::min(kPart, model.features - first),
               inverse[m], [&](std::int64_t k, const std::int32_t* numbers, int count) {
                 Int8::Activation bytes[kLanes];
                 for (int i = 0; i < count; ++i) {
                   bytes[i] = static_cast<Int8::Activation>(numbers[i] + Int8::kOffset);
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

constexpr DenoiseKernels kDenoiseKernels{
    DIFFMIC_SIMD_NAME, Group,      Scratch,   First,       Second,  Third,          TilesOf,
    ToBytes,           ChunkBytes, PackChunk, SoftplusAll, ReadAll, MultiplyAddAll,
};

}  // namespace

}  // namespace diffmic::cpu::DIFFMIC_SIMD
