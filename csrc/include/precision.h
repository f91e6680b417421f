// The precisions of the two hidden matrix products of `denoise`, by the names that Python uses.
// Sums, and everything outside these products, are float32 in all of them.
#ifndef DIFFMIC_PRECISION_H_
#define DIFFMIC_PRECISION_H_

#include <cstdint>

namespace diffmic {

enum class Precision : std::uint8_t {
  kFloat32,
  kBFloat16,  // weights and activations
  kInt8,      // weights, a scale per output channel, and activations, a scale per row; int32 sums
  kFloat8,    // weights in e4m3, a scale per output channel; activations in bfloat16
};

struct PrecisionName {
  Precision precision;
  const char* name;
  bool on_cpu, on_cuda;
};

inline constexpr PrecisionName kPrecisions[] = {
    {Precision::kFloat32, "fp32", true, true},
    {Precision::kBFloat16, "bf16", true, true},
    {Precision::kInt8, "int8", true, false},
    {Precision::kFloat8, "fp8", false, true},
};

}  // namespace diffmic

#endif  // DIFFMIC_PRECISION_H_
