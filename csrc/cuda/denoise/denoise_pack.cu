// Preparation of a run: packs the hidden weights in the order of the fragments of the matrix
// products, and writes the record of every output channel, with BatchNorm folded into a gain and an
// offset.
//
// A thread writes 16 bytes of packed weights: 4 elements of float32, 8 rounded to bfloat16, or 16
// to float8. A warp reads 16 rows of 64 bytes or more and writes 512 contiguous bytes. The scales
// of float8 take a kernel of their own, with one warp per output channel.
//
// Bound by memory bandwidth: F = 6144 reads 302 MB (twice for float8) and writes 302, 151 or 75 MB,
// 0.14 to 0.20 ms at 3.35 TB/s, the time of a few steps. Every run packs again: to detect unchanged
// weights would need to read them as well.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/denoise/denoise_layout.cuh"

namespace diffmic::cuda::denoise {
namespace {

struct Matrix {
  const float* data;
  std::int64_t stride;
};

struct PackArguments {
  Matrix first, second;
  std::int64_t features;
  int unit_tiles, stages;
  const float* scales;  // of the channels' first product, for float8
  int stride;           // of a record
  uint4* packed;
};

constexpr float kLargestFloat8 = 448.0f;
constexpr float kLargestFloat = 3.40282347e38f;

__device__ float At(const Matrix& weight, std::int64_t features, std::int64_t unit,
                    std::int64_t column) {
  return unit < features && column < features ? weight.data[unit * weight.stride + column] : 0.0f;
}

__device__ std::uint32_t Pair(const Matrix& weight, std::int64_t features, std::int64_t unit,
                              std::int64_t column) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(At(weight, features, unit, column),
                                                    At(weight, features, unit, column + 1));
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

// Four elements divided by their scale, in float8: output channel `unit` in the even bytes, unit +
// 8 in the odd ones, the lower column in the lower half (Float8Weights, denoise_products.cuh).
__device__ std::uint32_t Quarter(const Matrix& weight, std::int64_t features, std::int64_t unit,
                                 std::int64_t column, const float (&scale)[2]) {
  std::uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float number = At(weight, features, unit + i % 2 * 8, column + i / 2);
    // A channel with a non-finite weight has a NaN scale, which alone makes its results NaN.
    const float scaled = scale[i % 2] > 0.0f ? __fdiv_rn(number, scale[i % 2]) : 0.0f;
    const std::uint32_t bits = __nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3);
    word |= bits << (8 * i);
  }
  return word;
}

template <Precision kPrecision>
__global__ void Pack(const PackArguments a) {
  constexpr int kPieces = StagePieces(kPrecision);
  const std::int64_t pieces = StageIndex(a.unit_tiles, a.stages, 2, 0, 0, 0) * kPieces;
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < pieces * kPiece;
       i += step) {
    const int lane = static_cast<int>(i % kPiece);
    std::int64_t rest = i / kPiece;
    const int piece = static_cast<int>(rest % kPieces);
    rest /= kPieces;
    const std::int64_t stage = rest % (kWarps * a.stages);  // over all warps
    rest /= kWarps * a.stages;
    const std::int64_t first_unit = rest % a.unit_tiles * kTileUnits;
    const Matrix weight = rest < a.unit_tiles ? a.first : a.second;
    uint4 words;
    if constexpr (kPrecision == Precision::kBFloat16) {
      // A fragment of MmaBf16: 16 output channels, 16 columns.
      const std::int64_t unit = first_unit + lane / 4;
      const std::int64_t column = stage * 32 + piece * 16 + 2 * (lane % 4);
      words.x = Pair(weight, a.features, unit, column);
      words.y = Pair(weight, a.features, unit + 8, column);
      words.z = Pair(weight, a.features, unit, column + 8);
      words.w = Pair(weight, a.features, unit + 8, column + 8);
    } else if constexpr (kPrecision == Precision::kFloat8) {
      // Two such fragments, 32 columns.
      const std::int64_t unit = first_unit + lane / 4;
      const std::int64_t column = stage * 32 + 2 * (lane % 4);
      const float* from = a.scales + rest / a.unit_tiles * kAffine + unit * a.stride;
      const float scale[2] = {from[0], from[8 * a.stride]};
      words.x = Quarter(weight, a.features, unit, column, scale);
      words.y = Quarter(weight, a.features, unit, column + 8, scale);
      words.z = Quarter(weight, a.features, unit, column + 16, scale);
      words.w = Quarter(weight, a.features, unit, column + 24, scale);
    } else {
      // Lane 2u + half: four of the eight columns of that half, for output channel u.
      const std::int64_t unit = first_unit + lane / 2;
      const std::int64_t column = stage * 16 + lane % 2 * 8 + piece * 4;
      words.x = __float_as_uint(At(weight, a.features, unit, column));
      words.y = __float_as_uint(At(weight, a.features, unit, column + 1));
      words.z = __float_as_uint(At(weight, a.features, unit, column + 2));
      words.w = __float_as_uint(At(weight, a.features, unit, column + 3));
    }
    a.packed[i] = words;
  }
}

// Element i of a conditional layer's part of a record.
__device__ float Affine(const ConditionalLayer& layer, int unit, int i) {
  if (i == 1) return layer.bias[unit];
  if (i == kScale) return 1.0f;
  const float gain =
      layer.norm_weight[unit] / sqrtf(layer.running_var[unit] + static_cast<float>(layer.eps));
  return i == 0 ? gain : layer.norm_bias[unit] - layer.running_mean[unit] * gain;
}

// Writes the records of the output channels (ChannelStride). One thread per element.
__global__ void PackChannels(const DenoiserWeights weights, int units, float* channels) {
  const int classes = static_cast<int>(weights.classes);
  const int stride = ChannelStride(classes);
  const std::int64_t at = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int unit = static_cast<int>(at / stride);
  if (unit >= units) return;
  const int i = static_cast<int>(at % stride);
  const int c = i - kFirstWeight;
  float value = 0.0f;
  if (unit >= weights.features) {
    value = i < kFirstWeight && i % kAffine == kScale ? 1.0f : 0.0f;
  } else if (i < kFirstWeight) {
    value = Affine(weights.layers[i / kAffine], unit, i % kAffine);
  } else if (c < 2 * classes) {
    value = weights.layers[0].weight[unit * weights.layers[0].weight_stride[0] + c];
  } else if (c < 3 * classes) {
    value = weights.output_weight[(c - 2 * classes) * weights.output_stride + unit];
  }
  channels[at] = value;
}

// The float8 scale of each output channel, amax / 448; NaN if a weight of it is not finite. One
// warp per output channel and product, after PackChannels. `scales` is that of the first channel's
// first product.
__global__ void ScaleUnits(const Matrix first, const Matrix second, std::int64_t features,
                           int units, float* scales, int stride) {
  const int i = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / 32);
  const int unit = i % units;
  if (i >= 2 * units || unit >= features) return;
  const Matrix weight = i < units ? first : second;
  float largest = 0.0f;
  bool finite = true;
  for (std::int64_t column = threadIdx.x % 32; column < features; column += 32) {
    const float number = At(weight, features, unit, column);
    finite = finite && fabsf(number) <= kLargestFloat;
    largest = fmaxf(largest, fabsf(number));
  }
  largest = WarpReduce(largest, [](float a, float b) { return fmaxf(a, b); });
  finite = __all_sync(0xFFFFFFFFu, finite) != 0;
  if (threadIdx.x % 32 != 0) return;
  const float scale = __fdiv_rn(largest, kLargestFloat8);
  scales[i / units * kAffine + unit * stride] = !finite ? nanf("") : scale > 0.0f ? scale : 1.0f;
}

}  // namespace

void PackWeights(const DenoiserWeights& weights, Precision precision, uint4* packed,
                 float* channels, cudaStream_t stream) {
  constexpr unsigned kBlock = 256;
  const Matrix first{weights.layers[1].weight, weights.layers[1].weight_stride[0]};
  const Matrix second{weights.layers[2].weight, weights.layers[2].weight_stride[0]};
  const int tiles = UnitTiles(weights.features);
  const int units = tiles * kTileUnits;
  LaunchShape shape;
  shape.block = dim3(kBlock);
  shape.stream = stream;
  const int stride = ChannelStride(static_cast<int>(weights.classes));
  const std::int64_t elements = std::int64_t{units} * stride;
  shape.grid = dim3(static_cast<unsigned>((elements + kBlock - 1) / kBlock));
  Launch("denoise", PackChannels, shape, weights, units, channels);
  float* scales = channels + kAffine + kScale;  // of layer 1
  if (precision == Precision::kFloat8) {
    shape.grid = dim3((2 * units + kBlock / 32 - 1) / (kBlock / 32));
    Launch("denoise", ScaleUnits, shape, first, second, weights.features, units, scales, stride);
  }
  const PackArguments arguments{
      first,  second, weights.features, tiles, Stages(weights.features, precision), scales,
      stride, packed};
  const std::int64_t threads =
      StageIndex(tiles, arguments.stages, 2, 0, 0, 0) * StagePieces(precision) * kPiece;
  const std::int64_t blocks = std::min<std::int64_t>((threads + kBlock - 1) / kBlock, 1 << 16);
  shape.grid = dim3(static_cast<unsigned>(blocks));
  const auto kernel = precision == Precision::kBFloat16 ? Pack<Precision::kBFloat16>
                      : precision == Precision::kFloat8 ? Pack<Precision::kFloat8>
                                                        : Pack<Precision::kFloat32>;
  Launch("denoise", kernel, shape, arguments);
}

}  // namespace diffmic::cuda::denoise
