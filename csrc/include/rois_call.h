// The arguments of `rois`, which the kernels of the CPU and of CUDA both take.
#ifndef DIFFMIC_INCLUDE_ROIS_CALL_H_
#define DIFFMIC_INCLUDE_ROIS_CALL_H_

#include <cstdint>

namespace diffmic::rois {

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

// cells[b, k] = (row, column) of the k-th best window of image b. 1 <= window <= map, depth >= 1.
struct ChooseCall {
  Maps saliency;
  Type type;  // not kUInt8
  Size window;
  std::int64_t count;
  std::int64_t* cells;  // compact [batch, count, 2], written
};

// The crops of `depth` planes of each image, each repeated `copies` times (one of the two is 1).
struct Cut {
  Pairs origins;  // any int64
  std::int64_t count;
  Size size;
  std::int64_t copies;
};

// crops = [batch, count, copies * depth, size.height, size.width] of the images' first `depth`
// channels. The images have a pixel if there is a crop.
struct CutCall {
  Maps images;
  Type type;
  Cut cut;
  void* crops;  // compact, written
};

}  // namespace diffmic::rois

#endif  // DIFFMIC_INCLUDE_ROIS_CALL_H_
