// Shared by the kernels of rois: pixel formats, the placement of a crop in its image, and the
// synchronisation of the thread blocks of a plane (one channel of one image).
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

// __launch_bounds__ of these kernels also sets the minimum blocks per multiprocessor: without it
// nvcc aims at a higher occupancy and spills registers.
inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr std::int64_t kMaxBlocks = std::numeric_limits<std::int32_t>::max();

// ---- pixel formats -----------------------------------------------------------------------------

template <typename To, typename From>
__device__ __forceinline__ To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// An unsigned key that orders as its floating-point value does, -0 below +0. The key of NaN is 0,
// below all others.
template <typename Unsigned, Unsigned kInfinity>
__device__ __forceinline__ Unsigned FloatKey(Unsigned bits) {
  constexpr Unsigned kSign = Unsigned{1} << (8 * sizeof(Unsigned) - 1);
  if (static_cast<Unsigned>(bits & ~kSign) > kInfinity) return 0;
  return static_cast<Unsigned>(bits & kSign ? ~bits : bits | kSign);
}

// The inverse of FloatKey; a quiet NaN for key 0.
template <typename Unsigned, Unsigned kNaN>
__device__ __forceinline__ Unsigned FloatOfKey(Unsigned key) {
  constexpr Unsigned kSign = Unsigned{1} << (8 * sizeof(Unsigned) - 1);
  if (key == 0) return kNaN;
  return static_cast<Unsigned>(key & kSign ? key ^ kSign : ~key);
}

struct UInt8 {
  using Bits = std::uint8_t;
  static constexpr Bits kPoison = 0;  // the type has no NaN
  static __device__ Bits Key(Bits bits) { return bits; }
  static __device__ Bits OfKey(Bits key) { return key; }
};

struct Float16 {
  using Bits = std::uint16_t;
  using Number = float;  // the type of sums
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

// Calls launch.template operator()<Format>() for the floating-point format of `type`, and for UInt8
// if kIntegers.
template <bool kIntegers, typename Launcher>
void Dispatch(Type type, Launcher launch) {
  switch (type) {
    case Type::kUInt8:
      if constexpr (kIntegers) launch.template operator()<UInt8>();
      return;
    case Type::kFloat16:
      return launch.template operator()<Float16>();
    case Type::kBFloat16:
      return launch.template operator()<BFloat16>();
    case Type::kFloat32:
      return launch.template operator()<Float32>();
    case Type::kFloat64:
      return launch.template operator()<Float64>();
  }
}

// ---- crops and planes --------------------------------------------------------------------------

// The pixels [begin, begin + length) that a crop covers along one axis of its image.
struct Span {
  std::int64_t begin, length;
};

// `origin` may be any int64: the comparisons ensure that the sum below does not overflow.
__device__ __forceinline__ Span Covered(std::int64_t origin, std::int64_t length,
                                        std::int64_t side) {
  if (origin >= side || origin <= -length) return {0, 0};
  const std::int64_t begin = max(origin, std::int64_t{0});
  return {begin, min(origin + length, side) - begin};
}

// Crop row `above` and column `margin` are image row `top` and column `left`. Pixels above or to
// the left of them are fill.
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

// Whether any crop of the image exceeds its borders. Called by all threads of the block.
__device__ inline bool AnyLeaves(const Maps& images, const Cut& cut, std::int64_t image) {
  int leaves = 0;
  for (std::int64_t k = threadIdx.x; k < cut.count; k += kThreads) {
    const Place place = PlaceOf(images, cut, image, k);
    leaves |= place.above > 0 || place.margin > 0;
  }
  return BlockReduce<kWarps>(leaves, [](int a, int b) { return a | b; }) != 0;
}

// A plane as lines along the axis of the smaller stride, so that reads coalesce.
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

// Calls visit(bits) for each pixel of this block's lines; a warp processes one line at a time.
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

// Increments the plane's counter with release semantics. Returns true, to all threads, in the last
// block of the plane to arrive; the writes of the other blocks are then visible to it (acquire).
__device__ inline bool LastToArrive(std::uint64_t* row) {
  __shared__ bool last;
  __syncthreads();  // all threads of the block have written
  if (threadIdx.x == 0) {
    auto* counter = reinterpret_cast<std::uint32_t*>(row);
    last = AddRelease(counter, 1) == gridDim.y - 1;
    if (last) LoadAcquire(counter);
  }
  __syncthreads();
  return last;
}

// ---- launches ----------------------------------------------------------------------------------

// Blocks of a plane: one per 32 KiB, at most 64, whose results one thread combines.
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
