// The chains of a launch of `denoise`: states, noise and windows of steps (docs/algorithm.md,
// "Windows of steps"). Every thread block holds a copy in shared memory and updates it with the
// same values, so blocks exchange nothing for it: 20 bytes per row and class, 12 per chain and
// class, 68 per row, 24 per chain.
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_CHAINS_CUH_
#define DIFFMIC_CUDA_DENOISE_DENOISE_CHAINS_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/common/loads.cuh"
#include "cuda/denoise/denoise_arguments.h"
#include "cuda/denoise/denoise_layout.cuh"
#include "include/philox.h"

namespace diffmic::cuda::denoise {

// A block's copy, in shared memory. Row r is step r % window in the window of chain r / window.
struct BlockState {
  std::int64_t* keys;  // [chains, 2], image_ids and sample_ids, if noise is drawn
  float* y;            // [rows, C], the states that eps is evaluated at
  float* eps;          // [rows, C]
  float* walked;       // [chains, window + 1, C]
  float* prior;        // [chains, C]
  float* guidance;     // [chains, C]
  int* begin;          // [chains], the first step that is not final
  int* advance;        // [chains], steps that the last sweep made final
  int* timestep;       // [rows]
  // Rings of steps: step i is at i % (2 window).
  float* noise;         // [chains, 2 window, C]
  float* coefficients;  // [7, chains, 2 window], of StepTable
  int* timesteps;       // [chains, 2 window]
};

__host__ __device__ inline std::size_t BlockStateBytes(int chains, int window, int classes) {
  const std::size_t rows = static_cast<std::size_t>(chains) * window;
  const std::size_t vectors = 4 * rows + 3 * static_cast<std::size_t>(chains) + rows;
  return 16 * static_cast<std::size_t>(chains) +
         (vectors * classes + 2 * static_cast<std::size_t>(chains) + 17 * rows) * 4;
}

__device__ inline BlockState CarveState(void* memory, int chains, int window, int classes) {
  const int rows = chains * window;
  BlockState state;
  state.keys = static_cast<std::int64_t*>(memory);
  state.y = reinterpret_cast<float*>(state.keys + 2 * chains);
  state.eps = state.y + rows * classes;
  state.walked = state.eps + rows * classes;
  state.noise = state.walked + (rows + chains) * classes;
  state.coefficients = state.noise + 2 * rows * classes;
  state.prior = state.coefficients + 14 * rows;
  state.guidance = state.prior + chains * classes;
  state.begin = reinterpret_cast<int*>(state.guidance + chains * classes);
  state.advance = state.begin + chains;
  state.timestep = state.advance + chains;
  state.timesteps = state.timestep + rows;
  return state;
}

// The chains of a launch. All threads of the block call its public methods together.
class Chains {
 public:
  __device__ Chains(const KernelArguments& a, void* memory)
      : a_(a),
        state_(CarveState(memory, a.chains, a.window, a.classes)),
        rows_(a.chains * a.window) {}

  __device__ int rows() const { return rows_; }
  __device__ const float* y(int row) const { return state_.y + row * a_.classes; }
  __device__ const float* guidance(int row) const {
    return state_.guidance + row / a_.window * a_.classes;
  }
  __device__ int timestep(int row) const { return state_.timestep[row]; }
  // [rows, C], written by the caller between PlaceRows and Walk.
  __device__ float* eps() const { return state_.eps; }

  __device__ void Load() {
    const int classes = a_.classes;
    for (int i = threadIdx.x; i < a_.chains * classes; i += kThreads) {
      const std::int64_t from = a_.first_row * classes + i;
      state_.prior[i] = a_.call.prior[from];
      state_.guidance[i] = a_.call.guidance[from];
    }
    for (int chain = threadIdx.x; chain < a_.chains; chain += kThreads) {
      state_.begin[chain] = a_.fresh ? 0 : a_.begin[chain];
      state_.advance[chain] = Windows();  // LoadSteps and DrawNoise fill the whole rings
      if (a_.call.noise == nullptr) {
        state_.keys[2 * chain] = a_.call.image_ids[a_.first_row + chain];
        state_.keys[2 * chain + 1] = a_.call.sample_ids[a_.first_row + chain];
      }
    }
    if (!a_.fresh) {
      for (int i = threadIdx.x; i < rows_ * classes; i += kThreads) state_.y[i] = a_.states[i];
    }
    __syncthreads();
    if (a_.fresh) BeginChains();
    LoadSteps();
    DrawNoise();
    __syncthreads();
    for (int chain = threadIdx.x; chain < a_.chains; chain += kThreads) state_.advance[chain] = 0;
    __syncthreads();
  }

  __device__ bool Finished() const {
    for (int chain = 0; chain < a_.chains; ++chain) {
      if (state_.begin[chain] < Count()) return false;
    }
    return true;
  }

  // Sets the timestep of every row: 0 for those beyond the end of a chain, whose eps is not used.
  __device__ void PlaceRows() {
    for (int row = threadIdx.x; row < rows_; row += kThreads) {
      const int chain = row / a_.window;
      const int step = state_.begin[chain] + row % a_.window;
      state_.timestep[row] = step < Count() ? Timestep(chain, step) : 0;
    }
    __syncthreads();
  }

  // Loads the steps that the last advance moved into the ring. Ends with a barrier.
  __device__ void LoadSteps() {
    const int count = Count();
    for (int i = threadIdx.x; i < a_.chains * Windows(); i += kThreads) {
      const int chain = i / Windows();
      const int step = state_.begin[chain] + i % Windows();
      if (i % Windows() < Windows() - state_.advance[chain] || step >= count) continue;
      const InFlight<std::int64_t> timestep = LoadAhead(a_.call.steps.timesteps + step);
      InFlight<float> coefficients[7];
#pragma unroll
      for (int k = 0; k < 7; ++k) {
        coefficients[k] = LoadAhead(a_.call.steps.coefficients + k * a_.call.steps.count + step);
      }
#pragma unroll
      for (int k = 0; k < 7; ++k) Coefficient(k, chain, step) = coefficients[k];
      Timestep(chain, step) = static_cast<int>(timestep);
    }
    __syncthreads();
  }

  // Calls visit(timestep, thread) for the timesteps of all steps that the next sweep may evaluate,
  // by `threads` threads each; after LoadSteps.
  template <class Visit>
  __device__ void EachNextTimestep(int threads, Visit visit) const {
    // With one step per sweep all chains are at the same one.
    const int chains = a_.window == 1 ? 1 : a_.chains;
    const int ahead = Windows() - 1;
    for (int i = threadIdx.x; i < chains * ahead * threads; i += kThreads) {
      const int chain = i / threads / ahead;
      const int step = state_.begin[chain] + 1 + i / threads % ahead;
      if (step < Count()) visit(Timestep(chain, step), i % threads);
    }
  }

  // Draws the noise of the steps that the last advance moved into the ring, after LoadSteps.
  __device__ void DrawNoise() {
    const int quads = (a_.classes + 3) / 4;
    for (int i = threadIdx.x; i < a_.chains * Windows() * quads; i += kThreads) {
      const int chain = i / (Windows() * quads);
      const int ahead = i / quads % Windows();
      const int step = state_.begin[chain] + ahead;
      if (ahead < Windows() - state_.advance[chain] || step >= Count()) continue;
      if (!(Coefficient(6, chain, step) > 0.0f)) continue;  // the step adds no noise
      const int quad = i % quads;
      const philox::Normals noise = Draw(chain, step + 1, quad);
      float* to = NoiseOf(chain, step) + 4 * quad;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (4 * quad + k < a_.classes) to[k] = noise.z[k];
      }
    }
  }

  // Takes the steps of each window from its first state, which is final, with the eps evaluated at
  // the guessed states. States are final up to the first that differs from its guess. One thread
  // per class of a chain.
  __device__ void Walk() {
    const int classes = a_.classes;
    const int all = a_.chains * classes;
    for (int chain = threadIdx.x; chain < a_.chains; chain += kThreads) {
      state_.advance[chain] = Length(chain);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < all; i += kThreads) {
      const int chain = i / classes;
      const int c = i % classes;
      const int length = Length(chain);
      int own = length;
      float y = length > 0 ? GuessOf(chain, 0)[c] : 0.0f;
      for (int k = 0; k < length; ++k) {
        if (k > 0 && own == length && !Same(y, GuessOf(chain, k)[c])) own = k;
        y = TakeStep(chain, state_.begin[chain] + k, c, EpsOf(chain, k)[c], y);
        WalkedOf(chain, k + 1)[c] = y;
      }
      if (own < length) atomicMin(&state_.advance[chain], own);  // the minimum over classes
    }
    __syncthreads();
    for (int i = threadIdx.x; i < all; i += kThreads) Slide(i / classes, i % classes);
    __syncthreads();
    for (int chain = threadIdx.x; chain < a_.chains; chain += kThreads) {
      state_.begin[chain] += state_.advance[chain];
    }
    __syncthreads();
  }

  __device__ void Save() {
    if (blockIdx.x != 0) return;
    for (int i = threadIdx.x; i < rows_ * a_.classes; i += kThreads) a_.states[i] = state_.y[i];
    for (int chain = threadIdx.x; chain < a_.chains; chain += kThreads) {
      a_.begin[chain] = state_.begin[chain];
    }
  }

 private:
  __device__ int Count() const { return static_cast<int>(a_.call.steps.count); }
  __device__ int Windows() const { return 2 * a_.window; }

  // Initialises the chains; the guess for every state of the first window is the initial state.
  __device__ void BeginChains() {
    const int quads = (a_.classes + 3) / 4;
    for (int i = threadIdx.x; i < a_.chains * quads; i += kThreads) {
      const int chain = i / quads;
      const int quad = i % quads;
      const philox::Normals noise = Draw(chain, 0, quad);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int c = 4 * quad + k;
        if (c >= a_.classes) continue;
        const float y = __fadd_rn(state_.prior[chain * a_.classes + c], noise.z[k]);
        for (int step = 0; step < a_.window; ++step) GuessOf(chain, step)[c] = y;
        WriteState(chain, 0, c, y);
      }
    }
  }

  // Writes the final state after `moment` steps to the outputs.
  __device__ void WriteState(int chain, int moment, int c, float y) const {
    if (blockIdx.x != 0) return;
    const std::int64_t row = a_.first_row + chain;
    if (a_.call.trajectory != nullptr) {
      a_.call.trajectory[(moment * a_.call.rows + row) * a_.classes + c] = y;
    }
    if (moment == Count()) a_.call.out[row * a_.classes + c] = y;
  }

  // Noise of four classes: moment 0 is that of the initial state, i that of step i - 1. NaN for a
  // sample outside of the range of keys, which the host has not read.
  __device__ philox::Normals Draw(int chain, int moment, int quad) const {
    const std::int64_t row = a_.first_row + chain;
    if (a_.call.noise != nullptr) {
      const float* from = a_.call.noise + (moment * a_.call.rows + row) * a_.classes;
      InFlight<float> z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (4 * quad + k < a_.classes) z[k] = LoadAhead(from + 4 * quad + k);
      }
      return {{z[0], z[1], z[2], z[3]}};
    }
    const auto timestep =
        static_cast<std::uint32_t>(moment == 0 ? a_.call.steps.start : Timestep(chain, moment - 1));
    const std::int64_t sample = state_.keys[2 * chain + 1];
    if (sample < 0 || sample > philox::kMaxSample) {
      const float nan = nanf("");
      return {{nan, nan, nan, nan}};
    }
    return philox::Normal(a_.call.seed, static_cast<std::uint64_t>(state_.keys[2 * chain]),
                          static_cast<std::uint32_t>(sample), timestep,
                          static_cast<std::uint32_t>(quad));
  }

  // One step of one class, in the reference's order of operations, without contraction to FMA.
  __device__ float TakeStep(int chain, int step, int c, float eps, float y) const {
    const float s = Coefficient(0, chain, step);
    const float prior = state_.prior[chain * a_.classes + c];
    const float rest = __fsub_rn(y, __fmul_rn(__fsub_rn(1.0f, s), prior));
    const float y0 =
        __fmul_rn(__fdiv_rn(1.0f, s), __fsub_rn(rest, __fmul_rn(eps, Coefficient(1, chain, step))));
    const float mean = __fadd_rn(__fadd_rn(__fmul_rn(Coefficient(2, chain, step), y0),
                                           __fmul_rn(Coefficient(3, chain, step), y)),
                                 __fmul_rn(Coefficient(4, chain, step), prior));
    const float moved = __fadd_rn(mean, __fmul_rn(Coefficient(5, chain, step), eps));
    const float sigma = Coefficient(6, chain, step);
    if (!(sigma > 0.0f)) return moved;
    return __fadd_rn(moved, __fmul_rn(sigma, NoiseOf(chain, step)[c]));
  }

  __device__ bool Same(float a, float b) const {
    if (__float_as_uint(a) == __float_as_uint(b)) return true;
    return a_.call.tolerance > 0.0f && fabsf(a - b) <= a_.call.tolerance;
  }

  // Moves a chain's window past its final states. The guesses for states beyond the walked ones use
  // the eps of the last evaluated step.
  __device__ void Slide(int chain, int c) {
    const int begin = state_.begin[chain];
    const int length = Length(chain);
    const int advance = state_.advance[chain];
    for (int k = 1; k <= advance; ++k) WriteState(chain, begin + k, c, WalkedOf(chain, k)[c]);
    float y = 0.0f;
    for (int k = 0; k < a_.window && begin + advance + k < Count(); ++k) {
      y = advance + k <= length
              ? WalkedOf(chain, advance + k)[c]
              : TakeStep(chain, begin + advance + k - 1, c, EpsOf(chain, length - 1)[c], y);
      GuessOf(chain, k)[c] = y;
    }
  }

  // The number of steps in the window.
  __device__ int Length(int chain) const { return min(a_.window, Count() - state_.begin[chain]); }
  __device__ float* GuessOf(int chain, int k) const {
    return state_.y + (chain * a_.window + k) * a_.classes;
  }
  __device__ float* EpsOf(int chain, int k) const {
    return state_.eps + (chain * a_.window + k) * a_.classes;
  }
  __device__ float* WalkedOf(int chain, int k) const {
    return state_.walked + (chain * (a_.window + 1) + k) * a_.classes;
  }

  __device__ float* NoiseOf(int chain, int step) const {
    return state_.noise + (chain * Windows() + step % Windows()) * a_.classes;
  }

  // Of a step in the ring; columns in the order of StepTable.
  __device__ float& Coefficient(int column, int chain, int step) const {
    return state_.coefficients[(column * a_.chains + chain) * Windows() + step % Windows()];
  }
  __device__ int& Timestep(int chain, int step) const {
    return state_.timesteps[chain * Windows() + step % Windows()];
  }

  const KernelArguments& a_;
  BlockState state_;
  int rows_;
};

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_CHAINS_CUH_
