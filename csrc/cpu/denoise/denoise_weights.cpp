#include "cpu/denoise/denoise_weights.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/common/parallel.h"

namespace diffmic::cpu {
namespace {

// A round maps the state and the input to the new state, one to one in either: a change of one
// number always comes through, and that of several but where one happens to undo the others.
std::uint64_t RoundOf(std::uint64_t state, std::uint64_t input) {
  return std::rotl(state + input, 31) * 0x9E3779B185EBCA87u;
}

std::uint64_t Avalanche(std::uint64_t h) {
  h = (h ^ h >> 33) * 0xC2B2AE3D27D4EB4Fu;
  h = (h ^ h >> 29) * 0x165667B19E3779F9u;
  return h ^ h >> 32;
}

// In eight lanes, as fast as memory is read.
std::uint64_t RowFingerprint(const float* row, std::int64_t count, std::uint64_t place) {
  constexpr int kLanes = 8;
  constexpr std::int64_t kFloats = 2 * kLanes;
  std::uint64_t state[kLanes];
  for (int i = 0; i < kLanes; ++i) state[i] = Avalanche(place * kLanes + static_cast<unsigned>(i));
  std::int64_t k = 0;
  for (; k + kFloats <= count; k += kFloats) {
    std::uint64_t input[kLanes];
    std::memcpy(input, row + k, sizeof input);
    for (int i = 0; i < kLanes; ++i) state[i] = RoundOf(state[i], input[i]);
  }
  std::uint64_t rest[kLanes] = {};
  std::memcpy(rest, row + k, static_cast<std::size_t>(count - k) * sizeof(float));
  std::uint64_t h = 0;
  for (int i = 0; i < kLanes; ++i) h = RoundOf(h, Avalanche(RoundOf(state[i], rest[i])));
  return Avalanche(h);
}

// Of rows [first, first + count) of a layer. Rows are added up, each knowing its place.
std::uint64_t RowsFingerprint(const HiddenWeights& weights, int layer, std::int64_t first,
                              std::int64_t count) {
  std::uint64_t sum = 0;
  for (std::int64_t f = first; f < first + count; ++f) {
    sum += RowFingerprint(weights.weight[layer] + f * weights.stride[layer], weights.features,
                          static_cast<std::uint64_t>(layer * weights.features + f));
  }
  return sum;
}

// Calls work(layer, chunk, units) for all chunks of both layers and adds up what it returns.
template <typename Work>
std::uint64_t SumOverChunks(std::int64_t features, int threads, const Work& work) {
  const std::int64_t chunks = (features + kChunk - 1) / kChunk;
  std::vector<std::uint64_t> parts(static_cast<std::size_t>(2 * chunks));
  ParallelFor(2 * chunks, threads, 1 + 100'000 / (kChunk * features),
              [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t i = begin; i < end; ++i) {
                  const std::int64_t first = i % chunks * kChunk;
                  parts[static_cast<std::size_t>(i)] =
                      work(static_cast<int>(i / chunks), i % chunks,
                           static_cast<int>(std::min(kChunk, features - first)));
                }
              });
  std::uint64_t sum = 0;
  for (const std::uint64_t part : parts) sum += part;
  return sum;
}

}  // namespace

PackedWeights::PackedWeights(const HiddenWeights& weights, Precision precision,
                             const DenoiseKernels& kernels, int threads)
    : features_(weights.features) {
  const std::int64_t chunk_bytes = kernels.chunk_bytes(precision, features_);
  layer_bytes_ = (features_ + kChunk - 1) / kChunk * chunk_bytes;
  chunks_ = MakeLargeArray<std::byte>(2 * layer_bytes_);
  if (precision == Precision::kInt8) unit_scale_.resize(static_cast<std::size_t>(2 * features_));
  fingerprint_ = SumOverChunks(features_, threads, [&](int layer, std::int64_t chunk, int units) {
    const std::int64_t first = chunk * kChunk;
    // First, so that what is written meanwhile differs from it at the next call.
    const std::uint64_t fingerprint = RowsFingerprint(weights, layer, first, units);
    kernels.pack_chunk(
        precision, weights.weight[layer] + first * weights.stride[layer], weights.stride[layer],
        units, features_, chunks_.get() + layer * layer_bytes_ + chunk * chunk_bytes,
        unit_scale_.empty() ? nullptr : unit_scale_.data() + layer * features_ + first);
    return fingerprint;
  });
}

std::uint64_t Fingerprint(const HiddenWeights& weights, int threads) {
  return SumOverChunks(weights.features, threads, [&](int layer, std::int64_t chunk, int units) {
    return RowsFingerprint(weights, layer, chunk * kChunk, units);
  });
}

std::shared_ptr<const PackedWeights> WeightCache::Get(const HiddenWeights& weights,
                                                      Precision precision,
                                                      const DenoiseKernels& kernels, int threads) {
  const auto exchange = [&](std::shared_ptr<const PackedWeights>* set, bool put) {
    const std::lock_guard lock(mutex_);  // for no longer than this
    std::shared_ptr<const PackedWeights>& kept = sets_[{precision, &kernels}];
    put ? kept = *set : * set = kept;
  };
  std::shared_ptr<const PackedWeights> set;
  exchange(&set, false);
  if (set != nullptr && set->features() == weights.features &&
      set->fingerprint() == Fingerprint(weights, threads)) {
    return set;
  }
  set.reset();
  exchange(&set, true);  // the old ones' memory first
  set = std::make_shared<PackedWeights>(weights, precision, kernels, threads);
  exchange(&set, true);
  return set;
}

}  // namespace diffmic::cpu
