// The two hidden matrix products of `denoise` in each precision: a warp's multiply-accumulate over
// one stage, the layout of its activations, and the store of its sums.
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_PRODUCTS_CUH_
#define DIFFMIC_CUDA_DENOISE_DENOISE_PRODUCTS_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/ptx.cuh"
#include "cuda/denoise/denoise_layout.cuh"

namespace diffmic::cuda::denoise {

// The weights of a tile and stage as two operands of MmaBf16. `weights` is this lane's part of the
// tile's first piece.
struct BFloat16Weights {
  static constexpr int kPieces = StagePieces(Precision::kBFloat16);

  __device__ static void Read(const uint4* weights, std::uint32_t (&a)[2][4]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint4 words = weights[k * kPiece];
      a[k][0] = words.x;
      a[k][1] = words.y;
      a[k][2] = words.z;
      a[k][3] = words.w;
    }
  }
};

// Exact conversion of e4m3 to bfloat16. The sign, exponent (4 bits) and mantissa (3 bits) of an
// e4m3 number, placed in the corresponding fields of a bfloat16, are that number times 2^-120,
// since the exponent biases are 7 and 127; this holds for subnormals too. A word holds one pair in
// its even bytes and one in its odd bytes. NaN would become 480; packed weights contain none.
struct Float8Weights {
  static constexpr int kPieces = StagePieces(Precision::kFloat8);

  __device__ static void Read(const uint4* weights, std::uint32_t (&a)[2][4]) {
    const uint4 words = *weights;
    Widen(words.x, a[0][0], a[0][1]);
    Widen(words.y, a[0][2], a[0][3]);
    Widen(words.z, a[1][0], a[1][1]);
    Widen(words.w, a[1][2], a[1][3]);
  }

 private:
  __device__ static void Widen(std::uint32_t word, std::uint32_t& even, std::uint32_t& odd) {
    constexpr std::uint32_t kSigns = 0x80008000u, kNumbers = 0x07F007F0u;
    even = Times120(((word << 8) & kSigns) | ((word << 4) & kNumbers));
    odd = Times120((word & kSigns) | ((word >> 4) & kNumbers));
  }

  // Multiplies both bfloat16 of a word by 2^120.
  __device__ static std::uint32_t Times120(std::uint32_t pair) {
    constexpr std::uint32_t kFactors = 0x7B807B80u;
    const __nv_bfloat162 product = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&pair),
                                           *reinterpret_cast<const __nv_bfloat162*>(&kFactors));
    return *reinterpret_cast<const std::uint32_t*>(&product);
  }
};

// bfloat16 activations and float32 accumulation on tensor cores. The weights are the operand with
// 16 rows, so that 8 batch rows fill an instruction.
template <class Format, int kRowTiles>
struct TensorProduct {
  static constexpr int kPieces = Format::kPieces;
  static constexpr bool kReadsOthersCopies = false;  // a lane reads its own copies only
  static constexpr int kRows = kRowTiles;

  float sums[kMostPassTiles][kRowTiles][4];

  __device__ void Clear() {
#pragma unroll
    for (auto& tile : sums) {
#pragma unroll
      for (auto& rows : tile) rows[0] = rows[1] = rows[2] = rows[3] = 0.0f;
    }
  }

  // `weights` is this lane's part of the first piece; `activations` are the warp's, [row tile][512
  // bytes].
  __device__ void Multiply(const uint4* weights, const unsigned char* activations, int tiles,
                           int lane) {
    std::uint32_t a[kMostPassTiles][2][4];
#pragma unroll
    for (int i = 0; i < kMostPassTiles; ++i) {
      if (i < tiles) Format::Read(weights + i * kPieces * kPiece, a[i]);
    }
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      const uint4 words = reinterpret_cast<const uint4*>(activations + j * kActivationBytes)[lane];
      const std::uint32_t b[2][2] = {{words.x, words.y}, {words.z, words.w}};
#pragma unroll
      for (int i = 0; i < kMostPassTiles; ++i) {
        if (i >= tiles) continue;
        MmaBf16(sums[i][j], a[i][0], b[0]);
        MmaBf16(sums[i][j], a[i][1], b[1]);
      }
    }
  }

  // Stores the sums of tile i to `to`, [row tile][SumPosition][row].
  __device__ void Store(int i, float* to, int lane) const {
    const int unit = lane >> 2;
    const int row = 2 * (lane & 3);
#pragma unroll
    for (int tile = 0; tile < kMostPassTiles; ++tile) {
      if (tile != i) continue;  // constant indices keep the sums in registers
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        float* rows = to + j * kTileUnits * kTileRows + row;
        *reinterpret_cast<float2*>(rows + SumPosition(unit) * kTileRows) =
            make_float2(sums[tile][j][0], sums[tile][j][1]);
        *reinterpret_cast<float2*>(rows + SumPosition(unit + 8) * kTileRows) =
            make_float2(sums[tile][j][2], sums[tile][j][3]);
      }
    }
  }

  // Rounds the activations h of the lane's four output channels (LaneUnit) in row tile j and stores
  // them where the same lane reads its operand of the next product. A stage is two tiles deep.
  __device__ static void StoreActivations(unsigned char* activations, int tile, int j, int lane,
                                          const float (&h)[4]) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(h[0], h[1]);
    const __nv_bfloat162 high = __floats2bfloat162_rn(h[2], h[3]);
    uint2 words;
    words.x = *reinterpret_cast<const std::uint32_t*>(&low);
    words.y = *reinterpret_cast<const std::uint32_t*>(&high);
    unsigned char* stage =
        activations + (std::int64_t{tile >> 1} * kRowTiles + j) * kActivationBytes;
    reinterpret_cast<uint2*>(stage)[2 * lane + (tile & 1)] = words;
  }
};

template <int kRowTiles>
using BFloat16Product = TensorProduct<BFloat16Weights, kRowTiles>;
template <int kRowTiles>
using Float8Product = TensorProduct<Float8Weights, kRowTiles>;

// float32 on CUDA cores (FFMA). Lane 2u + half accumulates output channel u over half of a stage's
// columns, for all rows; Store adds the halves.
template <int kRowTiles>
struct Float32Product {
  static constexpr int kPieces = StagePieces(Precision::kFloat32);
  static constexpr bool kReadsOthersCopies = true;  // activations copied by the whole warp
  static constexpr int kRows = kRowTiles;

  float sums[kMostPassTiles][kRowTiles * kTileRows];

  __device__ void Clear() {
#pragma unroll
    for (auto& tile : sums) {
#pragma unroll
      for (float& sum : tile) sum = 0.0f;
    }
  }

  __device__ void Multiply(const uint4* weights, const unsigned char* activations, int tiles,
                           int lane) {
    // Activations are [column][row]. All lanes of a half read the same 16 bytes: a broadcast.
    const auto* rows = reinterpret_cast<const float4*>(activations) + (lane & 1) * 8 * 2;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      float w[kMostPassTiles][4];
#pragma unroll
      for (int i = 0; i < kMostPassTiles; ++i) {
        if (i >= tiles) continue;
        const uint4 words = weights[(i * kPieces + piece) * kPiece];
        w[i][0] = __uint_as_float(words.x);
        w[i][1] = __uint_as_float(words.y);
        w[i][2] = __uint_as_float(words.z);
        w[i][3] = __uint_as_float(words.w);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int quad = 0; quad < 2 * kRowTiles; ++quad) {
          const float4 h =
              rows[(quad / 2) * (kActivationBytes / 16) + (4 * piece + k) * 2 + quad % 2];
#pragma unroll
          for (int i = 0; i < kMostPassTiles; ++i) {
            if (i >= tiles) continue;
            float* sum = sums[i] + 4 * quad;
            sum[0] = __fmaf_rn(w[i][k], h.x, sum[0]);
            sum[1] = __fmaf_rn(w[i][k], h.y, sum[1]);
            sum[2] = __fmaf_rn(w[i][k], h.z, sum[2]);
            sum[3] = __fmaf_rn(w[i][k], h.w, sum[3]);
          }
        }
      }
    }
  }

  __device__ void Store(int i, float* to, int lane) const {
    const int half = lane & 1;
    float* rows = to + SumPosition(lane >> 1) * kTileRows + 4 * half;
#pragma unroll
    for (int tile = 0; tile < kMostPassTiles; ++tile) {
      if (tile != i) continue;  // constant indices keep the sums in registers
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        float whole[kTileRows];
#pragma unroll
        for (int row = 0; row < kTileRows; ++row) {
          const float sum = sums[tile][j * kTileRows + row];
          whole[row] = sum + __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
        }
        // Each half stores four of the rows.
        *reinterpret_cast<float4*>(rows + j * kTileUnits * kTileRows) =
            half == 0 ? make_float4(whole[0], whole[1], whole[2], whole[3])
                      : make_float4(whole[4], whole[5], whole[6], whole[7]);
      }
    }
  }

  // A stage is one tile deep.
  __device__ static void StoreActivations(unsigned char* activations, int tile, int j, int lane,
                                          const float (&h)[4]) {
    auto* stage = reinterpret_cast<float*>(activations +
                                           (std::int64_t{tile} * kRowTiles + j) * kActivationBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) stage[LaneUnit(lane, i) * kTileRows + (lane >> 2)] = h[i];
  }
};

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_PRODUCTS_CUH_
