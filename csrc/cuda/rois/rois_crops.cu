// Cuts crops out of images; pixels of a crop outside its image are filled with the channel's
// minimum (docs/algorithm.md, "Regions of interest").
//
// Thread blocks (plane, part) divide the crops of a plane into pieces of 16 bytes of output. They
// first copy the pixels inside the image. If a crop exceeds the image, each block finds the minimum
// of its share of the plane. The last block to arrive at the plane's counter combines the minima
// and writes all fill, so no block waits for another, and the plane is read once for all its crops.
//
// Every crop is written once and its pixels inside the image are read once, plus one read of each
// plane whose minimum is needed. For 32 images of 224 x 224 float32 and K = 6, 2.4 MB are written
// and 0.8 MB read, or 7.2 MB with all minima: 1 to 3 us at 3.35 TB/s. Bound by memory bandwidth, or
// by the launch for small batches.
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
  std::uint64_t* workspace;  // [planes, 1 + parts]: the counter, then a key of each part
};

enum class Region { kInside, kFill };

// Writes one region of the plane's crops by `threads` threads, of which this is `thread`. In each
// iteration a thread writes kStep contiguous pixels, as one vector of 16 bytes if kStep > 1.
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
    // Of these kStep pixels, [0, filled) are fill and the others are inside the image.
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
    // Not unrolled: its 64-bit addresses would spill on some architectures.
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

// kStep is 16 bytes of pixels if crops are 16-byte aligned and their rows a multiple of 16 bytes.
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
      std::uint64_t* row = p.workspace + index * (1 + gridDim.y);
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

std::int64_t CutWorkspace(Type type, Size image, const Cut& cut, bool backward) {
  std::int64_t parts = 0;
  Dispatch<true>(
      type, [&]<typename Format>() { parts = PartsOf(image, cut, sizeof(typename Format::Bits)); });
  return parts <= 1 ? 0 : 1 + (backward ? 3 : 1) * parts;
}

void CutCrops(const CutCall& call, const std::int64_t* cells, std::uint64_t* workspace,
              cudaStream_t stream) {
  const auto& [images, type, cut, crops] = call;
  if (cut.count == 0 || cut.size.height == 0 || cut.size.width == 0) return;
  const CutProblem problem{images, LinesOf(images), cut, cells, crops, workspace};
  Dispatch<true>(type, [&]<typename Format>() { LaunchCut<Format>(problem, stream); });
}

}  // namespace diffmic::cuda::rois
