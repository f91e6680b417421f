// Bindings of `rois` on a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "bindings/cuda_bindings.h"
#include "cuda/common/error.h"
#include "cuda/rois/rois.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace py = pybind11;

namespace diffmic::cuda {
namespace {

using rois::Size;
using SizePair = std::pair<std::int64_t, std::int64_t>;

rois::Type TypeOf(const TensorView& view) {
  switch (view.dtype()) {
    case DType::kUInt8:
      return rois::Type::kUInt8;
    case DType::kFloat16:
      return rois::Type::kFloat16;
    case DType::kBFloat16:
      return rois::Type::kBFloat16;
    case DType::kFloat64:
      return rois::Type::kFloat64;
    default:
      return rois::Type::kFloat32;
  }
}

rois::Maps AsMaps(const TensorView& view) {
  return {view.data(),  view.size(0),
          view.size(1), view.size(2),
          view.size(3), {view.stride(0), view.stride(1), view.stride(2), view.stride(3)}};
}

rois::Pairs AsPairs(const TensorView& view) {
  return {view.data_as<std::int64_t>(), {view.stride(0), view.stride(1), view.stride(2)}};
}

// Scratch memory of `needed` elements; null where none is needed.
template <typename T>
T* AsScratch(const TensorView& view, const char* operation, DType type, std::int64_t needed,
             const TensorView& first) {
  view.OfType({type});
  if (needed == 0) return nullptr;
  view.OnDeviceOf(first).ApartFrom(first);
  if (view.numel() < needed) {
    throw py::value_error(
        Text(operation, ": scratch must have ", needed, " elements, got ", view.numel()));
  }
  return static_cast<T*>(view.mutable_data());
}

// One cut, checked: images, origins, and crops or their gradient.
struct CheckedCut {
  rois::Maps images;  // of the channels that are cut
  rois::Cut cut;
  std::int64_t words;  // of scratch memory, a plane
};

CheckedCut CheckCut(const char* operation, const TensorView& images, const TensorView& origins,
                    const TensorView& crops, bool first_channel, bool backward) {
  images.OfRank(4, "[B, Ch, H, W]");
  origins.OfType({DType::kInt64}).OfRank(3, "[B, K, 2]").OnDeviceOf(images);
  origins.OfShape({images.size(0), origins.size(1), 2});
  crops.OfType({images.dtype()}).OfRank(5, "[B, K, 3 or Ch, height, width]").OnDeviceOf(images);
  crops.OfShape({images.size(0), origins.size(1), first_channel ? 3 : images.size(1), crops.size(3),
                 crops.size(4)});
  if (crops.numel() > 0 && images.numel() == 0) {
    throw py::value_error(
        Text(operation, ": images must have a pixel and a channel at least, got none"));
  }
  rois::Maps maps = AsMaps(images);
  if (first_channel) maps.depth = 1;
  const rois::Cut cut{
      AsPairs(origins), origins.size(1), {crops.size(3), crops.size(4)}, first_channel ? 3 : 1};
  const Size image{images.size(2), images.size(3)};
  return {maps, cut, rois::CutScratch(TypeOf(images), image, cut, backward)};
}

struct CheckedChoice {
  rois::Maps saliency;
  Size window;
  std::int64_t floats;  // of scratch memory
};

CheckedChoice CheckChoice(const char* operation, const TensorView& saliency, SizePair window,
                          const TensorView& cells) {
  saliency.OfType({DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64})
      .OfRank(4, "[B, C, h, w]");
  cells.OfType({DType::kInt64}).OfRank(3, "[B, K, 2]").ApartFrom(saliency).OnDeviceOf(saliency);
  cells.OfShape({saliency.size(0), cells.size(1), 2});
  const Size size{window.first, window.second};
  const Size map{saliency.size(2), saliency.size(3)};
  if (saliency.size(1) < 1 || size.height < 1 || size.height > map.height || size.width < 1 ||
      size.width > map.width) {
    throw py::value_error(
        Text(operation, ": window must lie in the saliency map of one class or more, of (",
             map.height, ", ", map.width, ") cells, got (", size.height, ", ", size.width, ")"));
  }
  return {AsMaps(saliency), size, rois::ChooseScratch(saliency.size(0), map, size)};
}

TensorView PixelsOf(py::handle array, const char* operation) {
  auto images = TensorView::Input(array, operation, "images", Place::kDevice);
  images.OfType(
      {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64, DType::kUInt8});
  return images;
}

void ChooseWindows(py::handle saliency_array, SizePair window, py::handle cells_array,
                   py::handle scratch_array, std::uintptr_t stream) {
  constexpr char kOperation[] = "rois.choose_windows";
  const auto saliency = TensorView::Input(saliency_array, kOperation, "saliency", Place::kDevice);
  const auto cells = TensorView::Output(cells_array, kOperation, "cells", Place::kDevice);
  const auto scratch = TensorView::Output(scratch_array, kOperation, "scratch", Place::kDevice);
  const CheckedChoice choice = CheckChoice(kOperation, saliency, window, cells);
  auto* floats = AsScratch<float>(scratch, kOperation, DType::kFloat32, choice.floats, saliency);
  const py::gil_scoped_release release;
  const DeviceGuard guard(kOperation, saliency.device());
  rois::ChooseWindows(choice.saliency, TypeOf(saliency), choice.window, cells.size(1),
                      cells.mutable_data_as<std::int64_t>(), {}, floats, AsStream(stream));
}

void CutCrops(py::handle images_array, py::handle origins_array, bool first_channel,
              py::handle crops_array, py::handle scratch_array, std::uintptr_t stream) {
  constexpr char kOperation[] = "rois.cut_crops";
  const auto images = PixelsOf(images_array, kOperation);
  const auto origins = TensorView::Input(origins_array, kOperation, "origins", Place::kDevice);
  const auto crops = TensorView::Output(crops_array, kOperation, "crops", Place::kDevice);
  const auto scratch = TensorView::Output(scratch_array, kOperation, "scratch", Place::kDevice);
  const CheckedCut cut = CheckCut(kOperation, images, origins, crops, first_channel, false);
  crops.ApartFrom(images).ApartFrom(origins);
  auto* words = AsScratch<std::uint64_t>(scratch, kOperation, DType::kInt64,
                                         cut.words * cut.images.batch * cut.images.depth, images);
  const py::gil_scoped_release release;
  const DeviceGuard guard(kOperation, images.device());
  rois::CutCrops(cut.images, TypeOf(images), cut.cut, nullptr, crops.mutable_data(), words,
                 AsStream(stream));
}

void Rois(py::handle saliency_array, py::handle images_array, SizePair window, bool first_channel,
          py::handle cells_array, py::handle origins_array, py::handle crops_array,
          py::handle choice_scratch_array, py::handle cut_scratch_array, std::uintptr_t stream) {
  constexpr char kOperation[] = "rois";
  const auto saliency = TensorView::Input(saliency_array, kOperation, "saliency", Place::kDevice);
  const auto images = PixelsOf(images_array, kOperation);
  const auto cells = TensorView::Output(cells_array, kOperation, "cells", Place::kDevice);
  const auto origins = TensorView::Output(origins_array, kOperation, "origins", Place::kDevice);
  const auto crops = TensorView::Output(crops_array, kOperation, "crops", Place::kDevice);
  const auto choice_scratch =
      TensorView::Output(choice_scratch_array, kOperation, "choice_scratch", Place::kDevice);
  const auto cut_scratch =
      TensorView::Output(cut_scratch_array, kOperation, "cut_scratch", Place::kDevice);
  const CheckedChoice choice = CheckChoice(kOperation, saliency, window, cells);
  const CheckedCut cut = CheckCut(kOperation, images, origins, crops, first_channel, false);
  images.OnDeviceOf(saliency);
  cells.ApartFrom(origins).OfShape({origins.size(0), origins.size(1), 2});
  origins.ApartFrom(images).ApartFrom(saliency);
  crops.ApartFrom(images).ApartFrom(saliency).ApartFrom(origins).ApartFrom(cells);
  auto* floats =
      AsScratch<float>(choice_scratch, kOperation, DType::kFloat32, choice.floats, saliency);
  auto* words = AsScratch<std::uint64_t>(cut_scratch, kOperation, DType::kInt64,
                                         cut.words * cut.images.batch * cut.images.depth, images);
  const py::gil_scoped_release release;
  const DeviceGuard guard(kOperation, saliency.device());
  auto* chosen = cells.mutable_data_as<std::int64_t>();
  rois::ChooseWindows(choice.saliency, TypeOf(saliency), choice.window, cells.size(1), chosen,
                      {origins.mutable_data_as<std::int64_t>(),
                       {cut.images.height, cut.images.width},
                       cut.images.depth,
                       words,
                       cut.words},
                      floats, AsStream(stream));
  rois::CutCrops(cut.images, TypeOf(images), cut.cut, chosen, crops.mutable_data(), words,
                 AsStream(stream));
}

void CutCropsBackward(py::handle grad_array, py::handle images_array, py::handle origins_array,
                      bool first_channel, py::handle images_grad_array, py::handle scratch_array,
                      std::uintptr_t stream) {
  constexpr char kOperation[] = "rois.cut_crops_backward";
  const auto grad = TensorView::Input(grad_array, kOperation, "grad", Place::kDevice);
  const auto images = TensorView::Input(images_array, kOperation, "images", Place::kDevice);
  images.OfType({DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64});
  const auto origins = TensorView::Input(origins_array, kOperation, "origins", Place::kDevice);
  const auto images_grad =
      TensorView::Output(images_grad_array, kOperation, "images_grad", Place::kDevice);
  const auto scratch = TensorView::Output(scratch_array, kOperation, "scratch", Place::kDevice);
  const CheckedCut cut = CheckCut(kOperation, images, origins, grad, first_channel, true);
  images_grad.OfType({images.dtype()}).OfRank(4, "[B, Ch, H, W]").OnDeviceOf(images);
  images_grad.OfShape({images.size(0), images.size(1), images.size(2), images.size(3)});
  images_grad.ApartFrom(images).ApartFrom(origins).ApartFrom(grad);
  auto* words = AsScratch<std::uint64_t>(scratch, kOperation, DType::kInt64,
                                         cut.words * images.size(0) * images.size(1), images);
  const py::gil_scoped_release release;
  const DeviceGuard guard(kOperation, images.device());
  rois::CutCropsBackward(
      cut.images, TypeOf(images), cut.cut, grad.data(),
      {grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3), grad.stride(4)},
      images.size(1), images_grad.mutable_data(), words, AsStream(stream));
}

std::int64_t ChoiceScratch(std::int64_t batch, SizePair map, SizePair window) {
  return rois::ChooseScratch(batch, {map.first, map.second}, {window.first, window.second});
}

std::int64_t CutScratch(py::handle images_array, std::int64_t count, SizePair size,
                        bool first_channel, bool backward) {
  const auto images = PixelsOf(images_array, "rois.cut_crops");
  images.OfRank(4, "[B, Ch, H, W]");
  const rois::Cut cut{{}, count, {size.first, size.second}, first_channel ? 3 : 1};
  const std::int64_t depth = first_channel && !backward ? 1 : images.size(1);
  return images.size(0) * depth *
         rois::CutScratch(TypeOf(images), {images.size(2), images.size(3)}, cut, backward);
}

}  // namespace

void BindRois(py::module_& m) {
  using py::arg;
  m.def("choose_windows_scratch", &ChoiceScratch, arg("batch"), arg("map"), arg("window"),
        "Elements of float32 scratch memory that choose_windows needs, often 0.");
  m.def("cut_crops_scratch", &CutScratch, arg("images"), arg("count"), arg("size"),
        arg("first_channel"), arg("backward"),
        "Elements of int64 scratch memory that cut_crops or cut_crops_backward needs, zeros.");
  m.def("choose_windows", &ChooseWindows, arg("saliency"), arg("window"), arg("cells"),
        arg("scratch"), arg("stream"),
        "Write the cells of the best windows of saliency [B, C, h, w] into cells [B, K, 2], -1 "
        "where an image's saliency is not finite.");
  m.def("cut_crops", &CutCrops, arg("images"), arg("origins"), arg("first_channel"), arg("crops"),
        arg("scratch"), arg("stream"),
        "Write the crops of images [B, Ch, H, W] at origins [B, K, 2] into crops "
        "[B, K, 3 or Ch, height, width].");
  m.def("rois", &Rois, arg("saliency"), arg("images"), arg("window"), arg("first_channel"),
        arg("cells"), arg("origins"), arg("crops"), arg("choice_scratch"), arg("cut_scratch"),
        arg("stream"),
        "choose_windows, the pixels of its cells into origins [B, K, 2], and cut_crops there; "
        "crops of not-a-number (0 for uint8) where the cells are -1. cut_scratch need not be "
        "zeros.");
  m.def("cut_crops_backward", &CutCropsBackward, arg("grad"), arg("images"), arg("origins"),
        arg("first_channel"), arg("images_grad"), arg("scratch"), arg("stream"),
        "Write the gradient of images [B, Ch, H, W], given that of their crops, into images_grad.");
}

}  // namespace diffmic::cuda
