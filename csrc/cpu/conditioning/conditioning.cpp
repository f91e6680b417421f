#include "cpu/conditioning/conditioning.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu/common/cpu_capabilities.h"
#include "cpu/common/large_array.h"
#include "cpu/common/parallel.h"
#include "cpu/conditioning/conditioning_kernel_table.h"

namespace diffmic::cpu::conditioning {
namespace {

std::size_t Size(std::int64_t count) { return static_cast<std::size_t>(count); }

// What the chunks of a call read and write besides its arguments: the labels packed into one array,
// and pointers to the rows of gamma.
class Prepared {
 public:
  Prepared(const Layer& layer, const Batch& batch, float* gamma_gradient)
      : call_{layer, batch, 2 * layer.classes + 1, nullptr, nullptr, nullptr} {
    PackLabels();
    for (std::int64_t b = 0; b < batch.rows; ++b) {
      const std::int64_t t = batch.timesteps[b * batch.timestep_stride];
      gamma_.push_back(layer.gamma + t * layer.gamma_stride);
      if (gamma_gradient != nullptr) {
        gamma_gradient_.push_back(gamma_gradient + t * layer.features);
      }
    }
    call_.labels = labels_.get();
    call_.gamma = gamma_.data();
    if (gamma_gradient != nullptr) call_.gamma_gradient = gamma_gradient_.data();
  }

  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  const Call& call() const { return call_; }

 private:
  void PackLabels() {
    const Batch& batch = call_.batch;
    labels_ =
        std::make_unique_for_overwrite<float[]>(Size(batch.streams * batch.rows * call_.inputs));
    float* to = labels_.get();
    for (std::int64_t s = 0; s < batch.streams; ++s) {
      for (std::int64_t b = 0; b < batch.rows; ++b) {
        *to++ = 1.0f;
        for (const Labels* half : {&batch.y, &batch.guidance}) {
          const float* row = half->data + s * half->stride[0] + b * half->stride[1];
          for (std::int64_t c = 0; c < call_.layer.classes; ++c) *to++ = row[c * half->stride[2]];
        }
      }
    }
  }

  Call call_;
  std::unique_ptr<float[]> labels_;
  std::vector<const float*> gamma_;
  std::vector<float*> gamma_gradient_;
};

void MakeLabels(const Layer& layer, const Batch& batch, const Noising& noising) {
  const std::int64_t classes = layer.classes;
  for (std::int64_t b = 0; b < batch.rows; ++b) {
    const Mixture mixture = MixtureOf(noising, batch.timesteps[b * batch.timestep_stride]);
    const float* y_0 = noising.y_0 + b * noising.y_0_stride[0];
    for (std::int64_t block = 0; 4 * block < classes; ++block) {
      const philox::Normals noise = NoiseOf(noising, b, block, classes);
      for (std::int64_t c = 4 * block; c < std::min(4 * block + 4, classes); ++c) {
        const float z = noise.z[c % 4];
        if (noising.drawn != nullptr) noising.drawn[b * classes + c] = z;
        for (std::int64_t s = 0; s < batch.streams; ++s) {
          const auto& stride = batch.guidance.stride;
          const float prior = batch.guidance.data[s * stride[0] + b * stride[1] + c * stride[2]];
          noising.y[(s * batch.rows + b) * classes + c] =
              NoisyLabel(mixture, y_0[c * noising.y_0_stride[1]], prior, z);
        }
      }
    }
  }
}

// F in chunks, grouped into shares that one thread takes at a time. The gradients of the labels
// have partial sums per share.
struct Shares {
  explicit Shares(std::int64_t features)
      : channels(features),
        chunks((features + kChannels - 1) / kChannels),
        count(std::min<std::int64_t>(chunks, 32)) {}

  // Calls body(channel, count) for the chunks of a share.
  template <typename Body>
  void ForEach(std::int64_t share, const Body& body) const {
    for (std::int64_t i = chunks * share / count; i < chunks * (share + 1) / count; ++i) {
      body(i * kChannels, std::min(kChannels, channels - i * kChannels));
    }
  }

  std::int64_t channels, chunks, count;
};

// In multiply-adds.
double Work(const Call& call, bool backward) {
  const double elements = static_cast<double>(call.batch.streams) *
                          static_cast<double>(call.batch.rows) *
                          static_cast<double>(call.layer.features);
  return elements * (static_cast<double>(call.inputs) * (backward ? 2 : 1) + (backward ? 60 : 30));
}

// Adds up sums [shares, S, B, 2 C] to the gradients of y and guidance.
void WriteLabels(const Call& call, std::int64_t shares, const float* sums,
                 const Gradients& gradients) {
  const std::int64_t classes = call.layer.classes;
  const std::int64_t rows = call.batch.streams * call.batch.rows;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t c = 0; c < 2 * classes; ++c) {
      double sum = 0;
      for (std::int64_t i = 0; i < shares; ++i) {
        sum += static_cast<double>(sums[(i * rows + row) * 2 * classes + c]);
      }
      float* to = c < classes ? gradients.y : gradients.guidance;
      if (to != nullptr) to[row * classes + c % classes] = static_cast<float>(sum);
    }
  }
}

}  // namespace

void Forward(const ForwardCall& forward, const Options& options) {
  const Layer& layer = forward.layer;
  if (forward.noising.y_0 != nullptr) MakeLabels(layer, forward.batch, forward.noising);
  const Prepared prepared(layer, forward.batch, nullptr);
  const Call& call = prepared.call();
  const Shares shares(layer.features);
  Share(Work(call, false), options.threads, [&](std::atomic<std::int64_t>& next) {
    const auto workspace = MakeLargeArray<float>(ForwardWorkspace(call));
    for (std::int64_t i; (i = next++) < shares.count;) {
      shares.ForEach(i, [&](std::int64_t channel, std::int64_t count) {
        options.kernels->forward(call, forward.running, channel, count, workspace.get(),
                                 forward.statistics, forward.out);
      });
    }
  });
}

void Backward(const BackwardCall& backward, const Options& options) {
  const Layer& layer = backward.layer;
  const Batch& batch = backward.batch;
  const Gradients& gradients = backward.gradients;
  const Prepared prepared(layer, batch, gradients.gamma);
  const Call& call = prepared.call();
  const Shares shares(layer.features);
  const bool labels = gradients.y != nullptr || gradients.guidance != nullptr;
  const std::int64_t label_count = labels ? batch.streams * batch.rows * 2 * layer.classes : 0;
  std::vector<float> label_sums(Size(shares.count * label_count));
  Share(Work(call, true), options.threads, [&](std::atomic<std::int64_t>& next) {
    const auto workspace = MakeLargeArray<float>(BackwardWorkspace(call));
    for (std::int64_t i; (i = next++) < shares.count;) {
      float* sums = labels ? label_sums.data() + i * label_count : nullptr;
      shares.ForEach(i, [&](std::int64_t channel, std::int64_t count) {
        options.kernels->backward(call, backward.grad, backward.grad_stride, backward.statistics,
                                  gradients, channel, count, workspace.get(), sums);
      });
    }
  });
  if (labels) WriteLabels(call, shares.count, label_sums.data(), gradients);
}

namespace {

constexpr IsaEntry<Kernels> kTables[] = {
#if defined(__x86_64__)
    {Isa::kAvx512, &avx512::kConditioningKernels},
    {Isa::kAvx2, &avx2::kConditioningKernels},
#endif
    {Isa::kPortable, &portable::kConditioningKernels},
};

}  // namespace

const Kernels* FindKernels(const std::string& name) {
  return cpu::FindKernels(kTables, IsaOf(name));
}

std::vector<std::string> KernelNames() { return IsaNames(kTables); }

}  // namespace diffmic::cpu::conditioning
