// The backward pass of `conditioning`. It recomputes the products and the normalised values of a
// tile, which is cheaper than to store them. Work distribution and arithmetic:
// conditioning_kernels.cuh.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/launch.cuh"
#include "cuda/conditioning/conditioning.h"
#include "cuda/conditioning/conditioning_kernels.cuh"

namespace diffmic::cuda::conditioning {
namespace {

// Further arguments of a launch: the gradient of h1 and the gradients to compute.
struct Descent {
  const float* grad;
  std::int64_t grad_stride[2];
  const float* mean;  // [streams, F], or [1, F] in evaluation mode
  const float* variance;
  std::int64_t statistics_stride;
  Gradients to;
  float* label_sums;  // [slices, streams, B, 2 C], or NULL if not required
  bool scaled;        // gradients before the norm are required: labels, weight, bias or gamma
  bool sums;          // sums over rows are required: for the norm's parameters or batch statistics
  bool twice;         // a first pass over the tiles computes these sums
};

// slopes = the gradient of n, g x sigmoid(n), of a tile's rows. Also loads gamma of the rows, and
// writes the gradient of x if `write_x`.
template <bool kVector>
__device__ void Descend(const Call& call, const Descent& descent, const Position<kVector>& place,
                        const Shared& shared, std::int64_t first, int n, bool write_x) {
  const Batch& batch = call.batch;
  const int streams = static_cast<int>(batch.streams);
  for (int b = place.row; b < n; b += kRowLanes) {
    const Quad x = place.Read(batch.x + (first + b) * batch.x_stride);
    const Quad gamma = ReadGamma(call, place, shared, b);
    place.Put(shared.gamma + b * kSlice, gamma);
    Quad x_gradient{};
    for (int s = 0; s < streams; ++s) {
      const float* norm = shared.norms + s * kNorms * kSlice;
      const Quad mean = place.Get(norm + kMean * kSlice), gain = place.Get(norm + kGain * kSlice);
      const Quad shift = place.Get(norm + kShift * kSlice);
      const Quad p = place.Get(shared.products + (s * n + b) * kSlice);
      const Quad g = place.Read(descent.grad + s * descent.grad_stride[0] +
                                (first + b) * descent.grad_stride[1]);
      Quad slope;
      for (int i = 0; i < 4; ++i) {
        const float value = fmaf(gamma.v[i] * p.v[i] - mean.v[i], gain.v[i], shift.v[i]);
        const float decay = Decay(value);
        slope.v[i] = g.v[i] * x.v[i] * Sigmoid(value, decay);
        x_gradient.v[i] = fmaf(g.v[i], Softplus(value, decay), x_gradient.v[i]);
      }
      place.Put(shared.slopes + (s * n + b) * kSlice, slope);
    }
    if (write_x && descent.to.x != nullptr) {
      place.WriteOrAdd(descent.to.x + (first + b) * call.layer.features, x_gradient, call.add);
    }
  }
}

// Accumulates the sums of d = slopes and of d (z - mean) over a tile's rows, for each branch. Two
// sets of partials alternate, as in Moments: a set is read before the second next barrier.
template <bool kVector>
__device__ void AddSums(const Call& call, const Position<kVector>& place, const Shared& shared,
                        int n) {
  const int streams = static_cast<int>(call.batch.streams);
  const int thread = static_cast<int>(threadIdx.x);
  for (int s = 0; s < streams; ++s) {
    float* partials = shared.partials + s % 2 * 3 * kPartials;
    const Quad mean = place.Get(shared.norms + (s * kNorms + kMean) * kSlice);
    Quad plain{}, moment{};
    for (int b = place.row; b < n; b += kRowLanes) {
      const Quad gamma = place.Get(shared.gamma + b * kSlice);
      const Quad p = place.Get(shared.products + (s * n + b) * kSlice);
      const Quad d = place.Get(shared.slopes + (s * n + b) * kSlice);
      for (int i = 0; i < 4; ++i) {
        plain.v[i] += d.v[i];
        moment.v[i] = fmaf(d.v[i], gamma.v[i] * p.v[i] - mean.v[i], moment.v[i]);
      }
    }
    AddRows(place, plain, partials);
    AddRows(place, moment, partials + kPartials);
    __syncthreads();
    if (thread / 32 == s % kWarps) {
      double* sums = shared.sums + s * 2 * kSlice + thread % 32;
      sums[0] += Total<double>(partials, thread % 32);
      sums[kSlice] += Total<double>(partials + kPartials, thread % 32);
    }
  }
}

// From the sums over all rows: the gradients of the norm's parameters, and the coefficients of the
// gradient through the batch statistics. Called between barriers.
__device__ void FinishSums(const Call& call, const Descent& descent, const Shared& shared) {
  const int unit = static_cast<int>(threadIdx.x);
  if (unit >= kSlice) return;
  const int streams = static_cast<int>(call.batch.streams);
  double norm_weight = 0, norm_bias = 0;
  for (int s = 0; s < streams; ++s) {
    const double plain = shared.sums[2 * s * kSlice + unit];
    const double moment = shared.sums[(2 * s + 1) * kSlice + unit];
    float* norm = shared.norms + s * kNorms * kSlice + unit;
    const double inverse = static_cast<double>(norm[kInverse * kSlice]);
    const double gain =
        static_cast<double>(norm[kGain * kSlice]) / static_cast<double>(call.batch.rows);
    norm[kConstant * kSlice] = static_cast<float>(gain * plain);
    norm[kSlope * kSlice] = static_cast<float>(gain * (moment * inverse * inverse));
    norm_weight += moment * inverse;
    norm_bias += plain;
  }
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kSlice + unit;
  if (at >= call.layer.features) return;
  const auto write = [&](float* to, double sum) {
    if (to != nullptr) to[at] = static_cast<float>(sum) + (call.add ? to[at] : 0.0f);
  };
  write(descent.to.norm_weight, norm_weight);
  write(descent.to.norm_bias, norm_bias);
}

// Turns slopes into the gradient of the products and gamma into its own gradient, in place.
template <bool kVector>
__device__ void ThroughNorm(const Call& call, const Position<kVector>& place, const Shared& shared,
                            int n) {
  const int streams = static_cast<int>(call.batch.streams);
  for (int b = place.row; b < n; b += kRowLanes) {
    const Quad gamma = place.Get(shared.gamma + b * kSlice);
    Quad gamma_gradient{};
    for (int s = 0; s < streams; ++s) {
      const float* norm = shared.norms + s * kNorms * kSlice;
      const Quad gain = place.Get(norm + kGain * kSlice);
      const Quad p = place.Get(shared.products + (s * n + b) * kSlice);
      Quad d = place.Get(shared.slopes + (s * n + b) * kSlice);
      for (int i = 0; i < 4; ++i) d.v[i] *= gain.v[i];
      if (call.batch.training) {
        const Quad mean = place.Get(norm + kMean * kSlice);
        const Quad slope = place.Get(norm + kSlope * kSlice);
        const Quad constant = place.Get(norm + kConstant * kSlice);
        for (int i = 0; i < 4; ++i) {
          d.v[i] -= fmaf(gamma.v[i] * p.v[i] - mean.v[i], slope.v[i], constant.v[i]);
        }
      }
      for (int i = 0; i < 4; ++i) {
        gamma_gradient.v[i] = fmaf(d.v[i], p.v[i], gamma_gradient.v[i]);
        // Channels out of range must not add NaN to the sums over channels.
        d.v[i] = place.Has(i) ? gamma.v[i] * d.v[i] : 0.0f;
      }
      place.Put(shared.slopes + (s * n + b) * kSlice, d);
    }
    place.Put(shared.gamma + b * kSlice, gamma_gradient);
  }
}

// Links the rows of the tile that have the same timestep into lists, in the order of rows.
__device__ void LinkTimesteps(const Shared& shared, int n) {
  for (int b = static_cast<int>(threadIdx.x); b < n; b += kThreads) {
    const std::int64_t t = shared.gamma_row[b];
    int before = 0, next = b + 1;
    while (before < b && shared.gamma_row[before] != t) ++before;
    while (next < n && shared.gamma_row[next] != t) ++next;
    shared.next[b] = next;
    shared.leads[b] = before == b && t >= 0;
  }
}

// The gradient of the rows of gamma that the tile uses. `add`: accumulates over tiles and launches.
template <bool kVector>
__device__ void WriteGamma(const Call& call, const Position<kVector>& place, const Shared& shared,
                           int n, bool add, float* gradient) {
  for (int b = place.row; b < n; b += kRowLanes) {
    if (!shared.leads[b]) continue;
    Quad sum{};
    for (int same = b; same < n; same = shared.next[same]) {
      const Quad value = place.Get(shared.gamma + same * kSlice);
      for (int i = 0; i < 4; ++i) sum.v[i] += value.v[i];
    }
    place.WriteOrAdd(gradient + shared.gamma_row[b] * call.layer.features, sum, add);
  }
}

// ---- matrix products with labels and weights; a thread has four contiguous channels

// The weight gradient of inputs [from, from + count): labels^T slopes over the tile's rows. A
// thread accumulates 4 inputs x 4 channels over every parts-th row. The partial sums are exchanged
// through `products`, whose values are no longer needed.
__device__ void AddWeightGradient(const Call& call, const Gradients& to, const Shared& shared,
                                  int rows, std::int64_t from, int count, bool add) {
  const int thread = static_cast<int>(threadIdx.x);
  const int quads = (count + 3) / 4;
  const int parts = kThreads / (kLanes * quads);
  const int lane = thread % kLanes, quad = thread / kLanes % quads;
  const int part = thread / (kLanes * quads);
  const int size = 4 * quads * kWeightPitch;  // floats per part
  if (part < parts) {
    float sum[4][4] = {};
    for (int row = part; row < rows; row += parts) {
      const float4 d = *reinterpret_cast<const float4*>(shared.slopes + row * kSlice + 4 * lane);
      const float4 l =
          *reinterpret_cast<const float4*>(shared.labels + row * call.width + 4 * quad);
      const float units[4] = {d.x, d.y, d.z, d.w}, labels[4] = {l.x, l.y, l.z, l.w};
      for (int c = 0; c < 4; ++c) {
        for (int u = 0; u < 4; ++u) sum[c][u] = fmaf(labels[c], units[u], sum[c][u]);
      }
    }
    for (int c = 0; c < 4; ++c) {
      *reinterpret_cast<float4*>(shared.products + part * size + (4 * quad + c) * kWeightPitch +
                                 4 * lane) =
          make_float4(sum[c][0], sum[c][1], sum[c][2], sum[c][3]);
    }
  }
  __syncthreads();
  const std::int64_t slice = static_cast<std::int64_t>(blockIdx.x) * kSlice;
  const auto write = [&](int c, int unit, float* at) {
    float sum = 0.0f;
    for (int i = 0; i < parts; ++i) sum += shared.products[i * size + c * kWeightPitch + unit];
    *at = add ? *at + sum : sum;
  };
  const int columns = LabelColumns(call.layer, from, count);
  const std::int64_t width = 2 * call.layer.classes;
  for (int i = thread; to.weight != nullptr && i < kSlice * columns; i += kThreads) {
    const int unit = i / columns, c = i % columns;
    if (slice + unit < call.layer.features) {
      write(c, unit, to.weight + (slice + unit) * width + from + c);
    }
  }
  if (to.bias != nullptr && columns < count && thread < kSlice &&
      slice + thread < call.layer.features) {
    write(columns, thread, to.bias + slice + thread);
  }
}

// slopes W^T over the slice's channels for `count` inputs; the result overwrites the labels. Each
// of the eight threads of a row has partial sums of four inputs. Two shuffles, each of half of
// them, leave a thread with one input summed over four threads; a third adds the other four.
__device__ void LabelGradient(const Call& call, const Shared& shared, int rows, int count) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const bool upper = lane & 4, odd = lane & 2;
  for (int base = 0; base < rows; base += kRowLanes) {  // uniform: all lanes take part in shuffles
    const int row = base + static_cast<int>(threadIdx.x) / kLanes;
    float4 d = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row < rows) {
      d = *reinterpret_cast<const float4*>(shared.slopes + row * kSlice + 4 * lane);
    }
    for (int c = 0; c < count; c += 4) {
      float sum[4];
      for (int i = 0; i < 4; ++i) {
        const float4 w =
            *reinterpret_cast<const float4*>(shared.weights + (c + i) * kWeightPitch + 4 * lane);
        sum[i] = fmaf(d.w, w.w, fmaf(d.z, w.z, fmaf(d.y, w.y, d.x * w.x)));
      }
      for (int i = 0; i < 2; ++i) {
        const float given = __shfl_xor_sync(0xFFFFFFFFu, upper ? sum[i] : sum[i + 2], 4);
        sum[i] = (upper ? sum[i + 2] : sum[i]) + given;
      }
      const float given = __shfl_xor_sync(0xFFFFFFFFu, odd ? sum[0] : sum[1], 2);
      float all = (odd ? sum[1] : sum[0]) + given;
      all += __shfl_xor_sync(0xFFFFFFFFu, all, 1);
      if (row < rows && lane % 2 == 0) {
        shared.labels[row * call.width + c + 2 * upper + odd] = all;
      }
    }
  }
}

// Copies the result of LabelGradient to the block's part of label_sums.
__device__ void WriteLabelSums(const Call& call, const Shared& shared, std::int64_t first, int n,
                               std::int64_t from, int count, float* label_sums) {
  const Batch& batch = call.batch;
  const std::int64_t width = 2 * call.layer.classes;
  const int columns = LabelColumns(call.layer, from, count);
  const int rows = static_cast<int>(batch.streams) * n;
  float* to = label_sums + blockIdx.x * batch.streams * batch.rows * width;
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kThreads) {
    const int row = i / columns, c = i % columns;
    const std::int64_t at = row / n * batch.rows + first + row % n;
    to[at * width + from + c] = shared.labels[row * call.width + c];
  }
}

// Gradients of the weights and the labels of a tile, kInputs at a time.
__device__ void Contract(const Call& call, const Descent& descent, const Shared& shared,
                         std::int64_t first, int n, bool add) {
  const bool weights = descent.to.weight != nullptr || descent.to.bias != nullptr;
  const std::int64_t inputs = Inputs(call.layer);
  const int rows = static_cast<int>(call.batch.streams) * n;
  for (std::int64_t from = 0; from < inputs; from += kInputs) {
    const int count = static_cast<int>(inputs - from < kInputs ? inputs - from : kInputs);
    if (inputs > kInputs) {  // else Products has loaded all of them
      __syncthreads();
      ReadWeights(call, shared, from, count);
      ReadLabels<false>(call, shared, first, n, from, count);
      __syncthreads();
    }
    if (weights) AddWeightGradient(call, descent.to, shared, rows, from, count, add);
    if (descent.label_sums == nullptr) continue;
    LabelGradient(call, shared, rows, count);
    __syncthreads();
    WriteLabelSums(call, shared, first, n, from, count, descent.label_sums);
  }
}

// A block computes slice blockIdx.x for all tiles.
template <bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    BackwardKernel(const Call call, const Descent descent) {
  const Batch& batch = call.batch;
  const Position<kVector> place(call.layer);
  const Shared shared = Carve(dynamic_shared, batch.streams, call.tile_rows, call.width, true);
  ReadNorms(call, shared, descent.mean, descent.variance, descent.statistics_stride);
  const int count = static_cast<int>(batch.streams) * 2 * kSlice;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) shared.sums[i] = 0.0;

  bool fresh = true;
  for (int sweep = descent.twice ? 0 : 1; sweep < 2; ++sweep) {
    const bool last = sweep == 1, sum = descent.sums && last != descent.twice;
    for (std::int64_t first = 0; first == 0 || first < batch.rows; first += call.tile_rows) {
      const std::int64_t left = batch.rows - first;
      const int n = static_cast<int>(left < call.tile_rows ? left : call.tile_rows);
      Products<kVector, false>(call, place, shared, first, n, fresh);
      fresh = false;
      Descend(call, descent, place, shared, first, n, last != descent.twice);
      if (sum) AddSums(call, place, shared, n);
      if (sum && batch.rows <= first + n) {
        __syncthreads();
        FinishSums(call, descent, shared);
        __syncthreads();
      }
      if (!last || !descent.scaled) continue;
      ThroughNorm(call, place, shared, n);
      if (descent.to.gamma != nullptr) LinkTimesteps(shared, n);
      __syncthreads();
      const bool add = call.add || first > 0;
      if (descent.to.gamma != nullptr) WriteGamma(call, place, shared, n, add, descent.to.gamma);
      Contract(call, descent, shared, first, n, add);
    }
  }
}

// ---- label gradients

constexpr int kSumParts = 8;
constexpr int kSumsOfBlock = kThreads / kSumParts;

// Sums label_sums over the slices to gradients [rows, C] of y and guidance. A block computes
// kSumsOfBlock elements with kSumParts threads each, which divide the slices.
__global__ void __launch_bounds__(kThreads, 2)
    LabelSumKernel(const float* label_sums, std::int64_t slices, std::int64_t rows,
                   std::int64_t classes, float* y, float* guidance) {
  __shared__ double parts[kSumParts][kSumsOfBlock];
  const int column = static_cast<int>(threadIdx.x) % kSumsOfBlock;
  const int part = static_cast<int>(threadIdx.x) / kSumsOfBlock;
  const std::int64_t size = rows * 2 * classes;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kSumsOfBlock + column;
  double sum = 0;
  if (at < size) {
    for (std::int64_t slice = part; slice < slices; slice += kSumParts) {
      sum += static_cast<double>(label_sums[slice * size + at]);
    }
  }
  parts[part][column] = sum;
  __syncthreads();
  if (part > 0 || at >= size) return;
  for (int i = 1; i < kSumParts; ++i) sum += parts[i][column];
  const std::int64_t row = at / (2 * classes), c = at % (2 * classes);
  float* to = c < classes ? y : guidance;
  if (to != nullptr) to[row * classes + c % classes] = static_cast<float>(sum);
}

bool AllAligned(const Call& call, const Descent& descent) {
  return call.layer.features % 4 == 0 && Aligned(call.batch.x, call.batch.x_stride) &&
         Aligned(call.layer.gamma, call.layer.gamma_stride) &&
         Aligned(descent.grad, descent.grad_stride[0]) &&
         Aligned(descent.grad, descent.grad_stride[1]) && Aligned(descent.to.x, 0) &&
         Aligned(descent.to.gamma, 0);
}

float* Advance(float* data, std::int64_t count) { return data == nullptr ? data : data + count; }

}  // namespace

std::int64_t LabelSums(std::int64_t features, std::int64_t streams, std::int64_t rows,
                       std::int64_t classes) {
  return (features + kSlice - 1) / kSlice * std::min<std::int64_t>(streams, kStreams) * rows * 2 *
         classes;
}

void Backward(const BackwardCall& backward, float* workspace, cudaStream_t stream) {
  const auto& [layer, batch, grad, grad_stride, statistics, gradients] = backward;
  const float* const variances = statistics + StatisticsStreams(batch) * layer.features;
  const bool labels = gradients.y != nullptr || gradients.guidance != nullptr;
  const bool norms = gradients.norm_weight != nullptr || gradients.norm_bias != nullptr;
  const bool scaled = labels || gradients.weight != nullptr || gradients.bias != nullptr ||
                      gradients.gamma != nullptr;
  for (std::int64_t first = 0; first < batch.streams; first += kStreams) {
    Call call = Prepare(layer, batch, Noising{}, first);
    call.tile_rows = TileRows(call, true);
    const std::int64_t stride = batch.training ? layer.features : 0;
    const std::int64_t label_offset = first * batch.rows * layer.classes;
    Descent descent{grad + first * grad_stride[0],
                    {grad_stride[0], grad_stride[1]},
                    statistics + first * stride,
                    variances + first * stride,
                    stride,
                    gradients,
                    labels ? workspace : nullptr,
                    scaled,
                    norms || (scaled && batch.training),
                    scaled && batch.training && batch.rows > call.tile_rows};
    const LaunchShape shape{
        {Slices(layer), 1, 1}, {kThreads, 1, 1}, Bytes(call, call.tile_rows, true), stream};
    Launch(kOperation, AllAligned(call, descent) ? BackwardKernel<true> : BackwardKernel<false>,
           shape, call, descent);
    if (!labels) continue;
    const std::int64_t rows = call.batch.streams * batch.rows;
    const std::int64_t blocks = (rows * 2 * layer.classes + kSumsOfBlock - 1) / kSumsOfBlock;
    Launch(kOperation, LabelSumKernel,
           {{static_cast<unsigned>(blocks), 1, 1}, {kThreads, 1, 1}, 0, stream}, workspace,
           static_cast<std::int64_t>(Slices(layer)), rows, layer.classes,
           Advance(gradients.y, label_offset), Advance(gradients.guidance, label_offset));
  }
}

}  // namespace diffmic::cuda::conditioning
