// Regions of interest on the CPU: where the saliency is highest, and the crops cut there.
// The definition is diffmic_fast/reference/rois.py; these give its bits.
#ifndef DIFFMIC_CPU_ROIS_ROIS_H_
#define DIFFMIC_CPU_ROIS_ROIS_H_

#include <cstdint>

namespace diffmic::cpu {

enum class SaliencyType { kFloat16, kBFloat16, kFloat32, kFloat64 };
enum class PixelType { kUInt8, kFloat16, kBFloat16, kFloat32, kFloat64 };

// A [batch, depth, height, width] array; strides in elements, any sign, zero included.
struct Maps {
  const void* data;
  std::int64_t batch, depth, height, width;
  std::int64_t stride[4];
};

// An [outer, inner, 2] array of (row, column) pairs.
struct Pairs {
  const std::int64_t* data;
  std::int64_t stride[3];
};

struct Size {
  std::int64_t height, width;
};

// cells[b, k] = (row, column) of the k-th best window of image b; compact [batch, count, 2].
// Needs 1 <= window <= map and depth >= 1. Returns the first image whose saliency is not finite in
// float32 (or whose range is not), -1 if there is none; nothing is promised about cells otherwise.
std::int64_t ChooseWindows(const Maps& saliency, SaliencyType type, Size window, std::int64_t count,
                           std::int64_t* cells, int threads);

// origins[i] = (round(i / grid.height * image.height), the same of columns) of `count` cells,
// halves to even, in double; both compact [count, 2].
void CellsToPixels(const std::int64_t* cells, std::int64_t count, Size grid, Size image,
                   std::int64_t* origins);

// crops = compact [batch, count, copies * depth, size.height, size.width]. The channels cut are the
// `images.depth` given; each plane is repeated `copies` times (one of the two is 1).
// Needs an image of one pixel at least where there is a crop. Origins may be any int64.
void CutCrops(const Maps& images, PixelType type, const Pairs& origins, std::int64_t count,
              Size size, std::int64_t copies, void* crops, int threads);

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_ROIS_ROIS_H_
