// The hidden layers' weights as the kernels of `denoise` read them: packed once a model, and again
// when they have changed.
//
// Nothing tells a change for certain: a version number does not count writes through `.data`, or
// from NumPy. So every call takes a fingerprint of all weights, which costs reading them once, as
// much as one step over few rows. Packed weights whose fingerprint differs are packed anew.
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_WEIGHTS_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_WEIGHTS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
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
  PackedWeights(const HiddenWeights& weights, Precision precision, const DenoiseKernels& kernels,
                int threads);

  // The layer's chunks, and with kInt8 the steps of its units.
  const std::byte* chunks(int layer) const { return chunks_.get() + layer * layer_bytes_; }
  const float* unit_scale(int layer) const {
    return unit_scale_.empty() ? nullptr : unit_scale_.data() + layer * features_;
  }
  std::int64_t features() const { return features_; }
  std::uint64_t fingerprint() const { return fingerprint_; }

 private:
  std::int64_t features_, layer_bytes_;
  LargeArray<std::byte> chunks_;
  std::vector<float> unit_scale_;
  std::uint64_t fingerprint_;
};

// 64 bits of every bit of the weights and of where it stands: one changed number always changes
// them, other changes but one in 2^64 do.
std::uint64_t Fingerprint(const HiddenWeights& weights, int threads);

// A model's packed weights, one set for each precision and instruction set that was asked for.
class WeightCache {
 public:
  // Those of `weights` as they are now. May be called by several threads.
  std::shared_ptr<const PackedWeights> Get(const HiddenWeights& weights, Precision precision,
                                           const DenoiseKernels& kernels, int threads);

 private:
  std::mutex mutex_;
  std::map<std::pair<Precision, const DenoiseKernels*>, std::shared_ptr<const PackedWeights>> sets_;
};

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_WEIGHTS_H_
