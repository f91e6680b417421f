// What the drivers of `denoise` stand on: the model as the kernels want it, eps of a block of rows
// computed by a team of threads, the noise, and the step of the chain.
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
#include "cpu/denoise/denoise.h"
#include "cpu/denoise/denoise_kernel_table.h"
#include "cpu/denoise/denoise_weights.h"
#include "include/philox.h"

namespace diffmic::cpu {

inline std::int64_t RoundUp(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// Floats on a cache line's boundary, zeroed.
class Floats {
 public:
  explicit Floats(std::int64_t count) : data_(MakeLargeArray<float>(count)) {
    std::fill_n(data_.get(), count, 0.0f);
  }
  float* get() const { return data_.get(); }

 private:
  LargeArray<float> data_;
};

// The model in the form the kernels want: folded, transposed where it is small, and packed.
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
                         i == 0 ? nullptr : packed_->unit_scale(i - 1),
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
      return options.cache->Get(matrices, call.precision, *options.kernels, options.threads);
    }
    return std::make_shared<PackedWeights>(matrices, call.precision, *options.kernels,
                                           options.threads);
  }

  std::int64_t stride_;
  Floats folded_, small_;
  std::shared_ptr<const PackedWeights> packed_;
  DenoiserView view_{};
};

// Asks the caller now and then whether to go on.
class Watch {
 public:
  Watch(const DenoiseOptions& options, std::int64_t total)
      : ask_(options.watch), total_(total), last_(Clock::now()) {}

  // Seen by all threads; whether work that was skipped for it matters is settled at a meeting.
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

  // From the caller's thread only.
  void Look(std::int64_t done) {
    if (!ask_ || stopped()) return;
    const Clock::time_point now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    stopped_ = !ask_(done, total_);
  }

  // Reports the end, whatever the time.
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

// eps of the rows in work: what the threads of a team compute together, phase by phase.
class Evaluation {
 public:
  Evaluation(const DenoiserView& model, Precision precision, const DenoiseOptions& options,
             std::int64_t max_rows, std::int64_t max_slots)
      : model_(model),
        precision_(precision),
        options_(options),
        chunks_((model.features + kChunk - 1) / kChunk),
        first_(max_rows * model.stride),
        second_(max_rows * model.stride),
        row_scale_(precision == Precision::kInt8 ? max_rows : 0),
        partial_(chunks_ * max_rows * model.classes),
        scratch_stride_(RoundUp(
            options.kernels->scratch(precision, max_rows, max_slots, GroupOf(max_rows)), 16)),
        scratch_(scratch_stride_ * options.threads) {}

  // Every thread calls it; between() is called once, when eps(row, c) can be had.
  template <typename Between>
  void Step(Team& team, int rank, const RowsView& rows, Watch& watch, std::int64_t done,
            const Between& between) {
    const DenoiseKernels& kernels = *options_.kernels;
    const Precision precision = precision_;
    float* scratch = scratch_.get() + rank * scratch_stride_;
    const auto phase = [&](std::int64_t count, const auto& work) {
      for (std::int64_t i = team.Take(); i < count && !watch.stopped(); i = team.Take()) {
        work(i);
        if (rank == 0) watch.Look(done);
      }
    };
    const std::int64_t group = GroupOf(rows.count);
    const auto groups = [&](const auto& work) {
      phase((chunks_ + group - 1) / group, [&](std::int64_t i) {
        work(ChunkRange{i * group, std::min(group, chunks_ - i * group)});
      });
    };
    // Bytes need the largest number of a whole row, so there activations go from one array to the
    // other between the layers; else the layers take turns in them.
    const bool bytes = precision == Precision::kInt8;
    const auto to_bytes = [&] {
      phase(kernels.tiles(rows.count), [&](std::int64_t tile) {
        kernels.to_bytes(model_, rows.count, tile, first_.get(), second_.get(), row_scale_.get());
      });
      team.Meet();
    };
    phase(chunks_, [&](std::int64_t chunk) {
      kernels.first(model_, precision, rows, chunk, scratch, first_.get());
    });
    team.Meet();
    if (bytes) to_bytes();
    const float* in = bytes ? second_.get() : first_.get();
    float* out = bytes ? first_.get() : second_.get();
    groups([&](ChunkRange chunks) {
      kernels.second(model_, precision, rows, chunks, in, row_scale_.get(), scratch, out);
    });
    team.Meet();
    if (bytes) to_bytes();
    groups([&](ChunkRange chunks) {
      kernels.third(model_, precision, rows, chunks, second_.get(), row_scale_.get(), scratch,
                    partial_.get());
    });
    team.Meet(between);
  }

  // eps [rows, C] without the bias, after a step.
  void SumParts(std::int64_t rows, const float* bias, float* eps) const {
    const std::int64_t count = rows * model_.classes;
    std::fill_n(eps, count, 0.0f);
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const float* part = partial_.get() + chunk * count;
      for (std::int64_t i = 0; i < count; ++i) eps[i] += part[i];
    }
    for (std::int64_t i = 0; i < count; ++i) eps[i] += bias[i % model_.classes];
  }

 private:
  // Chunks that a thread computes together: as many as the kernels want for so many rows, as long
  // as each thread has several groups. No result depends on it.
  std::int64_t GroupOf(std::int64_t rows) const {
    const std::int64_t fair = chunks_ / (4 * options_.threads);
    return std::clamp<std::int64_t>(fair, 1, options_.kernels->group(precision_, rows));
  }

  const DenoiserView& model_;
  Precision precision_;
  const DenoiseOptions& options_;
  std::int64_t chunks_;
  Floats first_, second_, row_scale_, partial_;
  std::int64_t scratch_stride_;
  Floats scratch_;
};

// The noise of one moment of a chain: moment 0 makes its beginning, moment i is z of step i - 1.
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

// One step of one row, each operation rounded on its own, in the definition's order.
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
