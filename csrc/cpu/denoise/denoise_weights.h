// The hidden layers' weights, packed for the kernels of `denoise`: once per model, and again when
// they have changed.
//
// A tensor's version counter misses writes through `.data` or from NumPy. So every call hashes all
// weights, which costs reading them once, as much as one step of few rows, and repacks them if the
// hash differs.
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_WEIGHTS_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_WEIGHTS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/common/large_array.h"
#include "cpu/denoise/denoise_kernel_table.h"

namespace diffmic::cpu {

// The two hidden layers' [F, F]; strides in elements, rows of unit stride.
struct HiddenWeights {
  std::int64_t features;
  const float* weight[2];
  std::int64_t stride[2];
};

class PackedWeights {
 public:
  PackedWeights(const HiddenWeights& weights, const DenoiseKernels& kernels, int threads);

  // A layer's packed chunks, and with kInt8 the scales [F] of its output channels, else null.
  const std::byte* chunks(int layer) const { return chunks_.get() + layer * layer_bytes_; }
  const float* channel_scale(int layer) const {
    return channel_scale_.empty() ? nullptr : channel_scale_.data() + layer * features_;
  }
  std::int64_t features() const { return features_; }
  std::uint64_t fingerprint() const { return fingerprint_; }

 private:
  std::int64_t features_, layer_bytes_;
  LargeArray<std::byte> chunks_;
  std::vector<float> channel_scale_;
  std::uint64_t fingerprint_;
};

// A position-dependent 64-bit hash of the weights. A single changed weight always changes it; other
// changes collide with probability 2^-64.
std::uint64_t Fingerprint(const HiddenWeights& weights, int threads);

// A model's packed weights, one entry per precision and instruction set in use. Thread-safe.
class WeightCache {
 public:
  // The current `weights`, packed.
  std::shared_ptr<const PackedWeights> Get(const HiddenWeights& weights,
                                           const DenoiseKernels& kernels, int threads);

 private:
  std::mutex mutex_;
  std::map<const DenoiseKernels*, std::shared_ptr<const PackedWeights>> entries_;
};

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_WEIGHTS_H_
