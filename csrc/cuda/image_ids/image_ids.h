// Keys of images by content, on a GPU. The definition is diffmic_fast/reference/image_ids.py, which
// gives the same bits.
#ifndef DIFFMIC_CUDA_IMAGE_IDS_IMAGE_IDS_H_
#define DIFFMIC_CUDA_IMAGE_IDS_IMAGE_IDS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace diffmic::cuda {

// Writes the 64-bit BLAKE2b hash of each image's `pixels` floats to `keys` [images].
void HashImages(const float* data, std::int64_t images, std::int64_t pixels, std::int64_t* keys,
                cudaStream_t stream);

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_IMAGE_IDS_IMAGE_IDS_H_
