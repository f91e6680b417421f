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

// Limits rows x classes, and with them the shared memory of BlockState, if there are many classes.
constexpr std::int64_t kMostLabels = 512;

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
    affine = take(std::int64_t{3} * tiles * kTileUnits * 16);
    parts = take(rows * classes * shape.blocks * 4);
    states = take(rows * classes * 4);
    begins = take(std::int64_t{shape.chains} * 4);
    counter = take(4);
    for (std::int64_t& each : activations) {
      each = take(std::int64_t{kWarps} * stages * shape.row_tiles * kActivationBytes);
    }
    bytes = end;
  }

  std::int64_t packed, affine, parts, states, begins, counter, activations[2], bytes;
};

int Attribute(cudaDeviceAttr which) {
  int device = 0;
  int value = 0;
  Check(cudaGetDevice(&device), kOperation, "cudaGetDevice");
  Check(cudaDeviceGetAttribute(&value, which, device), kOperation, "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

Shape Plan(std::int64_t features, std::int64_t classes, std::int64_t rows, std::int64_t steps,
           std::int64_t window, Precision precision) {
  const std::int64_t most_tiles = precision == Precision::kFloat32 ? 4 : 8;
  const std::int64_t most_rows =
      std::min(most_tiles * kTileRows, std::max<std::int64_t>(kMostLabels / classes, 1));
  Shape shape{};
  shape.chains = static_cast<int>(std::clamp<std::int64_t>(rows, 1, most_rows));
  shape.window = static_cast<int>(
      std::clamp<std::int64_t>(std::min(window, steps), 1, most_rows / shape.chains));
  const int launch_rows = shape.chains * shape.window;
  shape.row_tiles = 1;
  while (shape.row_tiles * kTileRows < launch_rows) shape.row_tiles *= 2;

  const int tiles = UnitTiles(features);
  const int stages = Stages(features, precision);
  shape.blocks = std::min(Attribute(cudaDevAttrMultiProcessorCount), tiles);
  const int block_tiles = (tiles + shape.blocks - 1) / shape.blocks;
  const std::int64_t fixed =
      std::int64_t{Ahead(shape.row_tiles)} * kWarps * shape.row_tiles * kActivationBytes +
      static_cast<std::int64_t>(
          BlockStateBytes(shape.chains, shape.window, static_cast<int>(classes)));
  const std::int64_t memory = Attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - fixed;
  // As many tiles per pass over the activations as leave shared memory for the pipeline.
  const int ring = Ahead(shape.row_tiles);
  for (shape.pass_tiles = std::min(block_tiles, kMostPassTiles); shape.pass_tiles > 0;
       --shape.pass_tiles) {
    const std::int64_t stage_bytes =
        std::int64_t{kWarps} * shape.pass_tiles * StagePieces(precision) * kPiece * 16;
    const int passes = (block_tiles + shape.pass_tiles - 1) / shape.pass_tiles;
    const int step_stages = 2 * passes * stages;
    shape.slots = static_cast<int>(std::min<std::int64_t>(memory / stage_bytes, step_stages));
    if (shape.slots == step_stages) {
      shape.resident = step_stages;
    } else if (shape.slots >= ring) {
      // Twice the copies in flight hide the latency; the other slots save bandwidth as residents.
      shape.resident = std::max(0, shape.slots - 2 * ring);
    } else {
      continue;
    }
    shape.step_stages = step_stages;
    shape.shared_bytes = static_cast<std::size_t>(fixed + shape.slots * stage_bytes);
    shape.workspace_bytes =
        static_cast<std::size_t>(Workspace(features, classes, shape, precision).bytes);
    return shape;
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
  auto* affine = reinterpret_cast<float4*>(workspace_ + at.affine);
  if (!packed_) {
    PackWeights(call_.weights, call_.precision, packed, affine, stream_);
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
  a.affine = affine;
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
  a.parts = reinterpret_cast<float*>(workspace_ + at.parts);
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
