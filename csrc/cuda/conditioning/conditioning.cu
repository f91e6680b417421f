// The forward pass of `conditioning`:
//   h1 = x softplus(BN(gamma_t (W [y_t; guidance] + bias)))
// Work distribution and arithmetic: conditioning_kernels.cuh.
#include "cuda/conditioning/conditioning.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/launch.cuh"
#include "cuda/conditioning/conditioning_kernels.cuh"

namespace diffmic::cuda::conditioning {
namespace {

// Rows per tile if each tile has its own block: a block reads its weights once for two iterations.
constexpr int kOwnTileRows = 2 * kRowLanes;

// The statistics used to normalise, [streams, F], or [1, F] in evaluation mode.
struct Statistics {
  float* mean;
  float* variance;
  std::int64_t stride;
};

// products = gamma (W l + bias), in place.
template <bool kVector>
__device__ void Scale(const Call& call, const Position<kVector>& place, const Shared& shared,
                      int n) {
  const int streams = static_cast<int>(call.batch.streams);
  for (int b = place.row; b < n; b += kRowLanes) {
    const Quad gamma = ReadGamma(call, place, shared, b);
    for (int s = 0; s < streams; ++s) {
      float* at = shared.products + (s * n + b) * kSlice;
      Quad z = place.Get(at);
      for (int i = 0; i < 4; ++i) z.v[i] *= gamma.v[i];
      place.Put(at, z);
    }
  }
}

// Merges a tile into the moments of a channel (Chan): sums[0] is the mean of all rows so far and
// sums[1] the sum of squared deviations from it. `partials` are sums of z, of z - middle and of its
// square, where middle is the tile's mean rounded to float; the second sum corrects that rounding.
__device__ void Merge(double* sums, const float* partials, int unit, std::int64_t before, int n) {
  const double rows = n, all = static_cast<double>(before) + rows;
  const double middle = static_cast<double>(Total<float>(partials, unit) / static_cast<float>(n));
  const double rest = Total<double>(partials + kPartials, unit);
  const double squares = Total<double>(partials + 2 * kPartials, unit) - rest * rest / rows;
  const double step = middle + rest / rows - sums[unit];
  sums[unit] += step * (rows / all);
  sums[kSlice + unit] += squares + step * step * (static_cast<double>(before) * rows / all);
}

// Merges the moments of a tile's rows, computed in two passes over z, with those of the `before`
// rows of earlier tiles. Branches alternate between two sets of partials: a warp merges one while
// the others compute the next, and two barriers separate its reads from the next writes of that
// set.
template <bool kVector>
__device__ void Moments(const Call& call, const Position<kVector>& place, const Shared& shared,
                        std::int64_t before, int n) {
  const int streams = static_cast<int>(call.batch.streams);
  const int thread = static_cast<int>(threadIdx.x);
  for (int s = 0; s < streams; ++s) {
    const float* z = shared.products + s * n * kSlice;
    float* partials = shared.partials + s % 2 * 3 * kPartials;
    Quad sum{}, middle, rest{}, squares{};
    for (int b = place.row; b < n; b += kRowLanes) {
      const Quad value = place.Get(z + b * kSlice);
      for (int i = 0; i < 4; ++i) sum.v[i] += value.v[i];
    }
    AddRows(place, sum, partials);
    __syncthreads();
    for (int i = 0; i < 4; ++i) {
      middle.v[i] = Total<float>(partials, place.Unit(i)) / static_cast<float>(n);
    }
    for (int b = place.row; b < n; b += kRowLanes) {
      const Quad value = place.Get(z + b * kSlice);
      for (int i = 0; i < 4; ++i) {
        const float distance = value.v[i] - middle.v[i];
        rest.v[i] += distance;
        squares.v[i] = fmaf(distance, distance, squares.v[i]);
      }
    }
    AddRows(place, rest, partials + kPartials);
    AddRows(place, squares, partials + 2 * kPartials);
    __syncthreads();
    if (thread / 32 == s % kWarps) {
      Merge(shared.sums + s * 2 * kSlice, partials, thread % 32, before, n);
    }
  }
}

// Evaluation mode: normalises by the running statistics. The blocks of the first tile save a copy.
__device__ void UseRunning(const Call& call, const Shared& shared, const Running& running,
                           const Statistics& statistics) {
  ReadNorms(call, shared, running.mean, running.variance, 0);
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kSlice + threadIdx.x;
  if (blockIdx.y > 0 || threadIdx.x >= kSlice || at >= call.layer.features) return;
  statistics.mean[at] = running.mean[at];
  statistics.variance[at] = running.variance[at];
}

// Computes the batch statistics from the moments of all rows, and updates the running statistics
// once per branch, each rounded to float as BatchNorm does.
__device__ void Finish(const Call& call, const Shared& shared, const Running& running,
                       const Statistics& statistics) {
  const int unit = static_cast<int>(threadIdx.x);
  if (unit >= kSlice) return;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kSlice + unit;
  const bool there = at < call.layer.features;
  const int streams = static_cast<int>(call.batch.streams);
  const double rows = static_cast<double>(call.batch.rows);
  float running_mean = there ? running.mean[at] : 0.0f;
  float running_variance = there ? running.variance[at] : 0.0f;
  for (int s = 0; s < streams; ++s) {
    const double mean = shared.sums[2 * s * kSlice + unit];
    const double squares = shared.sums[(2 * s + 1) * kSlice + unit];
    const double old = 1.0 - running.momentum;
    running_mean =
        static_cast<float>(old * static_cast<double>(running_mean) + running.momentum * mean);
    running_variance = static_cast<float>(old * static_cast<double>(running_variance) +
                                          running.momentum * (squares / (rows - 1.0)));
    const float variance = static_cast<float>(squares / rows);
    WriteNorm(call.layer, shared, s, unit, static_cast<float>(mean), variance);
    if (there) {
      statistics.mean[s * statistics.stride + at] = static_cast<float>(mean);
      statistics.variance[s * statistics.stride + at] = variance;
    }
  }
  if (there) {
    running.updated_mean[at] = running_mean;
    running.updated_variance[at] = running_variance;
  }
}

// out = x softplus((z - mean) gain + shift) of a tile's rows.
template <bool kVector>
__device__ void Activate(const Call& call, const Position<kVector>& place, const Shared& shared,
                         std::int64_t first, int n, float* out) {
  const Batch& batch = call.batch;
  const int streams = static_cast<int>(batch.streams);
  for (int b = place.row; b < n; b += kRowLanes) {
    const Quad x = place.Read(batch.x + (first + b) * batch.x_stride);
    for (int s = 0; s < streams; ++s) {
      const float* norm = shared.norms + s * kNorms * kSlice;
      const Quad mean = place.Get(norm + kMean * kSlice), gain = place.Get(norm + kGain * kSlice);
      const Quad shift = place.Get(norm + kShift * kSlice);
      Quad h = place.Get(shared.products + (s * n + b) * kSlice);
      for (int i = 0; i < 4; ++i) {
        const float value = fmaf(h.v[i] - mean.v[i], gain.v[i], shift.v[i]);
        h.v[i] = x.v[i] * Softplus(value, Decay(value));
      }
      place.Write(out + (s * batch.rows + first + b) * call.layer.features, h);
    }
  }
}

// A block computes slice blockIdx.x of tiles blockIdx.y, blockIdx.y + gridDim.y, ... With kMoments
// gridDim.y is 1; with kMoments and kActivate all rows are one tile. kNoised is a template
// parameter because its registers would reduce the occupancy of the other kernels.
template <bool kVector, bool kMoments, bool kActivate, bool kNoised>
__global__ void __launch_bounds__(kThreads, 2)
    ForwardKernel(const Call call, const Running running, const Statistics statistics, float* out) {
  const Position<kVector> place(call.layer);
  const Shared shared =
      Carve(dynamic_shared, call.batch.streams, call.tile_rows, call.width, false);
  if constexpr (kMoments) {
    const int count = static_cast<int>(call.batch.streams) * 2 * kSlice;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) shared.sums[i] = 0.0;
  } else if (call.batch.training) {
    ReadNorms(call, shared, statistics.mean, statistics.variance, statistics.stride);
  } else {
    UseRunning(call, shared, running, statistics);
  }
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.y) * call.tile_rows;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.y) * call.tile_rows;
  for (std::int64_t first = begin; first < call.batch.rows; first += step) {
    const std::int64_t left = call.batch.rows - first;
    const int n = static_cast<int>(left < call.tile_rows ? left : call.tile_rows);
    Products<kVector, kNoised>(call, place, shared, first, n, first == begin);
    Scale(call, place, shared, n);
    if constexpr (kMoments) Moments(call, place, shared, first, n);
    if constexpr (kMoments && kActivate) {
      __syncthreads();
      Finish(call, shared, running, statistics);
      __syncthreads();
    }
    if constexpr (kActivate) Activate(call, place, shared, first, n, out);
  }
  if constexpr (kMoments && !kActivate) {
    __syncthreads();
    Finish(call, shared, running, statistics);
  }
}

bool AllAligned(const Call& call, const float* out) {
  return call.layer.features % 4 == 0 && Aligned(call.batch.x, call.batch.x_stride) &&
         Aligned(call.layer.gamma, call.layer.gamma_stride) && Aligned(out, 0);
}

template <bool kMoments, bool kActivate>
void Start(const Call& call, const Running& running, const Statistics& statistics, float* out,
           unsigned tiles, cudaStream_t stream) {
  const LaunchShape shape{
      {Slices(call.layer), tiles, 1}, {kThreads, 1, 1}, Bytes(call, call.tile_rows, false), stream};
  const bool aligned = AllAligned(call, out);
  const auto kernel = call.noising.y_0 == nullptr
                          ? (aligned ? ForwardKernel<true, kMoments, kActivate, false>
                                     : ForwardKernel<false, kMoments, kActivate, false>)
                          : (aligned ? ForwardKernel<true, kMoments, kActivate, true>
                                     : ForwardKernel<false, kMoments, kActivate, true>);
  Launch(kOperation, kernel, shape, call, running, statistics, out);
}

}  // namespace

void Forward(const ForwardCall& forward, cudaStream_t stream) {
  const auto& [layer, batch, noising, running, statistics, out] = forward;
  Running behind = running;  // each launch updates the running statistics of the previous one
  float* const variances = statistics + StatisticsStreams(batch) * layer.features;
  for (std::int64_t first = 0; first < batch.streams; first += kStreams) {
    Call call = Prepare(layer, batch, noising, first);
    const std::int64_t stride = batch.training ? layer.features : 0;
    const Statistics part{statistics + first * stride, variances + first * stride, stride};
    float* const to = out + first * batch.rows * layer.features;
    if (batch.training) {
      call.tile_rows = TileRows(call, false);
      if (batch.rows <= call.tile_rows) {
        Start<true, true>(call, behind, part, to, 1, stream);
      } else {
        Start<true, false>(call, behind, part, nullptr, 1, stream);
      }
      behind.mean = running.updated_mean;
      behind.variance = running.updated_variance;
      if (batch.rows <= call.tile_rows) continue;
      call.noising = Noising{};  // that kernel has written the noisy labels
    }
    call.tile_rows = std::min(TileRows(call, false), kOwnTileRows);
    const std::int64_t tiles = (batch.rows + call.tile_rows - 1) / call.tile_rows;
    Start<false, true>(call, behind, part, to,
                       static_cast<unsigned>(std::clamp<std::int64_t>(tiles, 1, 65535)), stream);
  }
}

}  // namespace diffmic::cuda::conditioning
