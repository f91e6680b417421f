// BLAKE2b (RFC 7693) without a key, with a digest of 8 bytes, of every image of a batch.
//
// A block is one warp and has one image. The hash of an image is one chain over its blocks of 128
// bytes: lane 0 computes it, while all lanes load the next block of the message.
//
// Bound by the chain, not by memory: 12 rounds of 8 mixings are about 2500 dependent and
// independent 32-bit operations for 128 bytes, one image per warp. Images of a batch are hashed
// side by side, so that the time does not depend on their number up to several per multiprocessor.
#include "cuda/image_ids/image_ids.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/launch.cuh"

namespace diffmic::cuda {
namespace {

constexpr int kLanes = 32;  // a block of the message is one word of four bytes per lane

// The initial state; `i` is a constant after unrolling.
__device__ __forceinline__ std::uint64_t Initial(int i) {
  constexpr std::uint64_t kWords[8] = {
      0x6A09E667F3BCC908u, 0xBB67AE8584CAA73Bu, 0x3C6EF372FE94F82Bu, 0xA54FF53A5F1D36F1u,
      0x510E527FADE682D1u, 0x9B05688C2B3E6C1Fu, 0x1F83D9ABFB41BD6Bu, 0x5BE0CD19137E2179u};
  return kWords[i];
}

__device__ __forceinline__ std::uint64_t RotateRight(std::uint64_t value, int bits) {
  return value >> bits | value << (64 - bits);
}

__device__ __forceinline__ void Mix(std::uint64_t& a, std::uint64_t& b, std::uint64_t& c,
                                    std::uint64_t& d, std::uint64_t x, std::uint64_t y) {
  a += b + x;
  d = RotateRight(d ^ a, 32);
  c += d;
  b = RotateRight(b ^ c, 24);
  a += b + y;
  d = RotateRight(d ^ a, 16);
  c += d;
  b = RotateRight(b ^ c, 63);
}

// Adds a block of the message to the state. `bytes`: of the message up to the end of this block.
__device__ __forceinline__ void Compress(std::uint64_t (&state)[8],
                                         const std::uint32_t (&words)[kLanes], std::uint64_t bytes,
                                         bool last) {
  constexpr unsigned char kOrder[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                            {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                            {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                            {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                            {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                            {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                            {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                            {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                            {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                            {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
  std::uint64_t m[16], v[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    m[i] = words[2 * i] | std::uint64_t{words[2 * i + 1]} << 32;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    v[i] = state[i];
    v[i + 8] = Initial(i);
  }
  v[12] ^= bytes;
  if (last) v[14] = ~v[14];
#pragma unroll
  for (int round = 0; round < 12; ++round) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Mix(v[i], v[4 + i], v[8 + i], v[12 + i], m[kOrder[round % 10][2 * i]],
          m[kOrder[round % 10][2 * i + 1]]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Mix(v[i], v[4 + (i + 1) % 4], v[8 + (i + 2) % 4], v[12 + (i + 3) % 4],
          m[kOrder[round % 10][8 + 2 * i]], m[kOrder[round % 10][9 + 2 * i]]);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) state[i] ^= v[i] ^ v[i + 8];
}

__global__ void __launch_bounds__(kLanes)
    HashImage(const float* data, std::int64_t pixels, std::int64_t* keys) {
  __shared__ std::uint32_t words[2][kLanes];
  const int lane = static_cast<int>(threadIdx.x);
  const float* image = data + std::int64_t{blockIdx.x} * pixels;
  // Pixels beyond the last are the zeros that fill the last block.
  const auto word = [&](std::int64_t block) {
    const std::int64_t pixel = block * kLanes + lane;
    return pixel < pixels ? __float_as_uint(image[pixel]) : 0u;
  };
  std::uint64_t state[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) state[i] = Initial(i);
  state[0] ^= 0x01010008u;  // no key, a digest of 8 bytes
  const std::int64_t blocks = (pixels + kLanes - 1) / kLanes;
  std::uint32_t next = word(0);
  for (std::int64_t block = 0; block < blocks; ++block) {
    // Two halves, so that one barrier is enough: lane 0 has read a half before it arrives at the
    // barrier that precedes the next write to it.
    words[block % 2][lane] = next;
    __syncwarp();
    next = word(block + 1);
    if (lane == 0) {
      const bool last = block + 1 == blocks;
      Compress(state, words[block % 2],
               static_cast<std::uint64_t>(4 * (last ? pixels : (block + 1) * kLanes)), last);
    }
  }
  if (lane == 0) keys[blockIdx.x] = static_cast<std::int64_t>(state[0]);
}

}  // namespace

void HashImages(const float* data, std::int64_t images, std::int64_t pixels, std::int64_t* keys,
                cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(images));
  shape.block = dim3(kLanes);
  shape.stream = stream;
  Launch("image_ids", HashImage, shape, data, pixels, keys);
}

}  // namespace diffmic::cuda
