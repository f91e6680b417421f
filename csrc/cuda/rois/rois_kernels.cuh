// What the kernels of rois share: pixels as their bits, where a crop lies in its image, and the
// meeting of the blocks of one plane.
#ifndef DIFFMIC_CUDA_ROIS_ROIS_KERNELS_CUH_
#define DIFFMIC_CUDA_ROIS_ROIS_KERNELS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "cuda/common/ptx.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/rois/rois.h"

namespace diffmic::cuda::rois {

// Kernels name the fewest blocks of a multiprocessor too: left alone, the compiler aims at more
// than their registers fit and spills.
inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr std::int64_t kMaxBlocks = std::numeric_limits<std::int32_t>::max();

// ---- numbers, as their bits --------------------------------------------------------------------

template <typename To, typename From>
__device__ __forceinline__ To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Keys have the order of their values (-0 below +0), with not-a-number, the key 0, below all.
template <typename Unsigned, Unsigned kInfinity>
__device__ __forceinline__ Unsigned FloatKey(Unsigned bits) {
  constexpr Unsigned kSign = Unsigned{1} << (8 * sizeof(Unsigned) - 1);
  if (static_cast<Unsigned>(bits & ~kSign) > kInfinity) return 0;
  return static_cast<Unsigned>(bits & kSign ? ~bits : bits | kSign);
}

// The bits of a key; the quiet not-a-number of the key 0.
template <typename Unsigned, Unsigned kNaN>
__device__ __forceinline__ Unsigned FloatOfKey(Unsigned key) {
  constexpr Unsigned kSign = Unsigned{1} << (8 * sizeof(Unsigned) - 1);
  if (key == 0) return kNaN;
  return static_cast<Unsigned>(key & kSign ? key ^ kSign : ~key);
}

struct UInt8 {
  using Bits = std::uint8_t;
  static constexpr Bits kPoison = 0;  // there is no other that would be noticed
  static __device__ Bits Key(Bits bits) { return bits; }
  static __device__ Bits OfKey(Bits key) { return key; }
};

struct Float16 {
  using Bits = std::uint16_t;
  using Number = float;  // what sums are of
  static constexpr Bits kPoison = 0x7E00;
  static __device__ Bits Key(Bits bits) { return FloatKey<Bits, 0x7C00>(bits); }
  static __device__ Bits OfKey(Bits key) { return FloatOfKey<Bits, kPoison>(key); }
  static __device__ Number Widen(Bits bits) { return __half2float(BitCast<__half>(bits)); }
  static __device__ Bits Narrow(Number value) { return BitCast<Bits>(__float2half_rn(value)); }
};

struct BFloat16 {
  using Bits = std::uint16_t;
  using Number = float;
  static constexpr Bits kPoison = 0x7FC0;
  static __device__ Bits Key(Bits bits) { return FloatKey<Bits, 0x7F80>(bits); }
  static __device__ Bits OfKey(Bits key) { return FloatOfKey<Bits, kPoison>(key); }
  static __device__ Number Widen(Bits bits) {
    return BitCast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  static __device__ Bits Narrow(Number value) { return BitCast<Bits>(__float2bfloat16_rn(value)); }
};

struct Float32 {
  using Bits = std::uint32_t;
  using Number = float;
  static constexpr Bits kPoison = 0x7FC00000;
  static __device__ Bits Key(Bits bits) { return FloatKey<Bits, 0x7F800000>(bits); }
  static __device__ Bits OfKey(Bits key) { return FloatOfKey<Bits, kPoison>(key); }
  static __device__ Number Widen(Bits bits) { return BitCast<float>(bits); }
  static __device__ Bits Narrow(Number value) { return BitCast<Bits>(value); }
};

struct Float64 {
  using Bits = std::uint64_t;
  using Number = double;
  static constexpr Bits kPoison = 0x7FF8000000000000;
  static __device__ Bits Key(Bits bits) { return FloatKey<Bits, 0x7FF0000000000000>(bits); }
  static __device__ Bits OfKey(Bits key) { return FloatOfKey<Bits, kPoison>(key); }
  static __device__ Number Widen(Bits bits) { return BitCast<double>(bits); }
  static __device__ Bits Narrow(Number value) { return BitCast<Bits>(value); }
};

template <typename Unsigned>
inline constexpr Unsigned kHighest = std::numeric_limits<Unsigned>::max();

template <typename T>
__device__ __forceinline__ T Lesser(T a, T b) {
  return b < a ? b : a;
}

// ---- crops and planes --------------------------------------------------------------------------

// The pixels [begin, begin + length) of an image side that a crop covers.
struct Span {
  std::int64_t begin, length;
};

// `origin` may be any int64: both comparisons come before the sum that they keep from overflowing.
__device__ __forceinline__ Span Covered(std::int64_t origin, std::int64_t length,
                                        std::int64_t side) {
  if (origin >= side || origin <= -length) return {0, 0};
  const std::int64_t begin = max(origin, std::int64_t{0});
  return {begin, min(origin + length, side) - begin};
}

// A crop's place: image rows and columns [top, ...), [left, ...) are its rows and columns from
// `above` and `margin` on, to its lower right; the rest of it is filled.
struct Place {
  std::int64_t top, left, above, margin;
};

__device__ __forceinline__ Place PlaceOf(const Maps& images, const Cut& cut, std::int64_t image,
                                         std::int64_t k) {
  const std::int64_t* origin =
      cut.origins.data + image * cut.origins.stride[0] + k * cut.origins.stride[1];
  const Span rows = Covered(origin[0], cut.size.height, images.height);
  const Span columns = Covered(origin[cut.origins.stride[2]], cut.size.width, images.width);
  if (rows.length == 0 || columns.length == 0) return {0, 0, cut.size.height, cut.size.width};
  return {rows.begin, columns.begin, cut.size.height - rows.length,
          cut.size.width - columns.length};
}

// Whether a crop of the image leaves it, told to all threads of the block.
__device__ inline bool AnyLeaves(const Maps& images, const Cut& cut, std::int64_t image) {
  int leaves = 0;
  for (std::int64_t k = threadIdx.x; k < cut.count; k += kThreads) {
    const Place place = PlaceOf(images, cut, image, k);
    leaves |= place.above > 0 || place.margin > 0;
  }
  return BlockReduce<kWarps>(leaves, [](int a, int b) { return a | b; }) != 0;
}

// A plane as lines along its shorter stride, so that neighbouring lanes read neighbouring pixels.
struct Lines {
  std::int64_t count, length, stride, step;
};

inline Lines LinesOf(const Maps& images) {
  const auto [height, width] = Size{images.height, images.width};
  if (std::abs(images.stride[2]) < std::abs(images.stride[3])) {
    return {width, height, images.stride[3], images.stride[2]};
  }
  return {height, width, images.stride[2], images.stride[3]};
}

// Calls visit(bits) for the pixels of this block's lines: a warp takes a line.
template <typename Bits, typename Visit>
__device__ __forceinline__ void VisitPixels(const Bits* plane, const Lines& lines, Visit visit) {
  constexpr int kVector = 16 / sizeof(Bits);
  const int lane = threadIdx.x % 32;
  const std::int64_t stride = std::int64_t{gridDim.y} * kWarps;
  for (std::int64_t i = std::int64_t{blockIdx.y} * kWarps + threadIdx.x / 32; i < lines.count;
       i += stride) {
    const Bits* line = plane + i * lines.stride;
    std::int64_t done = 0;
    if (lines.step == 1) {
      const auto start = reinterpret_cast<std::uintptr_t>(line);
      const auto head = min(static_cast<std::int64_t>(-start % 16 / sizeof(Bits)), lines.length);
      if (lane < head) visit(line[lane]);
      const std::int64_t vectors = (lines.length - head) / kVector;
      for (std::int64_t v = lane; v < vectors; v += 32) {
        const uint4 packed = reinterpret_cast<const uint4*>(line + head)[v];
        Bits bits[kVector];
        std::memcpy(bits, &packed, sizeof bits);
#pragma unroll
        for (int j = 0; j < kVector; ++j) visit(bits[j]);
      }
      done = head + vectors * kVector;
    }
    for (std::int64_t j = done + lane; j < lines.length; j += 32) visit(line[j * lines.step]);
  }
}

// Counts this block at its plane's counter, after all that it has written. True, for all threads,
// in the last of the plane's blocks, which then sees what the others wrote.
__device__ inline bool LastToArrive(std::uint64_t* row) {
  __shared__ bool last;
  __syncthreads();  // all of the block have written
  if (threadIdx.x == 0) {
    auto* counter = reinterpret_cast<std::uint32_t*>(row);
    last = AddRelease(counter, 1) == gridDim.y - 1;
    if (last) LoadAcquire(counter);
  }
  __syncthreads();
  return last;
}

// ---- launches ----------------------------------------------------------------------------------

// Blocks a plane: 32 KiB of work each, and at most 64, whose results one thread folds.
inline unsigned Parts(std::int64_t elements, std::int64_t element_bytes) {
  constexpr std::int64_t kPartBytes = 32 * 1024;
  constexpr std::int64_t kMaxParts = 64;
  const std::int64_t most = kMaxParts * kPartBytes / element_bytes;
  return static_cast<unsigned>((std::min(elements, most) * element_bytes + kPartBytes - 1) /
                               kPartBytes);
}

inline unsigned PartsOf(Size image, const Cut& cut, std::int64_t element_bytes) {
  return Parts(std::max(image.height * image.width,
                        cut.count * cut.copies * cut.size.height * cut.size.width),
               element_bytes);
}

inline dim3 Grid(std::int64_t planes, unsigned parts) {
  return dim3(static_cast<unsigned>(std::min(planes, kMaxBlocks)), parts);
}

}  // namespace diffmic::cuda::rois

#endif  // DIFFMIC_CUDA_ROIS_ROIS_KERNELS_CUH_
