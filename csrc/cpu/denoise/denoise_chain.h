// What the two drivers of `denoise` (denoise.cpp, denoise_window.cpp) share: the model in the form
// of the kernels, one sweep by a team of threads, the noise, and a step of the chain.
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_CHAIN_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_CHAIN_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>

#include "cpu/common/large_array.h"
#include "cpu/common/parallel.h"
#include "cpu/common/team.h"
#include "cpu/denoise/denoise_kernel_table.h"
#include "cpu/denoise/denoise_options.h"
#include "cpu/denoise/denoise_weights.h"
#include "include/denoise_call.h"
#include "include/philox.h"

namespace diffmic::cpu {

inline std::int64_t RoundUp(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Zeros, aligned to a cache line.
class Floats {
 public:
  explicit Floats(std::int64_t count) : data_(MakeLargeArray<float>(count)) {
    std::fill_n(data_.get(), count, 0.0f);
  }
  float* get() const { return data_.get(); }

 private:
  LargeArray<float> data_;
};

// The model in the form of the kernels: BatchNorm folded, small weights transposed, hidden weights
// packed.
class PreparedModel {
 public:
  PreparedModel(const DenoiseCall& call, const DenoiseOptions& options)
      : stride_(RoundUp(call.weights.features, 32) + 16),
        folded_(6 * stride_),
        small_(3 * call.weights.classes * stride_),
        packed_(Pack(call, options)) {
    const DenoiserWeights& weights = call.weights;
    const std::int64_t features = weights.features;
    view_.features = features;
    view_.classes = weights.classes;
    view_.stride = stride_;
    for (int i = 0; i < 3; ++i) {
      const ConditionalLayer& layer = weights.layers[i];
      float* gain = folded_.get() + 2 * i * stride_;
      float* offset = gain + stride_;
      for (std::int64_t f = 0; f < features; ++f) {
        const double g = static_cast<double>(layer.norm_weight[f]) /
                         std::sqrt(static_cast<double>(layer.running_var[f]) + layer.eps);
        gain[f] = static_cast<float>(g);
        offset[f] = static_cast<float>(layer.norm_bias[f] - layer.running_mean[f] * g);
      }
      view_.layers[i] = {i == 0 ? nullptr : packed_->chunks(i - 1),
                         i == 0 ? nullptr : packed_->channel_scale(i - 1),
                         layer.bias,
                         layer.gamma,
                         layer.gamma_stride,
                         gain,
                         offset};
    }
    float* label = small_.get();
    for (std::int64_t c = 0; c < 2 * weights.classes; ++c) {
      for (std::int64_t f = 0; f < features; ++f) {
        label[c * stride_ + f] =
            weights.layers[0].weight[f * weights.layers[0].weight_stride[0] + c];
      }
    }
    view_.label_weight = label;
    float* output = label + 2 * weights.classes * stride_;
    for (std::int64_t c = 0; c < weights.classes; ++c) {
      std::copy_n(weights.output_weight + c * weights.output_stride, features,
                  output + c * stride_);
    }
    view_.output_weight = output;
  }

  const DenoiserView& view() const { return view_; }

 private:
  static std::shared_ptr<const PackedWeights> Pack(const DenoiseCall& call,
                                                   const DenoiseOptions& options) {
    const ConditionalLayer* hidden = call.weights.layers + 1;
    const HiddenWeights matrices{call.weights.features,
                                 {hidden[0].weight, hidden[1].weight},
                                 {hidden[0].weight_stride[0], hidden[1].weight_stride[0]}};
    if (options.cache != nullptr) {
      return options.cache->Get(matrices, *options.kernels, options.threads);
    }
    return std::make_shared<PackedWeights>(matrices, *options.kernels, options.threads);
  }

  std::int64_t stride_;
  Floats folded_, small_;
  std::shared_ptr<const PackedWeights> packed_;
  DenoiserView view_{};
};

// Asks the caller every tenth of a second whether to continue.
class Watch {
 public:
  Watch(const DenoiseOptions& options, std::int64_t total)
      : ask_(options.watch), total_(total), last_(Clock::now()) {}

  // Visible to all threads. Work that was skipped because of it is discarded after the barrier.
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

  // On the caller's thread only.
  void Look(std::int64_t done) {
    if (!ask_ || stopped()) return;
    const Clock::time_point now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    stopped_ = !ask_(done, total_);
  }

  // Reports the end, however recent the last report.
  void Finish() {
    if (ask_ && !stopped()) stopped_ = !ask_(total_, total_);
  }

 private:
  using Clock = std::chrono::steady_clock;
  const std::function<bool(std::int64_t, std::int64_t)>& ask_;
  std::int64_t total_;
  Clock::time_point last_;
  std::atomic<bool> stopped_{false};
};

// eps of all active rows, computed by a team of threads, layer by layer with barriers in between:
//
//   first layer | hidden layer 1 | hidden layer 2 and the chunks' shares in the output layer
//
// Threads take chunks dynamically, so one that is preempted takes fewer. No result depends on which
// thread computed what: a chunk has the same bits anywhere, and shares are added in chunk order.
class Evaluation {
 public:
  Evaluation(const DenoiserView& model, const DenoiseOptions& options, std::int64_t max_rows,
             std::int64_t max_slots)
      : model_(model),
        options_(options),
        chunks_((model.features + kChunk - 1) / kChunk),
        first_(max_rows * model.stride),
        second_(max_rows * model.stride),
        row_scale_(options.kernels->precision == Precision::kInt8 ? max_rows : 0),
        shares_(chunks_ * max_rows * model.classes),
        workspace_stride_(
            RoundUp(options.kernels->workspace(max_rows, max_slots, ChunksPerCall(max_rows)), 16)),
        workspace_(workspace_stride_ * options.threads) {}

  // One sweep; called by every thread. The last one to arrive at the final barrier calls between(),
  // which may call SumShares.
  template <typename Between>
  void Sweep(Team& team, int rank, const RowsView& rows, Watch& watch, std::int64_t done,
             const Between& between) {
    const DenoiseKernels& kernels = *options_.kernels;
    float* workspace = workspace_.get() + rank * workspace_stride_;
    // The next item of a phase of `count` items, or -1.
    const auto take = [&](std::int64_t count) {
      if (rank == 0) watch.Look(done);
      const std::int64_t i = team.Take();
      return i < count && !watch.stopped() ? i : -1;
    };
    for (std::int64_t i; (i = take(chunks_)) >= 0;) {
      kernels.first_layer(model_, rows, i, workspace, first_.get());
    }
    team.Barrier();
    // The scale of a row needs all of its elements, so with kInt8 a layer's float32 output is
    // quantised from one buffer to the other; otherwise the layers alternate between the buffers.
    const bool quantised = kernels.precision == Precision::kInt8;
    const std::int64_t group = ChunksPerCall(rows.count);
    for (int layer = 1; layer <= 2; ++layer) {
      if (quantised) {
        for (std::int64_t i; (i = take(kernels.tiles(rows.count))) >= 0;) {
          kernels.quantise_tile(model_, rows.count, i, first_.get(), second_.get(),
                                row_scale_.get());
        }
        team.Barrier();
      }
      const Floats& in = quantised || layer == 2 ? second_ : first_;
      const Floats& out = layer == 2 ? shares_ : quantised ? first_ : second_;
      for (std::int64_t i; (i = take((chunks_ + group - 1) / group)) >= 0;) {
        kernels.hidden_layer(model_, layer, rows, {i * group, std::min(group, chunks_ - i * group)},
                             in.get(), row_scale_.get(), workspace, out.get());
      }
      layer == 1 ? team.Barrier() : team.Barrier(between);
    }
  }

  // eps [rows, C] after a sweep.
  void SumShares(std::int64_t rows, const float* bias, float* eps) const {
    const std::int64_t count = rows * model_.classes;
    std::fill_n(eps, count, 0.0f);
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const float* share = shares_.get() + chunk * count;
      for (std::int64_t i = 0; i < count; ++i) eps[i] += share[i];
    }
    for (std::int64_t i = 0; i < count; ++i) eps[i] += bias[i % model_.classes];
  }

 private:
  // As many as the kernels prefer, as long as each thread has several groups to take.
  std::int64_t ChunksPerCall(std::int64_t rows) const {
    const std::int64_t fair = chunks_ / (4 * options_.threads);
    return std::clamp<std::int64_t>(fair, 1, options_.kernels->chunks_per_call(rows));
  }

  const DenoiserView& model_;
  const DenoiseOptions& options_;
  std::int64_t chunks_;
  Floats first_, second_, row_scale_, shares_;
  std::int64_t workspace_stride_;
  Floats workspace_;
};

// The noise of one moment of a chain: moment 0 is that of its initial state, moment i is z of step
// i - 1.
inline void Draw(const DenoiseCall& call, std::int64_t moment, std::int64_t first_row,
                 std::int64_t rows, std::int64_t classes, float* z) {
  if (call.noise != nullptr) {
    std::copy_n(call.noise + (moment * call.rows + first_row) * classes, rows * classes, z);
    return;
  }
  const auto timestep =
      static_cast<std::uint32_t>(moment == 0 ? call.steps.start : call.steps.timesteps[moment - 1]);
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto image = static_cast<std::uint64_t>(call.image_ids[first_row + row]);
    const auto sample = static_cast<std::uint32_t>(call.sample_ids[first_row + row]);
    for (std::int64_t c = 0; c < classes; c += 4) {
      const philox::Normals normals =
          philox::Normal(call.seed, image, sample, timestep, static_cast<std::uint32_t>(c / 4));
      std::copy_n(normals.z, std::min<std::int64_t>(4, classes - c), z + row * classes + c);
    }
  }
}

// One step of the chain, each operation rounded on its own, in the reference's order
// (docs/algorithm.md, "Sampling").
inline void Move(const StepTable& steps, std::int64_t i, const float* prior, const float* eps,
                 const float* z, std::int64_t count, float* y) {
  const float inverse = 1.0f / steps.s()[i];
  const float rest = 1.0f - steps.s()[i];
  for (std::int64_t j = 0; j < count; ++j) {
    const float y0 = inverse * (y[j] - rest * prior[j] - eps[j] * steps.q()[i]);
    const float mean =
        steps.y0_weight()[i] * y0 + steps.y_weight()[i] * y[j] + steps.prior_weight()[i] * prior[j];
    y[j] = mean + steps.eps_weight()[i] * eps[j];
    if (steps.sigma()[i] > 0.0f) y[j] += steps.sigma()[i] * z[j];
  }
}

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_CHAIN_H_
