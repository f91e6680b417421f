// What the kernels of `conditioning`, forward and backward, have in common: who has which units and
// rows, what lies in shared memory, and the products of a tile of rows.
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
inline constexpr int kLanes = kSlice / 4;            // threads of a row, four units each
inline constexpr int kRowLanes = kThreads / kLanes;  // rows side by side
inline constexpr int kStreams = 6;                   // of a launch; more of them are more launches
inline constexpr int kInputs = 16;                   // labels of a row in shared memory at a time
inline constexpr int kWeightPitch = kSlice + 4;      // keeps transposing writes apart in the banks
inline constexpr int kPartials = kWarps * kSlice;    // a sum of each warp for each unit
inline constexpr int kGatherFloats = kThreads / 2 * kWeightPitch;  // see AddWeightGradient
// The same on all devices, so that the same kernels run and give the same bits. Every GPU since
// compute capability 8.0 has 99 KB for a block.
inline constexpr std::size_t kSharedBytes = 99 * 1024;

// One launch: up to kStreams streams of a call.
struct Call {
  Layer layer;
  Batch batch;
  Noising noising;
  int tile_rows;  // rows in shared memory at a time
  int width;      // labels of a row there, a multiple of 4
  bool add;       // not the first launch of a call: sums over the streams add to what is there
};

// Labels and, behind them, a 1, whose weight is the bias. Last: what is small comes first in the
// sum.
inline __host__ __device__ std::int64_t Inputs(const Layer& layer) { return 2 * layer.classes + 1; }

// How many of inputs [from, from + count) are labels: all, or all but the last.
inline __device__ int LabelColumns(const Layer& layer, std::int64_t from, int count) {
  return from + count < Inputs(layer) ? count : count - 1;
}

// Rows of numbers of a unit and stream: n = (z - mean) gain + shift, and for the backward pass
// gain's factor 1 / deviation, and what the batch's own statistics give back, constant + slope (z -
// mean).
enum Norm { kMean, kGain, kShift, kInverse, kConstant, kSlope, kNorms };

// A block's shared memory. `n` are the rows of the tile at hand.
struct Shared {
  double* sums;             // [streams, 2, kSlice]: of all tiles' rows
  std::int64_t* gamma_row;  // [n]; -1: no such row
  float* weights;           // [width, kWeightPitch]
  float* labels;            // [streams n, width]
  float* products;          // [streams n, kSlice]; in the backward pass kGatherFloats at least
  float* partials;          // [2, 3, kPartials]
  float* norms;             // [streams, kNorms, kSlice]
  float* slopes;            // [streams n, kSlice], backward only
  float* gamma;             // [n, kSlice], backward only
  int* next;                // [n], backward only: the next row of the same timestep
  int* leads;               // [n], backward only: whether there is none before
  std::size_t bytes;
};

// Where all that lies behind `base`; with a null base, only `bytes`.
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

// Four units of a thread.
struct Quad {
  float v[4];
};

// Four floats at a multiple of 16 bytes, in one instruction.
inline __device__ Quad LoadQuad(const float* from) {
  const float4 value = *reinterpret_cast<const float4*>(from);
  return {{value.x, value.y, value.z, value.w}};
}

// A thread's place: a row lane has the tile's rows `row`, `row` + kRowLanes, ..., in every array of
// the slice four units. Where rows begin at multiples of 16 bytes (kVector) these are side by side
// and move as one; else 8 apart, so that eight threads still move whole sectors. Sums are the same
// in both.
template <bool kVector>
struct Position {
  std::int64_t slice;  // its first unit
  int units;           // of the slice, up to kSlice
  int lane, row;

  __device__ explicit Position(const Layer& layer)
      : slice(static_cast<std::int64_t>(blockIdx.x) * kSlice),
        units(static_cast<int>(layer.features - slice < kSlice ? layer.features - slice : kSlice)),
        lane(static_cast<int>(threadIdx.x) % kLanes),
        row(static_cast<int>(threadIdx.x) / kLanes) {}

  __device__ int Unit(int i) const { return kVector ? 4 * lane + i : lane + kLanes * i; }
  __device__ bool Has(int i) const { return Unit(i) < units; }

  // Four floats of a row of kSlice in shared memory.
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

  // The same of a row of F in global memory; what is beyond reads as 0.
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
      // By name, for the compiler cuts a plain assignment into four.
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
  // Writes q, or adds it to what is there.
  __device__ void WriteOrAdd(float* to, Quad q, bool add) const {
    if (add) {
      const Quad before = Read(to);
      for (int i = 0; i < 4; ++i) q.v[i] += before.v[i];
    }
    Write(to, q);
  }
};

// ---- sums over rows

// Adds `q` over a warp's four rows, and leaves the warp's sum of each unit in partial.
template <bool kVector>
__device__ void AddRows(const Position<kVector>& place, Quad q, float* partial) {
  for (int i = 0; i < 4; ++i) {
    q.v[i] += __shfl_xor_sync(0xFFFFFFFFu, q.v[i], kLanes);
    q.v[i] += __shfl_xor_sync(0xFFFFFFFFu, q.v[i], 2 * kLanes);
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (place.row % (32 / kLanes) == 0) place.Put(partial + warp * kSlice, q);
}

// The sum of all warps for a unit.
template <typename T>
__device__ T Total(const float* partial, int unit) {
  T sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += static_cast<T>(partial[warp * kSlice + unit]);
  return sum;
}

// ---- inputs

// Where gamma of a row of the tile begins is looked up once.
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

// Inputs [from, from + count) of the layer: their weights, transposed. Those that fill up to a
// multiple of 4 are 0, in the labels too.
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

// The noisy labels [from, from + count) of rows [first, first + n) of all streams; `from` is a
// multiple of 4. A thread makes the noise of four classes and what it is for in every stream.
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

// The same inputs of rows [first, first + n) of all streams. kNoised: the noisy labels are made.
template <bool kNoised>
__device__ void ReadLabels(const Call& call, const Shared& shared, std::int64_t first, int n,
                           std::int64_t from, int count) {
  const Batch& batch = call.batch;
  const std::int64_t classes = call.layer.classes;
  const int rows = static_cast<int>(batch.streams) * n;
  const int columns = LabelColumns(call.layer, from, count);
  const int width = (count + 3) / 4 * 4;
  if constexpr (kNoised) MakeLabels(call, shared, first, n, from, count);
  // What is no label is written in its turn, so that a warp's writes lie side by side.
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

// products = W l + bias of the tile's rows, the inputs added up in their order. Begins and ends
// with what the tile before it has left in shared memory out of use; other threads' rows are not
// read.
template <bool kVector, bool kNoised>
__device__ void Products(const Call& call, const Position<kVector>& place, const Shared& shared,
                         std::int64_t first, int n, bool fresh) {
  constexpr int kTogether = 3;  // streams that a weight is read for at a time
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

// gain, shift, ... of a unit of the slice from what normalises; zeros where there is no such unit.
inline __device__ void WriteNorm(const Layer& layer, const Shared& shared, int stream, int unit,
                                 float mean, float variance) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kSlice + unit;
  const bool there = at < layer.features;
  const float inverse = there ? 1.0f / sqrtf(variance + layer.eps) : 0.0f;
  float* to = shared.norms + stream * kNorms * kSlice + unit;
  to[kMean * kSlice] = there ? mean : 0.0f;
  to[kGain * kSlice] = there ? inverse * layer.norm_weight[at] : 0.0f;
  to[kShift * kSlice] = there ? layer.norm_bias[at] : 0.0f;
  to[kInverse * kSlice] = inverse;
}

// The same of all streams, from [streams, F] arrays; the stride is 0 where one serves all.
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

// ---- the host's part

// Whether that array's rows begin at multiples of 16 bytes.
inline bool Aligned(const float* data, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % 4 == 0;
}

inline std::size_t Bytes(const Call& call, int rows, bool backward) {
  return Carve(nullptr, call.batch.streams, rows, call.width, backward).bytes;
}

// A launch for streams [stream, stream + kStreams) of a call.
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

// The rows of a tile: all of them where shared memory holds them, else as many as it can, whole
// rounds of the row lanes.
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
