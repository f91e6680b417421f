#include "cpu/denoise/denoise_weights.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/common/parallel.h"

namespace diffmic::cpu {
namespace {

// Injective in the state and in the input: a single change always propagates.
std::uint64_t Mix(std::uint64_t state, std::uint64_t input) {
  return std::rotl(state + input, 31) * 0x9E3779B185EBCA87u;
}

std::uint64_t Avalanche(std::uint64_t h) {
  h = (h ^ h >> 33) * 0xC2B2AE3D27D4EB4Fu;
  h = (h ^ h >> 29) * 0x165667B19E3779F9u;
  return h ^ h >> 32;
}

// Eight independent lanes, as fast as memory is read.
std::uint64_t RowFingerprint(const float* row, std::int64_t count, std::uint64_t position) {
  constexpr int kLanes = 8;
  constexpr std::int64_t kFloats = 2 * kLanes;
  std::uint64_t state[kLanes];
  for (int i = 0; i < kLanes; ++i)
    state[i] = Avalanche(position * kLanes + static_cast<unsigned>(i));
  std::int64_t k = 0;
  for (; k + kFloats <= count; k += kFloats) {
    std::uint64_t input[kLanes];
    std::memcpy(input, row + k, sizeof input);
    for (int i = 0; i < kLanes; ++i) state[i] = Mix(state[i], input[i]);
  }
  std::uint64_t rest[kLanes] = {};
  std::memcpy(rest, row + k, static_cast<std::size_t>(count - k) * sizeof(float));
  std::uint64_t h = 0;
  for (int i = 0; i < kLanes; ++i) h = Mix(h, Avalanche(Mix(state[i], rest[i])));
  return Avalanche(h);
}

// Of rows [first, first + count) of a layer: a sum of hashes that depend on the row's position.
std::uint64_t RowsFingerprint(const HiddenWeights& weights, int layer, std::int64_t first,
                              std::int64_t count) {
  std::uint64_t sum = 0;
  for (std::int64_t f = first; f < first + count; ++f) {
    sum += RowFingerprint(weights.weight[layer] + f * weights.stride[layer], weights.features,
                          static_cast<std::uint64_t>(layer * weights.features + f));
  }
  return sum;
}

// The sum of work(layer, chunk, channels) over all chunks of both layers.
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

PackedWeights::PackedWeights(const HiddenWeights& weights, const DenoiseKernels& kernels,
                             int threads)
    : features_(weights.features) {
  const std::int64_t chunk_bytes = kernels.chunk_bytes(features_);
  layer_bytes_ = (features_ + kChunk - 1) / kChunk * chunk_bytes;
  chunks_ = MakeLargeArray<std::byte>(2 * layer_bytes_);
  if (kernels.precision == Precision::kInt8) {
    channel_scale_.resize(static_cast<std::size_t>(2 * features_));
  }
  fingerprint_ = SumOverChunks(features_, threads, [&](int layer, std::int64_t chunk, int count) {
    const std::int64_t first = chunk * kChunk;
    // Before packing, so that a concurrent write changes the hash of the next call.
    const std::uint64_t fingerprint = RowsFingerprint(weights, layer, first, count);
    kernels.pack_chunk(
        weights.weight[layer] + first * weights.stride[layer], weights.stride[layer], count,
        features_, chunks_.get() + layer * layer_bytes_ + chunk * chunk_bytes,
        channel_scale_.empty() ? nullptr : channel_scale_.data() + layer * features_ + first);
    return fingerprint;
  });
}

std::uint64_t Fingerprint(const HiddenWeights& weights, int threads) {
  return SumOverChunks(weights.features, threads, [&](int layer, std::int64_t chunk, int count) {
    return RowsFingerprint(weights, layer, chunk * kChunk, count);
  });
}

std::shared_ptr<const PackedWeights> WeightCache::Get(const HiddenWeights& weights,
                                                      const DenoiseKernels& kernels, int threads) {
  // The lock is held for map accesses only, never while hashing or packing.
  std::shared_ptr<const PackedWeights> packed;
  {
    const std::lock_guard lock(mutex_);
    packed = entries_[&kernels];
  }
  if (packed != nullptr && packed->features() == weights.features &&
      packed->fingerprint() == Fingerprint(weights, threads)) {
    return packed;
  }
  packed.reset();
  {
    const std::lock_guard lock(mutex_);
    entries_[&kernels].reset();  // frees the old entry before its successor is allocated
  }
  packed = std::make_shared<PackedWeights>(weights, kernels, threads);
  const std::lock_guard lock(mutex_);
  return entries_[&kernels] = packed;
}

}  // namespace diffmic::cpu
