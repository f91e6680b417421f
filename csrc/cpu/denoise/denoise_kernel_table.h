// What the driver of `denoise` (denoise.cpp) and its kernels (denoise_kernels.inc.h, compiled once
// an instruction set) share: the model's memory, the rows in work, and the table of kernels.
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_KERNEL_TABLE_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_KERNEL_TABLE_H_

#include <cstddef>
#include <cstdint>

#include "include/precision.h"

namespace diffmic::cpu {

// Outputs of a layer that one thread computes at a time. Fixed, because the last product is summed
// chunk by chunk: its order may depend on nothing else.
inline constexpr std::int64_t kChunk = 32;

// Elements of a product that are summed in registers before they are added to the sum so far. With
// the units that are computed together, a block of weights then fills half of the L1 cache.
inline constexpr std::int64_t kDepth = 256;

// The largest F whose sums of kInt8 fit into int32: 127^2 F < 2^31.
inline constexpr std::int64_t kMostInt8Features = 133'144;

// gamma_t * (W h + b), then BatchNorm, as one scale and shift: with
//   gain = norm_weight / sqrt(running_var + eps),  offset = norm_bias - running_mean * gain
// it is  scale * (W h) + shift,  scale = gamma_t * gain,  shift = scale * b + offset.
struct ConditionalLayerView {
  const std::byte* weight;  // hidden layers: packed chunks
  const float* unit_scale;  // kInt8, hidden layers: [F]; else null
  const float* bias;        // [F]
  const float* gamma;       // [T + 1, F]
  std::int64_t gamma_stride;
  const float* gain;    // [F]
  const float* offset;  // [F]
};

struct DenoiserView {
  std::int64_t features, classes;  // F, C
  // Floats of a row of weights below and of activations, a multiple of 16. Weights beyond F are 0.
  std::int64_t stride;
  ConditionalLayerView layers[3];
  const float* label_weight;   // [2 C, stride]: the first layer's, transposed
  const float* output_weight;  // [C, stride]
};

// The rows of a block.
struct RowsView {
  std::int64_t count;
  const float* const* features;   // a row's x, [F]
  const float* const* guidance;   // [C]
  const float* y;                 // [count, C]
  const std::int32_t* slot;       // which of `timesteps` a row stands at
  const std::int64_t* timesteps;  // [slots]
  std::int64_t slots;
};

// A group of chunks, which one thread computes in one call.
struct ChunkRange {
  std::int64_t first, count;
};

// Activations take the memory of [rows, stride] float32. `void`: type and order are the kernels'
// own, and depend on the number of rows.
struct DenoiseKernels {
  const char* name;
  // Preferred number of chunks per group for a number of rows.
  std::int64_t (*group)(Precision, std::int64_t rows);
  // Floats of scratch a thread needs.
  std::int64_t (*scratch)(Precision, std::int64_t rows, std::int64_t slots, std::int64_t chunks);
  // The output of the first layer in units [kChunk * chunk, + kChunk): as the second layer takes
  // it, or with kInt8 as float32.
  void (*first)(const DenoiserView&, Precision, const RowsView&, std::int64_t chunk, float* scratch,
                void* out);
  // The same of the second layer, from all outputs of the first. row_scale: kInt8.
  void (*second)(const DenoiserView&, Precision, const RowsView&, ChunkRange, const void* in,
                 const float* row_scale, float* scratch, void* out);
  // The third layer, and what each chunk adds to the last product: partial [all chunks, rows, C].
  void (*third)(const DenoiserView&, Precision, const RowsView&, ChunkRange, const void* in,
                const float* row_scale, float* scratch, float* partial);
  // kInt8: the number of tiles, and the quantisation of the rows of one tile, with their scales.
  std::int64_t (*tiles)(std::int64_t rows);
  void (*to_bytes)(const DenoiserView&, std::int64_t rows, std::int64_t tile, const float* in,
                   void* out, float* row_scale);
  // Bytes of a packed chunk, and its packing: `units` rows of W, their scales to unit_scale
  // (kInt8).
  std::int64_t (*chunk_bytes)(Precision, std::int64_t features);
  void (*pack_chunk)(Precision, const float* weight, std::int64_t stride, int units,
                     std::int64_t features, std::byte* out, float* unit_scale);
  // softplus of count numbers, for tests.
  void (*softplus)(const float* in, std::int64_t count, float* out);
  // What bounds the above, for benchmarks: the sum of `count` floats, read by one of kReaders
  // (denoise_probes.h); and `count` multiply-adds by the fastest instructions of a precision. The
  // results only keep the compiler from leaving them out.
  float (*read)(const float* in, std::int64_t count, int reader);
  float (*multiply_add)(Precision, std::int64_t count);
};

// Whether the processor and the operating system have AMX (cpu_capabilities.h: WhyNoAmx). No types
// of the standard library: their inline functions must not be compiled for an instruction set.
bool HasAmx();

// Null where this build, or this processor, does not have the set.
const DenoiseKernels* AmxDenoiseKernels();
const DenoiseKernels* Avx512Bf16DenoiseKernels();
const DenoiseKernels* Avx512DenoiseKernels();
const DenoiseKernels* Avx2DenoiseKernels();
const DenoiseKernels* PortableDenoiseKernels();

// Portable kernels for kInt8, bitwise identical to every other instruction set's. The above serve
// the other precisions.
const DenoiseKernels* PortableInt8DenoiseKernels();

// The kernels of AMX with its tile instructions emulated, bit for bit, on AVX2; selected only by
// name.
const DenoiseKernels* AmxEmulatedDenoiseKernels();

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_KERNEL_TABLE_H_
