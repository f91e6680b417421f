// The interface between the driver of `denoise` (denoise_chain.h) and its kernels
// (denoise_kernels.inc.h, compiled once per instruction set): the model in memory, the rows of a
// sweep, and the tables of kernels.
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_KERNEL_TABLE_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_KERNEL_TABLE_H_

#include <cstddef>
#include <cstdint>

#include "include/precision.h"

namespace diffmic::cpu {

// Output channels of a layer that one thread computes at a time (a chunk). Fixed: the output layer
// is summed chunk by chunk, and that order must depend on nothing else.
inline constexpr std::int64_t kChunk = 32;

// Elements of k that are accumulated in registers before they are added to the sum so far. A block
// of weights, kDepth elements of a panel of channels, then fills half of the L1 cache.
inline constexpr std::int64_t kDepth = 256;

// The largest F whose sums of kInt8 fit into int32: 127^2 F < 2^31.
inline constexpr std::int64_t kMostInt8Features = 133'144;

// gamma_t * (W h + b), then BatchNorm, as one scale and shift: with
//   gain = norm_weight / sqrt(running_var + eps),  offset = norm_bias - running_mean * gain
// it is  scale * (W h) + shift,  scale = gamma_t * gain,  shift = scale * b + offset.
struct ConditionalLayerView {
  const std::byte* weight;     // hidden layers: packed chunks
  const float* channel_scale;  // [F] of kInt8's hidden layers; else null
  const float* bias;           // [F]
  const float* gamma;          // [T + 1, F]
  std::int64_t gamma_stride;
  const float* gain;    // [F]
  const float* offset;  // [F]
};

struct DenoiserView {
  std::int64_t features, classes;  // F, C
  // Row stride of the weights below and of activations, in floats, a multiple of 16. Weights beyond
  // F are 0.
  std::int64_t stride;
  ConditionalLayerView layers[3];
  const float* label_weight;   // [2 C, stride]: the first layer's, transposed
  const float* output_weight;  // [C, stride]
};

// The rows of a sweep.
struct RowsView {
  std::int64_t count;
  const float* const* features;   // [count] pointers to a row's x, [F]
  const float* const* guidance;   // [count] pointers to [C]
  const float* y;                 // [count, C]
  const std::int32_t* slot;       // [count] indices into `timesteps`
  const std::int64_t* timesteps;  // [slots]
  std::int64_t slots;
};

// Consecutive chunks, which one thread computes in one call.
struct ChunkRange {
  std::int64_t first, count;
};

// The kernels of an instruction set and a precision. An array of activations has the size of
// [rows, stride] float32; its type and layout (`void`) are the kernels' own, and depend on the
// number of rows.
struct DenoiseKernels {
  Precision precision;
  // The most chunks that a call should take for a number of rows.
  std::int64_t (*chunks_per_call)(std::int64_t rows);
  // Floats of workspace per thread.
  std::int64_t (*workspace)(std::int64_t rows, std::int64_t slots, std::int64_t chunks);
  // The first layer's channels [kChunk * chunk, + kChunk): activations of the next layer, or with
  // kInt8 float32 to be quantised.
  void (*first_layer)(const DenoiserView&, const RowsView&, std::int64_t chunk, float* workspace,
                      void* out);
  // A hidden layer, 1 or 2, from the activations `in`, which with kInt8 have scales [rows]. Layer 1
  // writes activations as first_layer does; layer 2 the share of each chunk in the output layer,
  // [all chunks, rows, C] float32.
  void (*hidden_layer)(const DenoiserView&, int layer, const RowsView&, ChunkRange, const void* in,
                       const float* row_scale, float* workspace, void* out);
  // kInt8, else null: the number of tiles of rows, and the quantisation of one tile.
  std::int64_t (*tiles)(std::int64_t rows);
  void (*quantise_tile)(const DenoiserView&, std::int64_t rows, std::int64_t tile, const float* in,
                        void* out, float* row_scale);
  // Bytes of a packed chunk, and packing `channels` rows of W as one; with kInt8, their scales.
  std::int64_t (*chunk_bytes)(std::int64_t features);
  void (*pack_chunk)(const float* weight, std::int64_t stride, int channels, std::int64_t features,
                     std::byte* out, float* channel_scale);
  // softplus of `count` numbers, for tests.
  void (*softplus)(const float* in, std::int64_t count, float* out);
  // What bounds the above, for benchmarks: the sum of `count` floats, read by one of kReaders
  // (denoise_probes.h), and `count` multiply-adds of the precision. The results only keep the
  // compiler from removing the work.
  float (*read)(const float* in, std::int64_t count, int reader);
  float (*multiply_add)(std::int64_t count);
};

// By Precision. Those of portable_fused have kInt8 alone; its bits are those of all other
// instruction sets.
using DenoiseKernelTable = DenoiseKernels[3];
#define DIFFMIC_DECLARE(isa)                       \
  namespace isa {                                  \
  extern const DenoiseKernelTable kDenoiseKernels; \
  }
DIFFMIC_DECLARE(portable)
DIFFMIC_DECLARE(portable_fused)
#if defined(__x86_64__)
DIFFMIC_DECLARE(avx2)
DIFFMIC_DECLARE(avx512)
DIFFMIC_DECLARE(avx512_bf16)
DIFFMIC_DECLARE(amx)
DIFFMIC_DECLARE(amx_emulated)
#endif
#undef DIFFMIC_DECLARE

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_KERNEL_TABLE_H_
