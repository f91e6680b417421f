// The gradient of the crops with respect to the images (docs/algorithm.md, "Regions of interest").
//
// Thread blocks (plane, part) divide the pixels of a plane. A thread gathers the gradients of a
// pixel crop by crop, so there are no atomics on gradients. The last block of a plane whose minimum
// was used as fill divides the gradient of the fill among the pixels that attain the minimum.
//
// The gradient of the crops is read once, that of the images written once, and a plane whose
// minimum was used is read twice. Bound by memory bandwidth.
#include <algorithm>
#include <iterator>

#include "cuda/common/launch.cuh"
#include "cuda/rois/rois_kernels.cuh"

namespace diffmic::cuda::rois {
namespace {

struct BackwardProblem {
  Maps images;  // `depth` is the number of channels that were cut
  Lines lines;
  Cut cut;
  const void* grad;
  std::int64_t grad_stride[5];
  std::int64_t channels;
  void* images_grad;
  // [planes, 1 + 3 parts]: the counter, then key, pixel count and fill gradient of each part.
  std::uint64_t* workspace;
};

// A minimum and the number of pixels that attain it.
template <typename Bits>
struct Least {
  Bits key;
  std::uint64_t count;

  __device__ void Add(Bits other, std::uint64_t others) {
    if (other < key) *this = {other, 0};
    if (other == key) count += others;
  }
};

// The gradient of a pixel of a crop, summed over the copies.
template <typename Format>
__device__ __forceinline__ typename Format::Number CropGrad(const BackwardProblem& p,
                                                            std::int64_t image, std::int64_t k,
                                                            std::int64_t channel, std::int64_t row,
                                                            std::int64_t column) {
  const auto* grad = static_cast<const typename Format::Bits*>(p.grad) + image * p.grad_stride[0] +
                     k * p.grad_stride[1] + channel * p.cut.copies * p.grad_stride[2] +
                     row * p.grad_stride[3] + column * p.grad_stride[4];
  typename Format::Number total = 0;
  for (std::int64_t copy = 0; copy < p.cut.copies; ++copy, grad += p.grad_stride[2]) {
    total += Format::Widen(*grad);
  }
  return total;
}

template <typename Format>
__global__ void __launch_bounds__(kThreads, 3) CutCropsBackwardKernel(BackwardProblem p) {
  using Bits = typename Format::Bits;
  using Number = typename Format::Number;
  const Cut& cut = p.cut;
  const std::int64_t pixels = p.images.height * p.images.width;
  const std::int64_t area = cut.size.height * cut.size.width;
  const std::int64_t thread = std::int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t{gridDim.y} * kThreads;
  for (std::int64_t index = blockIdx.x; index < p.images.batch * p.channels; index += gridDim.x) {
    const std::int64_t image = index / p.channels;
    const std::int64_t channel = index % p.channels;
    Bits* result = static_cast<Bits*>(p.images_grad) + index * pixels;
    if (channel >= p.images.depth) {  // was not cut
      for (std::int64_t i = thread; i < pixels; i += threads) result[i] = 0;
      continue;
    }
    for (std::int64_t i = thread; i < pixels; i += threads) {
      const std::int64_t row = i / p.images.width;
      const std::int64_t column = i % p.images.width;
      Number total = 0;
      for (std::int64_t k = 0; k < cut.count; ++k) {
        const Place place = PlaceOf(p.images, cut, image, k);
        const std::int64_t crop_row = row - place.top + place.above;
        const std::int64_t crop_column = column - place.left + place.margin;
        if (row >= place.top && crop_row < cut.size.height && column >= place.left &&
            crop_column < cut.size.width) {
          total += CropGrad<Format>(p, image, k, channel, crop_row, crop_column);
        }
      }
      result[i] = Format::Narrow(total);
    }
    if (!AnyLeaves(p.images, cut, image)) continue;

    Number fill = 0;
    for (std::int64_t i = thread; i < cut.count * area; i += threads) {
      const std::int64_t k = i / area;
      const std::int64_t row = i % area / cut.size.width;
      const std::int64_t column = i % cut.size.width;
      const Place place = PlaceOf(p.images, cut, image, k);
      if (row < place.above || column < place.margin) {
        fill += CropGrad<Format>(p, image, k, channel, row, column);
      }
    }
    const auto add = [](auto a, auto b) { return a + b; };
    fill = BlockReduce<kWarps>(fill, add);

    const Bits* plane = static_cast<const Bits*>(p.images.data) + image * p.images.stride[0] +
                        channel * p.images.stride[1];
    Least<Bits> least{kHighest<Bits>, 0};
    VisitPixels(plane, p.lines, [&](Bits bits) { least.Add(Format::Key(bits), 1); });
    const Bits key = BlockReduce<kWarps>(least.key, Lesser<Bits>);
    least = {key, BlockReduce<kWarps>(least.key == key ? least.count : 0, add)};

    if (gridDim.y > 1) {
      std::uint64_t* row = p.workspace + index * (1 + 3 * gridDim.y);
      if (threadIdx.x == 0) {
        std::uint64_t* mine = row + 1 + 3 * blockIdx.y;
        mine[0] = least.key;
        mine[1] = least.count;
        mine[2] = BitCast<std::uint64_t>(static_cast<double>(fill));
      }
      if (!LastToArrive(row)) continue;
      least = {kHighest<Bits>, 0};
      fill = 0;
      for (const std::uint64_t* of = row + 1; of < row + 1 + 3 * gridDim.y; of += 3) {
        least.Add(static_cast<Bits>(of[0]), of[1]);
        fill += static_cast<Number>(BitCast<double>(of[2]));
      }
    }  // else BlockReduce has synchronised the block since it wrote `result`
    if (fill == 0) continue;
    // A NaN minimum makes the gradient of the whole plane NaN.
    const bool nan = least.key == 0;
    const Number share =
        nan ? Format::Widen(Format::kPoison) : fill / static_cast<Number>(least.count);
    for (std::int64_t i = threadIdx.x; i < pixels; i += kThreads) {
      const Bits bits =
          plane[i / p.images.width * p.images.stride[2] + i % p.images.width * p.images.stride[3]];
      if (nan || Format::Key(bits) == least.key) {
        result[i] = Format::Narrow(Format::Widen(result[i]) + share);
      }
    }
  }
}

template <typename Format>
void LaunchBackward(const BackwardProblem& problem, cudaStream_t stream) {
  const Maps& images = problem.images;
  const unsigned parts =
      PartsOf({images.height, images.width}, problem.cut, sizeof(typename Format::Bits));
  Launch("rois.cut_crops_backward", CutCropsBackwardKernel<Format>,
         {Grid(images.batch * problem.channels, parts), dim3(kThreads), 0, stream}, problem);
}

}  // namespace

void CutCropsBackward(const CutBackwardCall& call, std::uint64_t* workspace, cudaStream_t stream) {
  BackwardProblem problem{call.images, LinesOf(call.images), call.cut,         call.grad,
                          {},          call.channels,        call.images_grad, workspace};
  std::copy(std::begin(call.grad_stride), std::end(call.grad_stride), problem.grad_stride);
  Dispatch<false>(call.type, [&]<typename Format>() { LaunchBackward<Format>(problem, stream); });
}

}  // namespace diffmic::cuda::rois
