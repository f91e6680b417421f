// Packing: a thread makes 16 bytes of a packed weight, from 8 numbers rounded to bfloat16 or 4 of
// float32. A warp reads 16 rows of 64 bytes and writes 512 bytes in a row. Bound by memory: F =
// 6144 reads 302 MB and writes 151 or 302 MB, 0.14 to 0.18 ms at 3.35 TB/s, the time of three
// steps. It is done for every run, since nothing short of reading the weights could tell that they
// are unchanged.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/denoise_layout.h"
#include "cuda/denoise_pack.h"
#include "cuda/launch.h"

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
  uint4* packed;
};

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

template <Precision kPrecision>
__global__ void Pack(const PackArguments a) {
  const std::int64_t pieces = PieceIndex(a.unit_tiles, a.stages, 2, 0, 0, 0);
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < pieces * kPiece;
       i += step) {
    const int lane = static_cast<int>(i % kPiece);
    std::int64_t rest = i / kPiece;
    const int piece = static_cast<int>(rest % kStagePieces);
    rest /= kStagePieces;
    const std::int64_t stage = rest % (kWarps * a.stages);  // of all warps
    rest /= kWarps * a.stages;
    const std::int64_t first_unit = rest % a.unit_tiles * kTileUnits;
    const Matrix weight = rest < a.unit_tiles ? a.first : a.second;
    uint4 words;
    if constexpr (kPrecision == Precision::kBFloat16) {
      // The fragment of MmaBf16: 16 units, 16 columns.
      const std::int64_t unit = first_unit + lane / 4;
      const std::int64_t column = stage * 32 + piece * 16 + 2 * (lane % 4);
      words.x = Pair(weight, a.features, unit, column);
      words.y = Pair(weight, a.features, unit + 8, column);
      words.z = Pair(weight, a.features, unit, column + 8);
      words.w = Pair(weight, a.features, unit + 8, column + 8);
    } else {
      // Lane 2u + half: four of the eight columns that the half owns, of unit u.
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

__global__ void FoldNorm(const Weights weights, int units, float4* affine) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= 3 * units) return;
  const Layer& layer = weights.layers[i / units];
  const int unit = i % units;
  float4 found = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (unit < weights.features) {
    found.x = layer.norm_weight[unit] / sqrtf(layer.running_var[unit] + layer.eps);
    found.y = layer.bias[unit];
    found.z = layer.norm_bias[unit] - layer.running_mean[unit] * found.x;
  }
  affine[i] = found;
}

}  // namespace

void PackWeights(const Weights& weights, Precision precision, uint4* packed, float4* affine,
                 cudaStream_t stream) {
  constexpr unsigned kBlock = 256;
  PackArguments arguments{};
  arguments.first = {weights.layers[1].weight, weights.layers[1].weight_stride};
  arguments.second = {weights.layers[2].weight, weights.layers[2].weight_stride};
  arguments.features = weights.features;
  arguments.unit_tiles = UnitTiles(weights.features);
  arguments.stages = Stages(weights.features, precision);
  arguments.packed = packed;
  const std::int64_t threads =
      PieceIndex(arguments.unit_tiles, arguments.stages, 2, 0, 0, 0) * kPiece;
  const auto blocks =
      static_cast<unsigned>(std::min<std::int64_t>((threads + kBlock - 1) / kBlock, 1 << 16));
  const auto kernel =
      precision == Precision::kBFloat16 ? Pack<Precision::kBFloat16> : Pack<Precision::kFloat32>;
  LaunchShape shape;
  shape.grid = dim3(blocks);
  shape.block = dim3(kBlock);
  shape.stream = stream;
  Launch("denoise", kernel, shape, arguments);
  const int units = arguments.unit_tiles * kTileUnits;
  shape.grid = dim3((3 * units + kBlock - 1) / kBlock);
  Launch("denoise", FoldNorm, shape, weights, units, affine);
}

}  // namespace diffmic::cuda::denoise
