// Shared by the kernels of `conditioning`, the denoiser's first layer (docs/algorithm.md,
// "Denoiser"), forward and backward.
//
// Work distribution. Output channels are independent, so a thread block computes a slice of kSlice
// channels for all branches and rows: batch statistics stay inside the block, and x, gradients and
// results cross the memory bus once. A row of a slice is 128 bytes, read by 8 threads with four
// channels each; a block processes 32 rows at a time. Labels, weights and the matrix products of a
// tile of rows are in shared memory.
//   forward   evaluation mode: one block per slice and tile. Training: one kernel if all rows fit
//   in
//             one tile (about 150 rows for three branches); else a kernel computes the moments tile
//             by tile, and the kernel of evaluation mode the output.
//   backward  one pass if all rows fit in one tile (about 75 rows for three branches) or in
//             evaluation mode; else a first pass over the tiles computes the sums over rows that
//             the gradient through the batch statistics needs. Gradients of labels are sums over
//             all channels: each block writes its part to `label_sums`, and a second kernel adds
//             the parts.
// Noisy labels (include/noising.h) are computed by each block for itself, which saves a launch and
// memory traffic; the blocks of the first slice also write them to memory.
//
// Arithmetic, for S = 3, B = 32, C = 5, F = 6144 (S B F = 590 000 elements):
//   forward   4.5 MB: x, rows of gamma, W, h1 and eight arrays of F, once each; the labels, 3.8 KB
//             for each of 192 blocks, come from L2. 60 operations per element.
//   backward  these, the gradient of h1, and 6.2 MB of results; gradients of labels move another
//             0.7 MB each way in L2. 110 operations per element.
// At 3.35 TB/s these are 1.4 and 1.9 us, less than a launch: small batches are bound by latency,
// large ones by memory bandwidth.
//
// All sums have a fixed order that does not depend on alignment or device: results are bitwise
// reproducible, and a row of evaluation mode has the same bits in every batch.
#ifndef DIFFMIC_CUDA_CONDITIONING_CONDITIONING_KERNELS_CUH_
#define DIFFMIC_CUDA_CONDITIONING_CONDITIONING_KERNELS_CUH_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/common/launch.cuh"
#include "cuda/common/softplus.cuh"
#include "cuda/conditioning/conditioning.h"

namespace diffmic::cuda::conditioning {

inline constexpr char kOperation[] = "conditioning";

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kLanes = kSlice / 4;            // threads per row, four channels each
inline constexpr int kRowLanes = kThreads / kLanes;  // rows processed at a time
inline constexpr int kStreams = 6;                   // branches per launch, at most
inline constexpr int kInputs = 16;                   // inputs of a row in shared memory at a time
inline constexpr int kWeightPitch = kSlice + 4;      // avoids bank conflicts of transposed writes
inline constexpr int kPartials = kWarps * kSlice;    // a sum per warp and channel
inline constexpr int kGatherFloats = kThreads / 2 * kWeightPitch;  // see AddWeightGradient
// A constant, so that every device runs the same kernels with the same bits. A block may use 99 KB
// from compute capability 8.0 on.
inline constexpr std::size_t kSharedBytes = 99 * 1024;

// One launch: up to kStreams branches of a call.
struct Call {
  Layer layer;
  Batch batch;
  Noising noising;
  int tile_rows;  // rows in shared memory at a time
  int width;      // inputs of a row there, a multiple of 4
  bool add;       // not the first launch of a call: sums over branches accumulate
};

// The labels, then a constant 1 whose weight is the bias, so that the bias is added last.
inline __host__ __device__ std::int64_t Inputs(const Layer& layer) { return 2 * layer.classes + 1; }

// The number of labels among the inputs [from, from + count): all of them, or all but the last.
inline __device__ int LabelColumns(const Layer& layer, std::int64_t from, int count) {
  return from + count < Inputs(layer) ? count : count - 1;
}

// Per channel and branch: n = (z - mean) gain + shift; for the backward pass 1 / deviation, and the
// gradient through the batch statistics, constant + slope (z - mean).
enum Norm { kMean, kGain, kShift, kInverse, kConstant, kSlope, kNorms };

// A block's shared memory. `n` is the number of rows of the current tile.
struct Shared {
  double* sums;             // [streams, 2, kSlice], over the rows of all tiles
  std::int64_t* gamma_row;  // [n], -1 if out of range
  float* weights;           // [width, kWeightPitch]
  float* labels;            // [streams n, width]
  float* products;          // [streams n, kSlice]; at least kGatherFloats in the backward pass
  float* partials;          // [2, 3, kPartials]
  float* norms;             // [streams, kNorms, kSlice]
  float* slopes;            // [streams n, kSlice], backward only
  float* gamma;             // [n, kSlice], backward only
  int* next;                // [n], backward only: the next row with the same timestep
  int* leads;               // [n], backward only: whether the row is the first with its timestep
  std::size_t bytes;
};

// Carves the arrays out of the memory at `base`; with a null base, computes `bytes` only.
inline __host__ __device__ Shared Carve(unsigned char* base, std::int64_t streams, int rows,
                                        int width, bool backward) {
  std::size_t at = 0;
  const auto take = [&](std::int64_t count, std::size_t size) {
    unsigned char* part = base == nullptr ? nullptr : base + at;
    at += (static_cast<std::size_t>(count) * size + 15) / 16 * 16;
    return part;
  };
  const auto floats = [&](std::int64_t count) {
    return reinterpret_cast<float*>(take(count, sizeof(float)));
  };
  const std::int64_t elements = streams * rows * kSlice;
  const std::int64_t gather = backward ? kGatherFloats : 0;
  Shared shared{};
  shared.sums = reinterpret_cast<double*>(take(streams * 2 * kSlice, sizeof(double)));
  shared.gamma_row = reinterpret_cast<std::int64_t*>(take(rows, sizeof(std::int64_t)));
  shared.weights = floats(width * kWeightPitch);
  shared.labels = floats(streams * rows * width);
  shared.products = floats(elements > gather ? elements : gather);
  shared.partials = floats(2 * 3 * kPartials);
  shared.norms = floats(streams * kNorms * kSlice);
  if (backward) {
    shared.slopes = floats(elements);
    shared.gamma = floats(static_cast<std::int64_t>(rows) * kSlice);
    shared.next = reinterpret_cast<int*>(take(rows, sizeof(int)));
    shared.leads = reinterpret_cast<int*>(take(rows, sizeof(int)));
  }
  shared.bytes = at;
  return shared;
}

// The four channels of a thread.
struct Quad {
  float v[4];
};

// A 16-byte load; `from` must be 16-byte aligned.
inline __device__ Quad LoadQuad(const float* from) {
  const float4 value = *reinterpret_cast<const float4*>(from);
  return {{value.x, value.y, value.z, value.w}};
}

// A thread's rows, `row`, `row` + kRowLanes, ..., and its four channels of the slice. If rows are
// 16-byte aligned (kVector) the channels are contiguous and accessed as one vector; else they are 8
// apart, so that eight threads access whole sectors. Sums are the same in both.
template <bool kVector>
struct Position {
  std::int64_t slice;  // its first channel
  int units;           // channels of the slice, up to kSlice
  int lane, row;

  __device__ explicit Position(const Layer& layer)
      : slice(static_cast<std::int64_t>(blockIdx.x) * kSlice),
        units(static_cast<int>(layer.features - slice < kSlice ? layer.features - slice : kSlice)),
        lane(static_cast<int>(threadIdx.x) % kLanes),
        row(static_cast<int>(threadIdx.x) / kLanes) {}

  __device__ int Unit(int i) const { return kVector ? 4 * lane + i : lane + kLanes * i; }
  __device__ bool Has(int i) const { return Unit(i) < units; }

  // The thread's four floats of a row of kSlice in shared memory.
  __device__ Quad Get(const float* from) const {
    if constexpr (kVector) {
      return LoadQuad(from + 4 * lane);
    } else {
      Quad q;
      for (int i = 0; i < 4; ++i) q.v[i] = from[Unit(i)];
      return q;
    }
  }
  __device__ void Put(float* to, const Quad& q) const {
    if constexpr (kVector) {
      *reinterpret_cast<float4*>(to + 4 * lane) = make_float4(q.v[0], q.v[1], q.v[2], q.v[3]);
    } else {
      for (int i = 0; i < 4; ++i) to[Unit(i)] = q.v[i];
    }
  }

  // The same of a row of F in global memory; reads beyond it return 0.
  __device__ Quad Read(const float* from) const {
    from += slice;
    if constexpr (kVector) {
      return 4 * lane < units ? Get(from) : Quad{};
    } else {
      Quad q;
      for (int i = 0; i < 4; ++i) q.v[i] = Has(i) ? from[Unit(i)] : 0.0f;
      return q;
    }
  }
  __device__ void Write(float* to, const Quad& q) const {
    to += slice;
    if constexpr (kVector) {
      // An intrinsic: nvcc splits a plain assignment into four stores.
      if (4 * lane < units) {
        __stcg(reinterpret_cast<float4*>(to + 4 * lane),
               make_float4(q.v[0], q.v[1], q.v[2], q.v[3]));
      }
    } else {
      for (int i = 0; i < 4; ++i) {
        if (Has(i)) to[Unit(i)] = q.v[i];
      }
    }
  }
  // Writes q, or accumulates it.
  __device__ void WriteOrAdd(float* to, Quad q, bool add) const {
    if (add) {
      const Quad before = Read(to);
      for (int i = 0; i < 4; ++i) q.v[i] += before.v[i];
    }
    Write(to, q);
  }
};

// ---- sums over rows

// Sums `q` over the four rows of a warp, into partial [kWarps, kSlice].
template <bool kVector>
__device__ void AddRows(const Position<kVector>& place, Quad q, float* partial) {
  for (int i = 0; i < 4; ++i) {
    q.v[i] += __shfl_xor_sync(0xFFFFFFFFu, q.v[i], kLanes);
    q.v[i] += __shfl_xor_sync(0xFFFFFFFFu, q.v[i], 2 * kLanes);
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (place.row % (32 / kLanes) == 0) place.Put(partial + warp * kSlice, q);
}

// The sum over the warps for one channel.
template <typename T>
__device__ T Total(const float* partial, int unit) {
  T sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += static_cast<T>(partial[warp * kSlice + unit]);
  return sum;
}

// ---- inputs

// Loads the timesteps of the tile's rows; one outside gamma becomes -1, whose gamma reads as NaN.
inline __device__ void ReadTimesteps(const Call& call, const Shared& shared, std::int64_t first,
                                     int n) {
  for (int b = static_cast<int>(threadIdx.x); b < n; b += kThreads) {
    const std::int64_t t = call.batch.timesteps[(first + b) * call.batch.timestep_stride];
    shared.gamma_row[b] = t >= 0 && t < call.layer.gamma_rows ? t : -1;
  }
}

template <bool kVector>
__device__ Quad ReadGamma(const Call& call, const Position<kVector>& place, const Shared& shared,
                          int b) {
  const std::int64_t row = shared.gamma_row[b];
  if (row >= 0) return place.Read(call.layer.gamma + row * call.layer.gamma_stride);
  const float nan = nanf("");
  return {{nan, nan, nan, nan}};
}

// Loads the weights of inputs [from, from + count), transposed. Weights and labels are padded with
// zeros to a multiple of 4 inputs.
inline __device__ void ReadWeights(const Call& call, const Shared& shared, std::int64_t from,
                                   int count) {
  const Layer& layer = call.layer;
  const std::int64_t slice = static_cast<std::int64_t>(blockIdx.x) * kSlice;
  const int thread = static_cast<int>(threadIdx.x);
  const int columns = LabelColumns(layer, from, count);
  for (int i = thread; i < kSlice * columns; i += kThreads) {
    const int unit = i / columns, c = i % columns;
    shared.weights[c * kWeightPitch + unit] =
        slice + unit < layer.features ? layer.weight[(slice + unit) * layer.weight_stride[0] +
                                                     (from + c) * layer.weight_stride[1]]
                                      : 0.0f;
  }
  if (columns < count && thread < kSlice) {
    shared.weights[columns * kWeightPitch + thread] =
        slice + thread < layer.features ? layer.bias[slice + thread] : 0.0f;
  }
  for (int i = count * kSlice + thread; i < (count + 3) / 4 * 4 * kSlice; i += kThreads) {
    shared.weights[i / kSlice * kWeightPitch + i % kSlice] = 0.0f;
  }
}

// Computes the noisy labels [from, from + count) of rows [first, first + n) for all branches;
// `from` is a multiple of 4. A thread draws the noise of four classes and uses it for every branch.
inline __device__ void MakeLabels(const Call& call, const Shared& shared, std::int64_t first, int n,
                                  std::int64_t from, int count) {
  const Batch& batch = call.batch;
  const Noising& noising = call.noising;
  const std::int64_t classes = call.layer.classes;
  const int width = static_cast<int>(classes < from + count ? classes - from : count);
  const int blocks = width > 0 ? (width + 3) / 4 : 0;
  for (int i = static_cast<int>(threadIdx.x); i < n * blocks; i += kThreads) {
    const int b = i / blocks, block = i % blocks;
    const std::int64_t row = first + b;
    const Mixture mixture = MixtureOf(noising, batch.timesteps[row * batch.timestep_stride]);
    const philox::Normals noise = NoiseOf(noising, row, from / 4 + block, classes);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int c = 4 * block + k;
      if (c >= width) break;
      const float y_0 =
          noising.y_0[row * noising.y_0_stride[0] + (from + c) * noising.y_0_stride[1]];
      const std::int64_t at = row * classes + from + c;
      if (blockIdx.x == 0 && noising.drawn != nullptr) noising.drawn[at] = noise.z[k];
      for (int s = 0; s < static_cast<int>(batch.streams); ++s) {
        const Labels& prior = batch.guidance;
        const float y = NoisyLabel(
            mixture, y_0,
            prior.data[s * prior.stride[0] + row * prior.stride[1] + (from + c) * prior.stride[2]],
            noise.z[k]);
        shared.labels[(s * n + b) * call.width + c] = y;
        if (blockIdx.x == 0) noising.y[s * batch.rows * classes + at] = y;
      }
    }
  }
}

// Loads the same inputs of rows [first, first + n) for all branches. kNoised: computes the noisy
// labels instead of loading them.
template <bool kNoised>
__device__ void ReadLabels(const Call& call, const Shared& shared, std::int64_t first, int n,
                           std::int64_t from, int count) {
  const Batch& batch = call.batch;
  const std::int64_t classes = call.layer.classes;
  const int rows = static_cast<int>(batch.streams) * n;
  const int columns = LabelColumns(call.layer, from, count);
  const int width = (count + 3) / 4 * 4;
  if constexpr (kNoised) MakeLabels(call, shared, first, n, from, count);
  // The constant and the padding are written in the same loop, so that a warp's writes are
  // contiguous.
  for (int i = static_cast<int>(threadIdx.x); i < rows * width; i += kThreads) {
    const int row = i / width, c = i % width;
    float value = c == columns && columns < count ? 1.0f : 0.0f;
    if (c < columns) {
      const bool noisy = from + c < classes;
      if (kNoised && noisy) continue;
      const Labels& labels = noisy ? batch.y : batch.guidance;
      value = labels.data[row / n * labels.stride[0] + (first + row % n) * labels.stride[1] +
                          (from + c - (noisy ? 0 : classes)) * labels.stride[2]];
    }
    shared.labels[row * call.width + c] = value;
  }
}

// ---- products

// products = W l + bias of the tile's rows, summed in the order of the inputs. Its first barrier
// ensures that the previous tile's shared memory has been read. A thread reads only its own rows of
// the result.
template <bool kVector, bool kNoised>
__device__ void Products(const Call& call, const Position<kVector>& place, const Shared& shared,
                         std::int64_t first, int n, bool fresh) {
  constexpr int kTogether = 3;  // branches for which a weight is loaded once
  const int streams = static_cast<int>(call.batch.streams);
  const std::int64_t inputs = Inputs(call.layer);
  for (std::int64_t from = 0; from < inputs; from += kInputs) {
    const int count = static_cast<int>(inputs - from < kInputs ? inputs - from : kInputs);
    __syncthreads();
    if (from == 0) ReadTimesteps(call, shared, first, n);
    if (fresh || inputs > kInputs) ReadWeights(call, shared, from, count);
    ReadLabels<kNoised>(call, shared, first, n, from, count);
    __syncthreads();
    for (int b = place.row; b < n; b += kRowLanes) {
      for (int s = 0; s < streams; s += kTogether) {
        Quad sum[kTogether] = {};
        if (from > 0) {
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            if (s + i < streams) sum[i] = place.Get(shared.products + ((s + i) * n + b) * kSlice);
          }
        }
        for (int c = 0; c < count; c += 4) {
          Quad label[kTogether] = {};
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            if (s + i < streams) {
              label[i] = LoadQuad(shared.labels + ((s + i) * n + b) * call.width + c);
            }
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Quad weight = place.Get(shared.weights + (c + j) * kWeightPitch);
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
              for (int k = 0; k < 4; ++k) {
                sum[i].v[k] = fmaf(label[i].v[j], weight.v[k], sum[i].v[k]);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (s + i < streams) place.Put(shared.products + ((s + i) * n + b) * kSlice, sum[i]);
        }
      }
    }
  }
}

// ---- statistics

// Writes gain, shift, ... of a channel of the slice; zeros if the channel is out of range.
inline __device__ void WriteNorm(const Layer& layer, const Shared& shared, int stream, int unit,
                                 float mean, float variance) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kSlice + unit;
  const bool there = at < layer.features;
  const float inverse = there ? 1.0f / sqrtf(variance + static_cast<float>(layer.eps)) : 0.0f;
  float* to = shared.norms + stream * kNorms * kSlice + unit;
  to[kMean * kSlice] = there ? mean : 0.0f;
  to[kGain * kSlice] = there ? inverse * layer.norm_weight[at] : 0.0f;
  to[kShift * kSlice] = there ? layer.norm_bias[at] : 0.0f;
  to[kInverse * kSlice] = inverse;
}

// The same for all branches, from arrays [streams, F]; the stride is 0 if all share one.
inline __device__ void ReadNorms(const Call& call, const Shared& shared, const float* mean,
                                 const float* variance, std::int64_t stride) {
  const std::int64_t slice = static_cast<std::int64_t>(blockIdx.x) * kSlice;
  const int count = static_cast<int>(call.batch.streams) * kSlice;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const std::int64_t at = i / kSlice * stride + slice + i % kSlice;
    const bool there = slice + i % kSlice < call.layer.features;
    WriteNorm(call.layer, shared, i / kSlice, i % kSlice, there ? mean[at] : 0.0f,
              there ? variance[at] : 0.0f);
  }
}

// ---- launch configuration

// Whether the rows of an array are 16-byte aligned.
inline bool Aligned(const float* data, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % 4 == 0;
}

inline std::size_t Bytes(const Call& call, int rows, bool backward) {
  return Carve(nullptr, call.batch.streams, rows, call.width, backward).bytes;
}

// A launch for the branches [stream, stream + kStreams) of a call.
inline Call Prepare(const Layer& layer, const Batch& batch, const Noising& noising,
                    std::int64_t stream) {
  Call call{layer, batch, noising, 0, 0, stream > 0};
  if (noising.y_0 != nullptr) call.noising.y += stream * batch.rows * layer.classes;
  call.batch.streams = std::min<std::int64_t>(batch.streams - stream, kStreams);
  call.batch.y.data += stream * batch.y.stride[0];
  call.batch.guidance.data += stream * batch.guidance.stride[0];
  call.width = static_cast<int>(std::min<std::int64_t>((Inputs(layer) + 3) / 4 * 4, kInputs));
  return call;
}

// Rows per tile: all of them if they fit in shared memory, else the largest multiple of kRowLanes.
inline int TileRows(const Call& call, bool backward) {
  if (call.batch.rows < 1024 &&
      Bytes(call, static_cast<int>(call.batch.rows), backward) <= kSharedBytes) {
    return static_cast<int>(std::max<std::int64_t>(call.batch.rows, 1));
  }
  int rows = kRowLanes;
  while (Bytes(call, rows + kRowLanes, backward) <= kSharedBytes) rows += kRowLanes;
  return rows;
}

inline unsigned Slices(const Layer& layer) {
  return static_cast<unsigned>((layer.features + kSlice - 1) / kSlice);
}

}  // namespace diffmic::cuda::conditioning

#endif  // DIFFMIC_CUDA_CONDITIONING_CONDITIONING_KERNELS_CUH_
