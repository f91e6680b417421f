// Host side of `denoise`: the launch configuration, the workspace and the launches. The kernel, its
// work distribution and its bound are described in denoise_kernel.cuh.
#include "cuda/denoise/denoise.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/common/error.h"
#include "cuda/common/launch.cuh"
#include "cuda/denoise/denoise_kernel.cuh"
#include "cuda/denoise/denoise_layout.cuh"
#include "cuda/denoise/denoise_products.cuh"

namespace diffmic::cuda::denoise {
namespace {

constexpr char kOperation[] = "denoise";

// Records of a block's channels are in shared memory up to this size. Larger ones stay in global
// memory and leave the space to the pipeline of weights.
constexpr std::int64_t kMostRecordBytes = 32 * 1024;

template <class Product>
__global__ void __launch_bounds__(kThreads, 1)
    ChainsKernel(const __grid_constant__ KernelArguments a) {
  Block<Product>(a).Main();
}

using Kernel = void (*)(KernelArguments);

template <template <int> class Product, int kMostRowTiles>
Kernel KernelOf(int row_tiles) {
  if (row_tiles == 1) return ChainsKernel<Product<1>>;
  if (row_tiles == 2) return ChainsKernel<Product<2>>;
  return row_tiles == 4 ? ChainsKernel<Product<4>> : ChainsKernel<Product<kMostRowTiles>>;
}

Kernel KernelOf(int row_tiles, Precision precision) {
  if (precision == Precision::kFloat32) return KernelOf<Float32Product, 4>(row_tiles);
  return precision == Precision::kFloat8 ? KernelOf<Float8Product, 8>(row_tiles)
                                         : KernelOf<BFloat16Product, 8>(row_tiles);
}

std::int64_t Aligned(std::int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Byte offsets of the parts of the workspace.
struct Workspace {
  Workspace(std::int64_t features, std::int64_t classes, const Shape& shape, Precision precision) {
    const int tiles = UnitTiles(features);
    const int stages = Stages(features, precision);
    const std::int64_t rows = std::int64_t{shape.chains} * shape.window;
    std::int64_t end = 0;
    const auto take = [&end](std::int64_t bytes) {
      const std::int64_t begin = end;
      end += Aligned(bytes);
      return begin;
    };
    packed = take(StageIndex(tiles, stages, 2, 0, 0, 0) * StagePieces(precision) * kPiece * 16);
    channels =
        take(std::int64_t{4} * tiles * kTileUnits * ChannelStride(static_cast<int>(classes)));
    parts = take((rows * classes + 3) / 4 * 16 * shape.blocks);
    states = take(rows * classes * 4);
    begins = take(std::int64_t{shape.chains} * 4);
    counter = take(4);
    for (std::int64_t& each : activations) {
      each = take(std::int64_t{kWarps} * stages * shape.row_tiles * kActivationBytes);
    }
    bytes = end;
  }

  std::int64_t packed, channels, parts, states, begins, counter, activations[2], bytes;
};

int Attribute(cudaDeviceAttr which) {
  int device = 0;
  int value = 0;
  Check(cudaGetDevice(&device), kOperation, "cudaGetDevice");
  Check(cudaDeviceGetAttribute(&value, which, device), kOperation, "cudaDeviceGetAttribute");
  return value;
}

// Completes a shape whose chains and window are set; returns whether shared memory suffices.
bool Fit(std::int64_t features, std::int64_t classes, Precision precision, bool with_records,
         Shape* shape) {
  shape->row_tiles = 1;
  while (shape->row_tiles * kTileRows < shape->chains * shape->window) shape->row_tiles *= 2;
  const int tiles = UnitTiles(features);
  const int stages = Stages(features, precision);
  shape->blocks = std::min(Attribute(cudaDevAttrMultiProcessorCount), tiles);
  const int block_tiles = (tiles + shape->blocks - 1) / shape->blocks;
  const int record_bytes = 4 * ChannelStride(static_cast<int>(classes));
  shape->shared_channels = with_records ? block_tiles * kTileUnits : 0;
  const std::int64_t records = std::int64_t{shape->shared_channels} * record_bytes;
  if (records > kMostRecordBytes) return false;
  // Shared memory: activations, slots of weights, records of channels, states.
  const int ring = Ahead(shape->row_tiles);
  const std::int64_t ring_bytes = std::int64_t{ring} * kWarps * shape->row_tiles * kActivationBytes;
  const auto states = static_cast<std::int64_t>(
      BlockStateBytes(shape->chains, shape->window, static_cast<int>(classes)));
  const std::int64_t memory =
      Attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - ring_bytes - records - states;
  // As many tiles per pass over the activations as leave shared memory for the pipeline.
  for (shape->pass_tiles = std::min(block_tiles, kMostPassTiles); shape->pass_tiles > 0;
       --shape->pass_tiles) {
    const std::int64_t stage_bytes =
        std::int64_t{kWarps} * shape->pass_tiles * StagePieces(precision) * kPiece * 16;
    const int passes = (block_tiles + shape->pass_tiles - 1) / shape->pass_tiles;
    const int step_stages = 2 * passes * stages;
    shape->slots = static_cast<int>(std::min<std::int64_t>(memory / stage_bytes, step_stages));
    if (shape->slots == step_stages) {
      shape->resident = step_stages;
    } else if (shape->slots >= ring) {
      // Twice the copies in flight hide the latency; the other slots save bandwidth as residents.
      shape->resident = std::max(0, shape->slots - 2 * ring);
    } else {
      continue;
    }
    shape->step_stages = step_stages;
    shape->channels_at = static_cast<int>(ring_bytes + shape->slots * stage_bytes);
    shape->state_at = static_cast<int>(shape->channels_at + records);
    shape->shared_bytes = static_cast<std::size_t>(shape->state_at + states);
    shape->workspace_bytes =
        static_cast<std::size_t>(Workspace(features, classes, *shape, precision).bytes);
    return true;
  }
  return false;
}

}  // namespace

Shape Plan(std::int64_t features, std::int64_t classes, std::int64_t rows, std::int64_t steps,
           std::int64_t window, Precision precision) {
  const std::int64_t most_tiles = precision == Precision::kFloat32 ? 4 : 8;
  std::int64_t most_rows = std::min(most_tiles * kTileRows, kMostLabels / classes);
  // Fewer rows per launch where shared memory is small: their activations take less of it.
  for (;; most_rows /= 2) {
    Shape shape{};
    shape.chains = static_cast<int>(std::clamp<std::int64_t>(rows, 1, most_rows));
    shape.window = static_cast<int>(
        std::clamp<std::int64_t>(std::min(window, steps), 1, most_rows / shape.chains));
    for (const bool with_records : {true, false}) {
      if (Fit(features, classes, precision, with_records, &shape)) return shape;
    }
    if (most_rows == 1) break;
  }
  throw Error("denoise: this GPU has too little shared memory for the kernel");
}

Run::Run(const DenoiseCall& call, const Shape& shape, std::int64_t sweeps, void* workspace,
         cudaStream_t stream)
    : call_(call),
      shape_(shape),
      launch_sweeps_(sweeps),
      workspace_(static_cast<unsigned char*>(workspace)),
      stream_(stream) {}

std::int64_t Run::Wait() const {
  std::int64_t settled = row_ * call_.steps.count;
  std::vector<int> begins(static_cast<std::size_t>(shape_.chains));
  if (sweeps_ > 0) {
    const Workspace at(call_.weights.features, call_.weights.classes, shape_, call_.precision);
    Check(cudaMemcpyAsync(begins.data(), workspace_ + at.begins, begins.size() * sizeof(int),
                          cudaMemcpyDeviceToHost, stream_),
          kOperation, "cudaMemcpyAsync");
  }
  Check(cudaStreamSynchronize(stream_), kOperation, "cudaStreamSynchronize");
  for (std::int64_t i = 0; i < std::min<std::int64_t>(shape_.chains, call_.rows - row_); ++i) {
    settled += begins[static_cast<std::size_t>(i)];
  }
  return std::min(settled, call_.rows * call_.steps.count);
}

bool Run::Next() {
  if (row_ >= call_.rows) return false;
  const Workspace at(call_.weights.features, call_.weights.classes, shape_, call_.precision);
  const int stages = Stages(call_.weights.features, call_.precision);
  auto* packed = reinterpret_cast<uint4*>(workspace_ + at.packed);
  auto* channels = reinterpret_cast<float*>(workspace_ + at.channels);
  if (!packed_) {
    PackWeights(call_.weights, call_.precision, packed, channels, stream_);
    const std::int64_t bytes = at.bytes - at.activations[0];
    Check(cudaMemsetAsync(workspace_ + at.activations[0], 0, static_cast<std::size_t>(bytes),
                          stream_),
          kOperation, "cudaMemsetAsync");
    packed_ = true;
  }
  Check(cudaMemsetAsync(workspace_ + at.counter, 0, 4, stream_), kOperation, "cudaMemsetAsync");
  KernelArguments a{};
  a.features = static_cast<int>(call_.weights.features);
  a.classes = static_cast<int>(call_.weights.classes);
  a.unit_tiles = UnitTiles(call_.weights.features);
  a.stages = stages;
  a.pass_tiles = shape_.pass_tiles;
  a.slots = shape_.slots;
  a.resident = shape_.resident;
  a.packed = packed;
  a.channels = channels;
  a.channels_at = shape_.channels_at;
  a.state_at = shape_.state_at;
  a.shared_channels = shape_.shared_channels;
  a.call = call_;
  a.first_row = row_;
  a.chains = static_cast<int>(std::min<std::int64_t>(shape_.chains, call_.rows - row_));
  a.window = shape_.window;
  a.fresh = sweeps_ == 0;
  a.sweeps = static_cast<int>(std::min(launch_sweeps_, call_.steps.count - sweeps_));
  a.begin = reinterpret_cast<int*>(workspace_ + at.begins);
  a.states = reinterpret_cast<float*>(workspace_ + at.states);
  a.activations[0] = workspace_ + at.activations[0];
  a.activations[1] = workspace_ + at.activations[1];
  a.parts = reinterpret_cast<float4*>(workspace_ + at.parts);
  a.part_quads = static_cast<int>((std::int64_t{a.chains} * a.window * a.classes + 3) / 4);
  a.counter = reinterpret_cast<std::uint32_t*>(workspace_ + at.counter);
  LaunchShape launch;
  launch.grid = dim3(static_cast<unsigned>(shape_.blocks));
  launch.block = dim3(kThreads);
  launch.shared = shape_.shared_bytes;
  launch.stream = stream_;
  launch.cooperative = true;
  Launch(kOperation, KernelOf(shape_.row_tiles, call_.precision), launch, a);
  sweeps_ += a.sweeps;
  if (sweeps_ >= call_.steps.count) {
    row_ += shape_.chains;
    sweeps_ = 0;
  }
  return row_ < call_.rows;
}

}  // namespace diffmic::cuda::denoise
