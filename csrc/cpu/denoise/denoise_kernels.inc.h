// The kernels of `denoise`, compiled once per instruction set (denoise_avx2.cpp and the like): the
// layers of the denoiser, fused around the GEMM of denoise_gemm.inc.h or denoise_amx.inc.h.
//
// What is computed (docs/algorithm.md, "Denoiser"), for a chunk of kChunk output channels:
//
//   first layer    softplus(scale (W [y ; guidance]) + shift) * x
//   hidden layers  softplus(scale (W h) + shift); after the second one, its share in the output
//   layer
//
// From the table entry (denoise_kernel_table.h) to a multiply-add:
//
//   HiddenLayer  ->  Gemm  ->  MicroKernel  ->  P::MultiplyAdd
//   HiddenLayer  ->  Gemm  ->  FewRows or ManyRows  ->  AddSlices  ->  P::Dot    (AMX)
//
// Arithmetic: the GEMMs take 4 F^2 M operations per sweep, and their weights or multiply-adds are
// the bound (denoise_gemm.inc.h); everything else is proportional to F M.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/common/simd.h"
#include "cpu/denoise/denoise_gemm.inc.h"
#include "cpu/denoise/denoise_kernel_table.h"
#include "cpu/denoise/denoise_layout.inc.h"
#if defined(DIFFMIC_SIMD_AMX)
#include "cpu/denoise/denoise_amx.inc.h"
#endif
#include "cpu/denoise/denoise_probes.inc.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

// Precisions, and the layouts of their activations and accumulators.
#if defined(DIFFMIC_SIMD_AMX)
using BFloat16 = AmxBFloat16;
using Int8 = AmxInt8;
template <typename P>
using RowOf = std::conditional_t<P::kAmx, AmxRow<P>, VectorRow<P>>;
template <typename P>
using SumsOf = std::conditional_t<P::kAmx, AmxSums, VectorSums>;
constexpr bool kAmxSet = true;
#else
using BFloat16 = VectorBFloat16;
using Int8 = VectorInt8;
template <typename P>
using RowOf = VectorRow<P>;
template <typename P>
using SumsOf = VectorSums;
constexpr bool kAmxSet = false;
#endif

// Lanes of a chunk's share in the output layer, channel n in lane n % kOutputLanes: those of a
// vector, or 16 where instruction sets must agree bitwise.
template <typename P>
constexpr int kOutputLanes = P::kQuantised || kAmxSet ? 16 : kLanes;

// A chunk of a layer: its channels, and their scale and shift [slots, kChunk] at every timestep.
struct ChunkOf {
  ChunkOf(const DenoiserView& model, const ConditionalLayerView& layer, const RowsView& rows,
          std::int64_t chunk, float* workspace)
      : first(chunk * kChunk),
        channels(static_cast<int>(std::min(kChunk, model.features - first))),
        scale(workspace),
        shift(workspace + rows.slots * kChunk) {
    for (std::int64_t slot = 0; slot < rows.slots; ++slot) {
      const float* gamma = layer.gamma + rows.timesteps[slot] * layer.gamma_stride + first;
      for (int n = 0; n < channels; n += kLanes) {
        const int count = std::min(kLanes, channels - n);
        Vec s = LoadPart(gamma + n, count) * LoadPart(layer.gain + first + n, count);
        Store(shift + slot * kChunk + n, Fma(s, LoadPart(layer.bias + first + n, count),
                                             LoadPart(layer.offset + first + n, count)));
        if (layer.channel_scale != nullptr) {
          s = s * LoadPart(layer.channel_scale + first + n, count);
        }
        Store(scale + slot * kChunk + n, s);
      }
    }
  }

  Vec Activate(Vec sum, std::int64_t slot, int n) const {
    const std::int64_t at = slot * kChunk + n;
    return Softplus(Fma(sum, Load(scale + at), Load(shift + at)));
  }

  std::int64_t first;
  int channels;
  float* scale;
  float* shift;
};

// Writes activations in the layout of the next layer's GEMM, or as float32 where a row must be
// complete before it can be quantised.
template <typename P>
class Activations {
 public:
  Activations(const DenoiserView& model, const RowTiles& tiles, const Place& place, void* out)
      : to_(static_cast<float*>(out) + place.row * model.stride), row_(model, tiles, place, out) {}

  void Set(std::int64_t channel, Vec value, int count) const {
    if constexpr (P::kQuantised) {
      count == kLanes ? Store(to_ + channel, value) : StorePart(to_ + channel, value, count);
    } else {
      typename P::Activation rounded[kLanes];
      P::Round(value, rounded);
      row_.Set(channel, rounded, count);
    }
  }

 private:
  float* to_;
  RowOf<P> row_;
};

constexpr std::int64_t kRowsAhead = 4;

template <typename P>
void FirstLayer(const DenoiserView& model, const RowsView& rows, std::int64_t chunk_index,
                float* workspace, void* out) {
  const ChunkOf chunk(model, model.layers[0], rows, chunk_index, workspace);
  const std::int64_t classes = model.classes;
  const auto tiles = RowTiles::Of<P>(rows.count);
  for (Place place; place.row < rows.count; place.Next(tiles)) {
    const std::int64_t row = place.row;
    const Activations<P> activations(model, tiles, place, out);
    const float* y = rows.y + row * classes;
    const float* guidance = rows.guidance[row];
    // Rows of x are pages apart, out of reach of the hardware prefetcher.
    const float* ahead = rows.features[std::min(row + kRowsAhead, rows.count - 1)] + chunk.first;
    for (int n = 0; n < chunk.channels; n += 16) Prefetch(ahead + n);
    for (int n = 0; n < chunk.channels; n += kLanes) {
      const int count = std::min(kLanes, chunk.channels - n);
      const float* weight = model.label_weight + chunk.first + n;
      Vec sum = Zero();
      for (std::int64_t c = 0; c < classes; ++c) {
        sum = Fma(Set(y[c]), Load(weight + c * model.stride), sum);
      }
      for (std::int64_t c = 0; c < classes; ++c) {
        sum = Fma(Set(guidance[c]), Load(weight + (classes + c) * model.stride), sum);
      }
      const Vec x = LoadPart(rows.features[row] + chunk.first + n, count);
      activations.Set(chunk.first + n, x * chunk.Activate(sum, rows.slot[row], n), count);
    }
  }
}

// hidden [kChunk / kLanes] . weight, accumulated in `kOut` lanes, which are then added by halves.
template <int kOut>
float OutputSum(const Vec* hidden, const float* weight, int channels) {
  constexpr int kVectors = kOut / kLanes;
  Vec sums[kVectors] = {};
  for (int i = 0; i < channels; i += kLanes) {
    Vec& sum = sums[i / kLanes % kVectors];
    sum = Fma(hidden[i / kLanes], Load(weight + i), sum);  // weights beyond F are 0
  }
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
  }
  return Sum(sums[0]);
}

template <typename P>
void HiddenLayer(const DenoiserView& model, int layer_index, const RowsView& rows,
                 ChunkRange chunks, const void* in, const float* row_scale, float* workspace,
                 void* out) {
  const ConditionalLayerView& layer = model.layers[layer_index];
  auto* sums = reinterpret_cast<typename P::Total*>(workspace + 2 * rows.slots * kChunk);
  const auto tiles = RowTiles::Of<P>(rows.count);
  const SumsOf<P> at(tiles, chunks.count);
  const std::byte* weights = layer.weight + chunks.first * ChunkBytes<P>(model.features);
  Gemm<P>(weights, chunks.count, model.features, tiles, in, model.stride * 4, sums);
  for (std::int64_t i = 0; i < chunks.count; ++i) {
    const ChunkOf chunk(model, layer, rows, chunks.first + i, workspace);
    for (Place place; place.row < rows.count; place.Next(tiles)) {
      const std::int64_t row = place.row;
      const auto activate = [&](int n) {
        Vec sum = ToFloat(P::LoadSum(sums + at(i, place, n)));
        if constexpr (P::kQuantised) sum = sum * Set(row_scale[row]);
        return chunk.Activate(sum, rows.slot[row], n);
      };
      if (layer_index == 1) {
        const Activations<P> activations(model, tiles, place, out);
        for (int n = 0; n < chunk.channels; n += kLanes) {
          activations.Set(chunk.first + n, activate(n), std::min(kLanes, chunk.channels - n));
        }
      } else {
        Vec hidden[kChunk / kLanes];
        for (int n = 0; n < chunk.channels; n += kLanes) hidden[n / kLanes] = activate(n);
        float* share =
            static_cast<float*>(out) + ((chunks.first + i) * rows.count + row) * model.classes;
        for (std::int64_t c = 0; c < model.classes; ++c) {
          const float* weight = model.output_weight + c * model.stride + chunk.first;
          share[c] = OutputSum<kOutputLanes<P>>(hidden, weight, chunk.channels);
        }
      }
    }
  }
}

// Many rows share a pass over the activations, which then come from L2 once per call.
std::int64_t ChunksPerCall(std::int64_t rows) { return rows <= 64 ? 1 : 16; }

// Scale and shift of a chunk, the accumulators, and with vector instructions those of a block.
template <typename P>
std::int64_t Workspace(std::int64_t rows, std::int64_t slots, std::int64_t chunks) {
  return 2 * slots * kChunk + SumsOf<P>(RowTiles::Of<P>(rows), chunks).size() +
         (P::kAmx ? 0 : rows * kChunk);
}

std::int64_t TilesOf(std::int64_t rows) { return RowTiles::Of<Int8>(rows).count; }

// kPart elements of each row of the tile at a time: the rows share cache lines.
void QuantiseTile(const DenoiserView& model, std::int64_t rows, std::int64_t tile, const float* in,
                  void* out, float* row_scale) {
  constexpr std::int64_t kPart = 64;
  const auto tiles = RowTiles::Of<Int8>(rows);
  const std::int64_t begin = tiles.Begin(tile);
  float inverse[Int8::kTileRows];
  for (int m = 0; m < tiles.Size(tile); ++m) {
    row_scale[begin + m] =
        QuantisationScale(in + (begin + m) * model.stride, model.features, inverse + m);
  }
  for (std::int64_t first = 0; first < model.features; first += kPart) {
    for (int m = 0; m < tiles.Size(tile); ++m) {
      const RowOf<Int8> to(model, tiles, {begin + m, tile, m}, out);
      ForQuantised(in + (begin + m) * model.stride + first, std::min(kPart, model.features - first),
                   inverse[m], [&](std::int64_t k, const std::int32_t* integers, int count) {
                     Int8::Activation bytes[kLanes];
                     for (int i = 0; i < count; ++i) {
                       bytes[i] = static_cast<Int8::Activation>(integers[i] + Int8::kOffset);
                     }
                     to.Set(first + k, bytes, count);
                   });
    }
  }
}

void SoftplusAll(const float* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const int part = static_cast<int>(std::min<std::int64_t>(kLanes, count - i));
    StorePart(out + i, Softplus(LoadPart(in + i, part)), part);
  }
}

template <typename P>
constexpr DenoiseKernels KernelsOf(Precision precision) {
  return {precision,
          ChunksPerCall,
          Workspace<P>,
          FirstLayer<P>,
          HiddenLayer<P>,
          P::kQuantised ? TilesOf : nullptr,
          P::kQuantised ? QuantiseTile : nullptr,
          ChunkBytes<P>,
          PackChunk<P>,
          SoftplusAll,
          ReadAll,
          MultiplyAddAll<P>};
}

}  // namespace

constinit const DenoiseKernelTable kDenoiseKernels = {
#if defined(DIFFMIC_SIMD_FUSED)
    {},
    {},
#else
    KernelsOf<Float32>(Precision::kFloat32), KernelsOf<BFloat16>(Precision::kBFloat16),
#endif
    KernelsOf<Int8>(Precision::kInt8)};

}  // namespace diffmic::cpu::DIFFMIC_SIMD
