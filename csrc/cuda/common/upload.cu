// A launch stores 3968 bytes, so that its parameters stay below the 4096 that every GPU takes: one
// block, one word per thread at a time. Bound by the launches, about 2 us for 4 KB.
#include "cuda/common/upload.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda/common/launch.cuh"

namespace diffmic::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kChunk = 3968;

struct Chunk {
  std::uint32_t words[kChunk / 4];
};

// Stores the first `bytes` bytes of the chunk.
__global__ void __launch_bounds__(kThreads)
    StoreChunk(const __grid_constant__ Chunk chunk, int bytes, unsigned char* to) {
  for (int i = static_cast<int>(threadIdx.x); 4 * i < bytes; i += kThreads) {
    const std::uint32_t word = chunk.words[i];
    if (4 * i + 4 <= bytes) {
      reinterpret_cast<std::uint32_t*>(to)[i] = word;
    } else {
      for (int k = 0; 4 * i + k < bytes; ++k) {
        to[4 * i + k] = static_cast<unsigned char>(word >> (8 * k));
      }
    }
  }
}

}  // namespace

void Upload(const void* from, std::int64_t bytes, void* to, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(1);
  shape.block = dim3(kThreads);
  shape.stream = stream;
  for (std::int64_t begin = 0; begin < bytes; begin += kChunk) {
    const auto size = static_cast<int>(std::min(kChunk, bytes - begin));
    Chunk chunk{};
    std::memcpy(&chunk, static_cast<const unsigned char*>(from) + begin,
                static_cast<std::size_t>(size));
    Launch("upload", StoreChunk, shape, chunk, size, static_cast<unsigned char*>(to) + begin);
  }
}

}  // namespace diffmic::cuda
