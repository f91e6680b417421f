// CutCropsKernel. Blocks (plane, part) share a plane's crops by 16-byte pieces of the output. They
// first copy what lies inside the image. Where a crop leaves it, each block takes the minimum of
// its share of the plane's rows, and the last one to arrive at the plane's counter folds these and
// writes all fills: nobody waits, and the plane is read once however many crops need its minimum.
//   Bytes: every crop is written once and the pixels inside are read once, plus one read of a plane
//   whose minimum is needed: 32 images of 224 x 224 float32 with K = 6 write 2.4 MB and read 0.8
//   MB, or 6.4 MB more with all their minima: 1 to 3 us at 3.35 TB/s. Bound by memory, by the
//   launch for small batches.
#include "cuda/common/launch.cuh"
#include "cuda/rois/rois_kernels.cuh"

namespace diffmic::cuda::rois {
namespace {

struct CutProblem {
  Maps images;
  Lines lines;
  Cut cut;
  const std::int64_t* cells;
  void* crops;
  std::uint64_t* scratch;  // rows of 1 + parts words: counter, keys
};

enum class Region { kInside, kFill };

// Writes one region of the plane's crops, `kStep` neighbouring pixels a thread and turn; pixels of
// 16 bytes together, where `kStep` says so. Turns are dealt to `threads` threads, this is `thread`.
template <typename Bits, int kStep, Region kRegion>
__device__ __forceinline__ void WriteCrops(const CutProblem& p, const Bits* plane,
                                           std::int64_t image, Bits* crops, bool poisoned,
                                           Bits fill, std::int64_t thread, std::int64_t threads) {
  const Cut& cut = p.cut;
  const std::int64_t per_row = cut.size.width / kStep;
  const std::int64_t per_crop = cut.size.height * per_row;
  const std::int64_t area = cut.size.height * cut.size.width;
  for (std::int64_t turn = thread; turn < cut.count * per_crop; turn += threads) {
    const std::int64_t k = turn / per_crop;
    const std::int64_t row = turn % per_crop / per_row;
    const std::int64_t column = turn % per_row * kStep;
    const Place place =
        poisoned ? Place{0, 0, cut.size.height, cut.size.width} : PlaceOf(p.images, cut, image, k);
    // Pixels [0, filled) of these are fill, the others inside.
    const std::int64_t filled =
        row < place.above ? kStep
                          : min(max(place.margin - column, std::int64_t{0}), std::int64_t{kStep});
    if (kRegion == Region::kInside ? filled == kStep : filled == 0) continue;

    Bits bits[kStep];
    if constexpr (kRegion == Region::kFill) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) bits[i] = fill;
    } else {
      const std::int64_t step = p.images.stride[3];
      const Bits* source = plane + (place.top + row - place.above) * p.images.stride[2] +
                           (place.left + column - place.margin) * step;
      if (kStep > 1 && step == 1 && filled == 0 &&
          reinterpret_cast<std::uintptr_t>(source) % 16 == 0) {
        const uint4 packed = *reinterpret_cast<const uint4*>(source);
        std::memcpy(bits, &packed, sizeof bits);
      } else {
#pragma unroll
        for (int i = 0; i < kStep; ++i) bits[i] = i < filled ? Bits{0} : source[i * step];
      }
    }

    Bits* crop = crops + k * p.images.depth * cut.copies * area + row * cut.size.width + column;
    const bool whole = kRegion == Region::kInside ? filled == 0 : filled == kStep;
    // Unrolled, its 64-bit addresses would be spilled on some architectures.
#pragma unroll 1
    for (std::int64_t copy = 0; copy < cut.copies; ++copy, crop += area) {
      if (kStep > 1 && whole) {
        uint4 packed;
        std::memcpy(&packed, bits, sizeof packed);
        *reinterpret_cast<uint4*>(crop) = packed;
      } else {
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          if ((i < filled) == (kRegion == Region::kFill)) crop[i] = bits[i];
        }
      }
    }
  }
}

// kStep is 16 bytes where every piece of 16 lies in one row of a crop, at a multiple of 16.
template <typename Format, int kStep>
__global__ void __launch_bounds__(kThreads, 3) CutCropsKernel(CutProblem p) {
  using Bits = typename Format::Bits;
  const std::int64_t area = p.cut.size.height * p.cut.size.width;
  const std::int64_t thread = std::int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t{gridDim.y} * kThreads;
  for (std::int64_t index = blockIdx.x; index < p.images.batch * p.images.depth;
       index += gridDim.x) {
    const std::int64_t image = index / p.images.depth;
    const std::int64_t channel = index % p.images.depth;
    const Bits* plane = static_cast<const Bits*>(p.images.data) + image * p.images.stride[0] +
                        channel * p.images.stride[1];
    Bits* crops = static_cast<Bits*>(p.crops) +
                  (image * p.cut.count * p.images.depth + channel) * p.cut.copies * area;
    if (p.cells != nullptr && p.cells[image * p.cut.count * 2] < 0) {
      WriteCrops<Bits, kStep, Region::kFill>(p, plane, image, crops, true, Format::kPoison, thread,
                                             threads);
      continue;
    }
    WriteCrops<Bits, kStep, Region::kInside>(p, plane, image, crops, false, Bits{0}, thread,
                                             threads);
    if (!AnyLeaves(p.images, p.cut, image)) continue;

    Bits key = kHighest<Bits>;
    VisitPixels(plane, p.lines, [&](Bits bits) { key = Lesser(key, Format::Key(bits)); });
    key = BlockReduce<kWarps>(key, Lesser<Bits>);
    if (gridDim.y > 1) {
      std::uint64_t* row = p.scratch + index * (1 + gridDim.y);
      if (threadIdx.x == 0) row[1 + blockIdx.y] = key;
      if (!LastToArrive(row)) continue;
      for (unsigned part = 0; part < gridDim.y; ++part) {
        key = Lesser(key, static_cast<Bits>(row[1 + part]));
      }
    }
    WriteCrops<Bits, kStep, Region::kFill>(p, plane, image, crops, false, Format::OfKey(key),
                                           threadIdx.x, kThreads);
  }
}

std::int64_t BytesOf(Type type) {
  switch (type) {
    case Type::kUInt8:
      return 1;
    case Type::kFloat16:
    case Type::kBFloat16:
      return 2;
    case Type::kFloat32:
      return 4;
    case Type::kFloat64:
      return 8;
  }
  return 0;
}

template <typename Format>
void LaunchCut(const CutProblem& problem, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Format::Bits);
  constexpr int kVector = 16 / kBytes;
  const Maps& images = problem.images;
  const LaunchShape shape{Grid(images.batch * images.depth,
                               PartsOf({images.height, images.width}, problem.cut, kBytes)),
                          dim3(kThreads), 0, stream};
  if (problem.cut.size.width % kVector == 0 &&
      reinterpret_cast<std::uintptr_t>(problem.crops) % 16 == 0) {
    Launch("rois.cut_crops", CutCropsKernel<Format, kVector>, shape, problem);
  } else {
    Launch("rois.cut_crops", CutCropsKernel<Format, 1>, shape, problem);
  }
}

}  // namespace

std::int64_t CutScratch(Type type, Size image, const Cut& cut, bool backward) {
  const std::int64_t parts = PartsOf(image, cut, BytesOf(type));
  return parts <= 1 ? 0 : 1 + (backward ? 3 : 1) * parts;
}

void CutCrops(const Maps& images, Type type, const Cut& cut, const std::int64_t* cells, void* crops,
              std::uint64_t* scratch, cudaStream_t stream) {
  if (cut.count == 0 || cut.size.height == 0 || cut.size.width == 0) return;
  const CutProblem problem{images, LinesOf(images), cut, cells, crops, scratch};
  switch (type) {
    case Type::kUInt8:
      return LaunchCut<UInt8>(problem, stream);
    case Type::kFloat16:
      return LaunchCut<Float16>(problem, stream);
    case Type::kBFloat16:
      return LaunchCut<BFloat16>(problem, stream);
    case Type::kFloat32:
      return LaunchCut<Float32>(problem, stream);
    case Type::kFloat64:
      return LaunchCut<Float64>(problem, stream);
  }
}

}  // namespace diffmic::cuda::rois
