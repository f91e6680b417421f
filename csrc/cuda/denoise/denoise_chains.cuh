// The chains of a launch of `denoise`: states, noise and windows of steps (docs/algorithm.md,
// "Windows of steps"). Every thread block holds a copy in shared memory and updates it with the
// same values, so blocks exchange nothing for it: 20 bytes per row and class, 12 per chain and
// class.
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_CHAINS_CUH_
#define DIFFMIC_CUDA_DENOISE_DENOISE_CHAINS_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/denoise/denoise_arguments.h"
#include "cuda/denoise/denoise_layout.cuh"
#include "include/philox.h"

namespace diffmic::cuda::denoise {

// A block's copy, in shared memory. Row r is step r % window in the window of chain r / window.
struct BlockState {
  float* y;         // [rows, C], the states that eps is evaluated at
  float* eps;       // [rows, C]
  float* walked;    // [chains, window + 1, C]
  float* noise;     // [chains, 2 window, C], a ring: step i at i % (2 window)
  float* prior;     // [chains, C]
  float* guidance;  // [chains, C]
  int* begin;       // [chains], the first step that is not final
  int* advance;     // [chains], steps that the last sweep made final
  int* timestep;    // [rows]
};

__host__ __device__ inline std::size_t BlockStateBytes(int chains, int window, int classes) {
  const std::size_t rows = static_cast<std::size_t>(chains) * window;
  const std::size_t vectors = 4 * rows + 3 * static_cast<std::size_t>(chains) + rows;
  return (vectors * classes + 2 * static_cast<std::size_t>(chains) + rows) * 4;
}

__device__ inline BlockState CarveState(void* memory, int chains, int window, int classes) {
  const int rows = chains * window;
  BlockState state;
  state.y = static_cast<float*>(memory);
  state.eps = state.y + rows * classes;
  state.walked = state.eps + rows * classes;
  state.noise = state.walked + (rows + chains) * classes;
  state.prior = state.noise + 2 * rows * classes;
  state.guidance = state.prior + chains * classes;
  state.begin = reinterpret_cast<int*>(state.guidance + chains * classes);
  state.advance = state.begin + chains;
  state.timestep = state.advance + chains;
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
      state_.advance[chain] = Windows();  // DrawNoise fills the whole ring
    }
    if (!a_.fresh) {
      for (int i = threadIdx.x; i < rows_ * classes; i += kThreads) state_.y[i] = a_.states[i];
    }
    __syncthreads();
    if (a_.fresh) BeginChains();
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

  // Sets the timestep of every row. Rows beyond the end of a chain repeat its last step, unused.
  __device__ void PlaceRows() {
    for (int row = threadIdx.x; row < rows_; row += kThreads) {
      const int step = min(state_.begin[row / a_.window] + row % a_.window, Count() - 1);
      state_.timestep[row] = static_cast<int>(a_.call.steps.timesteps[step]);
    }
    __syncthreads();
  }

  // Draws the noise of the steps that the last advance moved into the ring.
  __device__ void DrawNoise() {
    const int quads = (a_.classes + 3) / 4;
    for (int i = threadIdx.x; i < a_.chains * Windows() * quads; i += kThreads) {
      const int chain = i / (Windows() * quads);
      const int ahead = i / quads % Windows();
      const int step = state_.begin[chain] + ahead;
      if (ahead < Windows() - state_.advance[chain] || step >= Count()) continue;
      if (!(Coefficient(6, step) > 0.0f)) continue;  // the step adds no noise
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
      philox::Normals given;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        given.z[k] = 4 * quad + k < a_.classes ? from[4 * quad + k] : 0.0f;
      }
      return given;
    }
    const auto timestep = static_cast<std::uint32_t>(
        moment == 0 ? a_.call.steps.start : a_.call.steps.timesteps[moment - 1]);
    const std::int64_t sample = a_.call.sample_ids[row];
    if (sample < 0 || sample > philox::kMaxSample) {
      const float nan = nanf("");
      return {{nan, nan, nan, nan}};
    }
    return philox::Normal(a_.call.seed, static_cast<std::uint64_t>(a_.call.image_ids[row]),
                          static_cast<std::uint32_t>(sample), timestep,
                          static_cast<std::uint32_t>(quad));
  }

  // One step of one class, in the reference's order of operations, without contraction to FMA.
  __device__ float TakeStep(int chain, int step, int c, float eps, float y) const {
    const float s = Coefficient(0, step);
    const float prior = state_.prior[chain * a_.classes + c];
    const float rest = __fsub_rn(y, __fmul_rn(__fsub_rn(1.0f, s), prior));
    const float y0 =
        __fmul_rn(__fdiv_rn(1.0f, s), __fsub_rn(rest, __fmul_rn(eps, Coefficient(1, step))));
    const float mean = __fadd_rn(
        __fadd_rn(__fmul_rn(Coefficient(2, step), y0), __fmul_rn(Coefficient(3, step), y)),
        __fmul_rn(Coefficient(4, step), prior));
    const float moved = __fadd_rn(mean, __fmul_rn(Coefficient(5, step), eps));
    const float sigma = Coefficient(6, step);
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

  __device__ float Coefficient(int column, int step) const {
    return a_.call.steps.coefficients[column * a_.call.steps.count + step];
  }

  const KernelArguments& a_;
  BlockState state_;
  int rows_;
};

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_CHAINS_CUH_
