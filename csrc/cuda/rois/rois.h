// Regions of interest on a GPU, with the bits of csrc/cpu/rois/rois.h. All pointers are to device
// memory; every call returns once it is queued.
#ifndef DIFFMIC_CUDA_ROIS_ROIS_H_
#define DIFFMIC_CUDA_ROIS_ROIS_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "include/rois_call.h"

namespace diffmic::cuda::rois {

using namespace diffmic::rois;

// What ChooseWindows also writes for a CutCrops that follows it; nothing if `origins` is NULL.
struct Continuation {
  std::int64_t* origins;  // compact [batch, count, 2], the pixels of the cells
  Size image;
  std::int64_t depth;      // planes per image that are cut
  std::uint64_t* meeting;  // the workspace of CutCrops, whose counters are set to 0; NULL if none
  std::int64_t meeting_words;
};

// Floats of workspace for ChooseWindows; 0 if the maps fit into shared memory.
std::int64_t ChooseWorkspace(std::int64_t batch, Size map, Size window);

// An image whose saliency is not finite in float32 (or whose range is not) gets cells, and origins,
// of -1: raising for it would need a synchronisation with the host.
void ChooseWindows(const ChooseCall& call, const Continuation& next, float* workspace,
                   cudaStream_t stream);

// 64-bit words of workspace per plane for CutCrops and CutCropsBackward, 0 if they need none. The
// first word of each plane's must be 0 before the call.
std::int64_t CutWorkspace(Type type, Size image, const Cut& cut, bool backward);

// Images whose cells are -1 get crops of NaN (0 for uint8); `cells` may be NULL.
void CutCrops(const CutCall& call, const std::int64_t* cells, std::uint64_t* workspace,
              cudaStream_t stream);

// The gradient of the images, given that of the crops, for the images and the cut of a CutCall. The
// gradient of filled pixels is shared by the pixels that attain the channel's minimum. Sums are in
// float32 (float64 for that type), in an order that depends on the sizes alone.
struct CutBackwardCall {
  Maps images;
  Type type;
  Cut cut;
  const void* grad;  // [batch, count, copies * depth, size.height, size.width]
  std::int64_t grad_stride[5];
  std::int64_t channels;
  void* images_grad;  // compact [batch, channels, height, width], written
};

void CutCropsBackward(const CutBackwardCall& call, std::uint64_t* workspace, cudaStream_t stream);

}  // namespace diffmic::cuda::rois

#endif  // DIFFMIC_CUDA_ROIS_ROIS_H_
