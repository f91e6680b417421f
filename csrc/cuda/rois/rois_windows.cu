// Greedy choice of saliency windows (docs/algorithm.md, "Regions of interest").
//
// A thread block processes one image. Each of its eight warps loads one class of the saliency as
// float32 into shared memory and finds its range; then the block adds the normalised classes to the
// map in class order, one thread per cell. A thread owns every 256th window and stores its mean,
// summed in row-major order. After each choice it recomputes the windows that overlap the chosen
// one. There are two barriers per choice.
//
// The saliency is read once, and 16 bytes are written per chosen cell. Maps of 7 x 7 cells are
// bound by latency: the launch and about twenty barriers. Maps above 96 KiB use the workspace.
#include <algorithm>
#include <limits>

#include "cuda/common/launch.cuh"
#include "cuda/rois/rois_kernels.cuh"

namespace diffmic::cuda::rois {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Minimum and maximum that propagate NaN.
__device__ __forceinline__ float Lower(float a, float b) { return b < a || b != b ? b : a; }
__device__ __forceinline__ float Higher(float a, float b) { return b > a || b != b ? b : a; }

struct Choice {
  Maps saliency;
  Size window;
  std::int64_t count;
  std::int64_t* cells;
  Continuation next;
  float* workspace;  // the maps of each block if they do not fit in shared memory
};

// The row pitch of the map, in floats: padded to the windows per row modulo the 32 banks, so that
// consecutive windows start in consecutive banks across rows too.
__host__ __device__ inline std::int64_t Pitch(Size map, Size window) {
  return map.width + (32 - (window.width - 1) % 32) % 32;
}

// Floats of the map, kWarps staged classes, and the means of all windows.
__host__ __device__ inline std::int64_t ChoiceFloats(Size map, Size window) {
  return map.height * (Pitch(map, window) + kWarps * map.width) +
         (map.height - window.height + 1) * (map.width - window.width + 1);
}

__device__ __forceinline__ std::int64_t ToPixel(std::int64_t cell, std::int64_t cells,
                                                std::int64_t pixels) {
  return static_cast<std::int64_t>(
      rint(static_cast<double>(cell) / static_cast<double>(cells) * static_cast<double>(pixels)));
}

__device__ void WriteCell(const Choice& p, std::int64_t image, std::int64_t k, std::int64_t row,
                          std::int64_t column) {
  const std::int64_t at = 2 * (image * p.count + k);
  p.cells[at] = row;
  p.cells[at + 1] = column;
  if (p.next.origins == nullptr) return;
  p.next.origins[at] = row < 0 ? -1 : ToPixel(row, p.saliency.height, p.next.image.height);
  p.next.origins[at + 1] = column < 0 ? -1 : ToPixel(column, p.saliency.width, p.next.image.width);
}

// Adds all classes of an image to `map`. Returns false, to all threads, if the range of a class is
// not finite.
template <typename Format>
__device__ bool AddClasses(const Choice& p, std::int64_t image, float* map, float* staged) {
  __shared__ float lows[kWarps];
  __shared__ float extents[kWarps];
  const auto* planes =
      static_cast<const typename Format::Bits*>(p.saliency.data) + image * p.saliency.stride[0];
  const std::int64_t cells = p.saliency.height * p.saliency.width;
  const std::int64_t pitch = Pitch({p.saliency.height, p.saliency.width}, p.window);
  const int warp = threadIdx.x / 32;
  bool finite = true;
  for (std::int64_t base = 0; base < p.saliency.depth; base += kWarps) {
    if (base + warp < p.saliency.depth) {
      const auto* plane = planes + (base + warp) * p.saliency.stride[1];
      float low = kInfinity;
      float high = -kInfinity;
      for (std::int64_t cell = threadIdx.x % 32; cell < cells; cell += 32) {
        const auto value = static_cast<float>(
            Format::Widen(plane[cell / p.saliency.width * p.saliency.stride[2] +
                                cell % p.saliency.width * p.saliency.stride[3]]));
        low = Lower(low, value);
        high = Higher(high, value);
        staged[warp * cells + cell] = value;
      }
      low = WarpReduce(low, Lower);
      high = WarpReduce(high, Higher);
      if (threadIdx.x % 32 == 0) {
        lows[warp] = low;
        extents[warp] = high - low;
      }
    }
    __syncthreads();
    const auto classes = static_cast<int>(min(p.saliency.depth - base, std::int64_t{kWarps}));
    for (int c = 0; c < classes; ++c) {
      finite = finite && fabsf(extents[c]) < kInfinity;
    }
    // Iterates over the padding too, so that a warp's accesses to the map have no bank conflicts.
    for (std::int64_t i = threadIdx.x; i < p.saliency.height * pitch; i += kThreads) {
      if (i % pitch >= p.saliency.width) continue;
      const std::int64_t cell = i / pitch * p.saliency.width + i % pitch;
      float total = base == 0 ? 0.0f : map[i];
      for (int c = 0; c < classes; ++c) {
        // A class of constant saliency contributes nothing.
        if (extents[c] > 0) total += (staged[c * cells + cell] - lows[c]) / extents[c];
      }
      map[i] = total;
    }
    __syncthreads();  // the staged classes may be overwritten
  }
  return finite;
}

struct Window {
  float mean;
  std::int64_t index;
};

// The window of the larger mean; of equal means, the first in row-major order.
__device__ __forceinline__ Window Better(Window a, Window b) {
  return b.mean > a.mean || (b.mean == a.mean && b.index < a.index) ? b : a;
}

__device__ void ChooseGreedily(const Choice& p, std::int64_t image, float* map, float* means) {
  __shared__ float best_mean[kWarps];
  __shared__ std::int64_t best_index[kWarps];
  const std::int64_t pitch = Pitch({p.saliency.height, p.saliency.width}, p.window);
  const std::int64_t columns = p.saliency.width - p.window.width + 1;
  const std::int64_t windows = (p.saliency.height - p.window.height + 1) * columns;
  const std::int64_t area = p.window.height * p.window.width;
  std::int64_t chosen_row = 0;
  std::int64_t chosen_column = 0;
  for (std::int64_t k = 0; k < p.count; ++k) {
    Window best{-1.0f, windows};  // below every mean, since the map is not negative
    for (std::int64_t index = threadIdx.x; index < windows; index += kThreads) {
      const std::int64_t row = index / columns;
      const std::int64_t column = index % columns;
      const bool overlaps =
          row < chosen_row + p.window.height && chosen_row < row + p.window.height &&
          column < chosen_column + p.window.width && chosen_column < column + p.window.width;
      if (k == 0 || overlaps) {
        float total = 0;
        for (std::int64_t i = 0; i < p.window.height; ++i) {
          for (std::int64_t j = 0; j < p.window.width; ++j) {
            total += map[(row + i) * pitch + column + j];
          }
        }
        means[index] = total / static_cast<float>(area);
      }
      best = Better(best, {means[index], index});
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      best = Better(best, {__shfl_xor_sync(0xFFFFFFFF, best.mean, offset),
                           __shfl_xor_sync(0xFFFFFFFF, best.index, offset)});
    }
    if (threadIdx.x % 32 == 0) {
      best_mean[threadIdx.x / 32] = best.mean;
      best_index[threadIdx.x / 32] = best.index;
    }
    __syncthreads();  // every warp has written its best window and has read the map
    for (int warp = 0; warp < kWarps; ++warp) {
      best = Better(best, {best_mean[warp], best_index[warp]});
    }
    chosen_row = best.index / columns;
    chosen_column = best.index % columns;
    if (threadIdx.x == 0) WriteCell(p, image, k, chosen_row, chosen_column);
    for (std::int64_t i = threadIdx.x; i < area; i += kThreads) {
      map[(chosen_row + i / p.window.width) * pitch + chosen_column + i % p.window.width] = 0;
    }
    __syncthreads();  // the chosen window is cleared, and the best windows may be overwritten
  }
}

// kShared: the maps are in shared memory. A template parameter, so that the compiler emits LDS
// instead of generic loads.
template <typename Format, bool kShared>
__global__ void __launch_bounds__(kThreads, 4) ChooseKernel(Choice p) {
  const Size size{p.saliency.height, p.saliency.width};
  const std::int64_t cells = size.height * size.width;
  float* map;
  if constexpr (kShared) {
    map = reinterpret_cast<float*>(dynamic_shared);
  } else {
    map = p.workspace + blockIdx.x * ChoiceFloats(size, p.window);
  }
  for (std::int64_t image = blockIdx.x; image < p.saliency.batch; image += gridDim.x) {
    if (p.next.meeting != nullptr) {
      for (std::int64_t c = threadIdx.x; c < p.next.depth; c += kThreads) {
        p.next.meeting[(image * p.next.depth + c) * p.next.meeting_words] = 0;
      }
    }
    float* const staged = map + size.height * Pitch(size, p.window);
    if (AddClasses<Format>(p, image, map, staged)) {
      ChooseGreedily(p, image, map, staged + kWarps * cells);
    } else {
      for (std::int64_t k = threadIdx.x; k < p.count; k += kThreads) WriteCell(p, image, k, -1, -1);
    }
  }
}

constexpr std::int64_t kSharedBytes = 96 * 1024;  // a block may use it from sm_80 on

bool ChoiceIsShared(Size map, Size window) {
  return ChoiceFloats(map, window) <= kSharedBytes / static_cast<std::int64_t>(sizeof(float));
}

// With a workspace, 256 blocks at most, which bounds its size and still fills the GPU.
std::int64_t ChoiceBlocks(std::int64_t batch, bool shared) {
  return std::min(batch, shared ? kMaxBlocks : 256);
}

template <typename Format>
void LaunchChoice(const Choice& choice, cudaStream_t stream) {
  const Size map{choice.saliency.height, choice.saliency.width};
  const bool shared = ChoiceIsShared(map, choice.window);
  const std::size_t bytes =
      shared ? static_cast<std::size_t>(ChoiceFloats(map, choice.window)) * sizeof(float) : 0;
  const auto blocks = static_cast<unsigned>(ChoiceBlocks(choice.saliency.batch, shared));
  const auto kernel = shared ? ChooseKernel<Format, true> : ChooseKernel<Format, false>;
  Launch("rois.choose_windows", kernel, {dim3(blocks), dim3(kThreads), bytes, stream}, choice);
}

}  // namespace

std::int64_t ChooseWorkspace(std::int64_t batch, Size map, Size window) {
  if (ChoiceIsShared(map, window)) return 0;
  return ChoiceBlocks(batch, false) * ChoiceFloats(map, window);
}

void ChooseWindows(const ChooseCall& call, const Continuation& next, float* workspace,
                   cudaStream_t stream) {
  const Choice choice{call.saliency, call.window, call.count, call.cells, next, workspace};
  Dispatch<false>(call.type, [&]<typename Format>() { LaunchChoice<Format>(choice, stream); });
}

}  // namespace diffmic::cuda::rois
