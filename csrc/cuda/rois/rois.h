// Regions of interest on a GPU: the kernels behind csrc/bindings/cuda_rois.cpp, twins of
// csrc/cpu/rois/rois.h with its bits. All pointers are of the device's memory; every call returns
// once it is queued.
#ifndef DIFFMIC_CUDA_ROIS_ROIS_H_
#define DIFFMIC_CUDA_ROIS_ROIS_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace diffmic::cuda::rois {

enum class Type { kUInt8, kFloat16, kBFloat16, kFloat32, kFloat64 };

// A [batch, depth, height, width] array; strides in elements, any sign, zero included.
struct Maps {
  const void* data;
  std::int64_t batch, depth, height, width;
  std::int64_t stride[4];
};

// A [batch, count, 2] array of (row, column) pairs.
struct Pairs {
  const std::int64_t* data;
  std::int64_t stride[3];
};

struct Size {
  std::int64_t height, width;
};

// What ChooseWindows writes for CutCrops to go on with; nothing where `origins` is null.
struct Continuation {
  std::int64_t* origins;  // compact [batch, count, 2], the pixels of the cells
  Size image;
  std::int64_t depth;      // planes an image that are cut
  std::uint64_t* meeting;  // the scratch of CutCrops, whose counters are set to zero; null if none
  std::int64_t meeting_words;
};

// The crops of `depth` planes an image, each repeated `copies` times (one of the two is 1).
struct Cut {
  Pairs origins;
  std::int64_t count;
  Size size;
  std::int64_t copies;
};

// Floats of scratch memory that ChooseWindows needs; 0 where the maps fit into shared memory.
std::int64_t ChooseScratch(std::int64_t batch, Size map, Size window);

// cells[b, k] = (row, column) of the k-th best window of image b; compact [batch, count, 2]. Needs
// 1 <= window <= map and depth >= 1. An image whose saliency is not finite in float32 (or whose
// range is not) has cells, and origins, of -1: to raise for it would cost a visit of the host.
void ChooseWindows(const Maps& saliency, Type type, Size window, std::int64_t count,
                   std::int64_t* cells, const Continuation& next, float* scratch,
                   cudaStream_t stream);

// 64-bit words of scratch memory a plane that CutCrops and CutCropsBackward need, 0 if they need
// none. The first word of each plane's must be zero before.
std::int64_t CutScratch(Type type, Size image, const Cut& cut, bool backward);

// crops = compact [batch, count, copies * depth, size.height, size.width]. Images whose cells are
// -1 have crops of not-a-number (0 for uint8); `cells` may be null.
void CutCrops(const Maps& images, Type type, const Cut& cut, const std::int64_t* cells, void* crops,
              std::uint64_t* scratch, cudaStream_t stream);

// images_grad = compact [batch, channels, height, width], all of it: what crops of the first
// images.depth channels, with gradient grad [batch, count, copies * depth, size.height,
// size.width], give back. The gradient of filled pixels is shared by the pixels that attain the
// channel's minimum. Sums are of float32 (float64 for that type), in an order that the sizes alone
// decide.
void CutCropsBackward(const Maps& images, Type type, const Cut& cut, const void* grad,
                      const std::int64_t (&grad_stride)[5], std::int64_t channels,
                      void* images_grad, std::uint64_t* scratch, cudaStream_t stream);

}  // namespace diffmic::cuda::rois

#endif  // DIFFMIC_CUDA_ROIS_ROIS_H_
