// What the driver of `denoise` (denoise.cpp) and its kernels (denoise_kernels.inc.h, compiled once
// an instruction set) share: the model's memory, the rows in work, and the table of kernels.
#ifndef DIFFMIC_CPU_DENOISE_KERNELS_H_
#define DIFFMIC_CPU_DENOISE_KERNELS_H_

#include <cstdint>

namespace diffmic::cpu {

// Outputs of a layer that one thread computes at a time. Fixed, because the last product is summed
// chunk by chunk: its order may depend on nothing else.
inline constexpr std::int64_t kChunk = 32;

// Elements of a product that are summed in registers before they are added to the sum so far.
inline constexpr std::int64_t kDepth = 1024;

enum class Precision { kFloat32, kBFloat16 };

// gamma_t * (W h + b), then BatchNorm, as one scale and shift: with
//   gain = norm_weight / sqrt(running_var + eps),  offset = norm_bias - running_mean * gain
// it is  scale * (W h) + shift,  scale = gamma_t * gain,  shift = scale * b + offset.
struct ConditionalLayerView {
  const void* weight;          // hidden layers: [F, F] rows of the precision's type; first: unused
  std::int64_t weight_stride;  // elements
  const float* bias;           // [F]
  const float* gamma;          // [T + 1, F]
  std::int64_t gamma_stride;
  const float* gain;    // [F]
  const float* offset;  // [F]
};

struct DenoiserView {
  std::int64_t features, classes;  // F, C
  // Floats from one row of activations to the next. Beyond F they are 0 up to a multiple of 32.
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

// Floats of scratch a thread needs.
inline std::int64_t ScratchFloats(std::int64_t rows, std::int64_t slots) {
  return kChunk * (rows + 2 * slots);
}

struct DenoiseKernels {
  const char* name;
  // Activations [rows, stride] of units [kChunk * chunk, + kChunk) behind the first layer.
  void (*first)(const DenoiserView&, Precision, const RowsView&, std::int64_t chunk, float* scratch,
                float* out);
  // The same behind the second one, from all activations behind the first.
  void (*second)(const DenoiserView&, Precision, const RowsView&, std::int64_t chunk,
                 const float* in, float* scratch, float* out);
  // The third layer and what its chunk adds to the last product: partial [rows, C].
  void (*third)(const DenoiserView&, Precision, const RowsView&, std::int64_t chunk,
                const float* in, float* scratch, float* partial);
  // count float32 to bfloat16, to nearest even.
  void (*round)(const float* in, std::int64_t count, std::uint16_t* out);
  // softplus of count numbers, for tests.
  void (*softplus)(const float* in, std::int64_t count, float* out);
  // What bounds the above, for benchmarks: the sum of `count` floats, read in four streams; and
  // `count` multiply-adds in registers. The results only keep the compiler from leaving them out.
  float (*read)(const float* in, std::int64_t count);
  float (*multiply_add)(std::int64_t count);
};

// Null where this build, or this processor, does not have the set.
const DenoiseKernels* Avx512DenoiseKernels();
const DenoiseKernels* Avx2DenoiseKernels();
const DenoiseKernels* PortableDenoiseKernels();

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_DENOISE_KERNELS_H_
