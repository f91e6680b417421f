// Preparation of a run of `denoise`: weights in the order in which the lanes of a warp multiply
// them.
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_PACK_H_
#define DIFFMIC_CUDA_DENOISE_DENOISE_PACK_H_

#include <cuda_runtime.h>

#include "cuda/denoise/denoise.h"

namespace diffmic::cuda::denoise {

// Writes both hidden weights to `packed` (denoise_layout.cuh), and gain, bias, offset and scale of
// every unit of the three layers to `affine` [3, 16 UnitTiles]: a layer is then
//   softplus(gamma_t gain (sum scale + bias) + offset)
// where scale is 1 but for float8.
void PackWeights(const DenoiserWeights& weights, Precision precision, uint4* packed, float4* affine,
                 cudaStream_t stream);

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_PACK_H_
