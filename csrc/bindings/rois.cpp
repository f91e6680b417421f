// Bindings of `rois`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>

#include "bindings/bindings.h"
#include "cpu/rois/rois.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace py = pybind11;

namespace diffmic {
namespace {

using SizePair = std::pair<std::int64_t, std::int64_t>;

cpu::Maps AsMaps(const TensorView& view) {
  return {view.data(),  view.size(0),
          view.size(1), view.size(2),
          view.size(3), {view.stride(0), view.stride(1), view.stride(2), view.stride(3)}};
}

std::string InWords(SizePair size) { return Text("(", size.first, ", ", size.second, ")"); }

void ChooseWindows(py::handle saliency_array, SizePair window, py::handle cells_array,
                   int threads) {
  constexpr char kOperation[] = "rois.choose_windows";
  const auto saliency = TensorView::Input(saliency_array, kOperation, "saliency");
  saliency.OfType({DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64})
      .OfRank(4, "[B, C, h, w]");
  const auto cells = TensorView::Output(cells_array, kOperation, "cells");
  cells.OfType({DType::kInt64}).OfRank(3, "[B, K, 2]").ApartFrom(saliency);
  cells.OfShape({saliency.size(0), cells.size(1), 2});
  CheckThreads(kOperation, threads);
  const cpu::Size size{window.first, window.second};
  if (saliency.size(1) < 1 || size.height < 1 || size.height > saliency.size(2) || size.width < 1 ||
      size.width > saliency.size(3)) {
    throw py::value_error(
        Text(kOperation, ": window must lie in the saliency map of one class or more, of ",
             InWords({saliency.size(2), saliency.size(3)}), " cells, got ", InWords(window)));
  }
  cpu::SaliencyType type = cpu::SaliencyType::kFloat32;
  if (saliency.dtype() == DType::kFloat16) type = cpu::SaliencyType::kFloat16;
  if (saliency.dtype() == DType::kBFloat16) type = cpu::SaliencyType::kBFloat16;
  if (saliency.dtype() == DType::kFloat64) type = cpu::SaliencyType::kFloat64;

  std::int64_t bad_image = -1;
  {
    const py::gil_scoped_release release;
    bad_image = cpu::ChooseWindows(AsMaps(saliency), type, size, cells.size(1),
                                   cells.mutable_data_as<std::int64_t>(), threads);
  }
  if (bad_image >= 0) {
    throw py::value_error(Text(kOperation, ": saliency of image ", bad_image,
                               " is not finite (nan, inf, or a range beyond float32)"));
  }
}

void CutCrops(py::handle images_array, py::handle origins_array, bool first_channel,
              py::handle crops_array, int threads) {
  constexpr char kOperation[] = "rois.cut_crops";
  const auto images = TensorView::Input(images_array, kOperation, "images");
  images
      .OfType({DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64, DType::kUInt8})
      .OfRank(4, "[B, Ch, H, W]");
  const auto origins = TensorView::Input(origins_array, kOperation, "origins");
  origins.OfType({DType::kInt64}).OfRank(3, "[B, K, 2]");
  origins.OfShape({images.size(0), origins.size(1), 2});
  const auto crops = TensorView::Output(crops_array, kOperation, "crops");
  crops.OfType({images.dtype()}).OfRank(5, "[B, K, 3 or Ch, height, width]");
  crops.OfShape({images.size(0), origins.size(1), first_channel ? 3 : images.size(1), crops.size(3),
                 crops.size(4)});
  crops.ApartFrom(images).ApartFrom(origins);
  CheckThreads(kOperation, threads);
  if (crops.numel() > 0 && images.numel() == 0) {
    throw py::value_error(
        Text(kOperation, ": images must have a pixel and a channel at least, got none"));
  }
  cpu::PixelType type = cpu::PixelType::kFloat32;
  if (images.dtype() == DType::kFloat16) type = cpu::PixelType::kFloat16;
  if (images.dtype() == DType::kBFloat16) type = cpu::PixelType::kBFloat16;
  if (images.dtype() == DType::kFloat64) type = cpu::PixelType::kFloat64;
  if (images.dtype() == DType::kUInt8) type = cpu::PixelType::kUInt8;

  if (crops.numel() == 0) return;
  cpu::Maps maps = AsMaps(images);
  if (first_channel) maps.depth = 1;
  const cpu::Pairs pairs{origins.data_as<std::int64_t>(),
                         {origins.stride(0), origins.stride(1), origins.stride(2)}};
  const py::gil_scoped_release release;
  cpu::CutCrops(maps, type, pairs, origins.size(1), {crops.size(3), crops.size(4)},
                first_channel ? 3 : 1, crops.mutable_data(), threads);
}

void Rois(py::handle saliency_array, py::handle images_array, SizePair window, bool first_channel,
          py::handle cells_array, py::handle origins_array, py::handle crops_array, int threads) {
  constexpr char kOperation[] = "rois";
  const auto cells = TensorView::Output(cells_array, kOperation, "cells");
  const auto origins = TensorView::Output(origins_array, kOperation, "origins");
  cells.OfType({DType::kInt64}).OfRank(3, "[B, K, 2]").ApartFrom(origins);
  origins.OfType({DType::kInt64}).OfShape({cells.size(0), cells.size(1), 2});
  ChooseWindows(saliency_array, window, cells_array, threads);
  {
    const auto saliency = TensorView::Input(saliency_array, kOperation, "saliency");
    const auto images = TensorView::Input(images_array, kOperation, "images");
    images.OfRank(4, "[B, Ch, H, W]").ApartFrom(origins);
    cpu::CellsToPixels(cells.data_as<std::int64_t>(), cells.size(0) * cells.size(1),
                       {saliency.size(2), saliency.size(3)}, {images.size(2), images.size(3)},
                       origins.mutable_data_as<std::int64_t>());
  }
  CutCrops(images_array, origins_array, first_channel, crops_array, threads);
}

}  // namespace

void BindRois(py::module_& m) {
  using py::arg;
  m.def("choose_windows", &ChooseWindows, arg("saliency"), arg("window"), arg("cells"),
        arg("threads") = 1,
        "Write the cells of the best windows of saliency [B, C, h, w] into cells [B, K, 2].");
  m.def("cut_crops", &CutCrops, arg("images"), arg("origins"), arg("first_channel"), arg("crops"),
        arg("threads") = 1,
        "Write the crops of images [B, Ch, H, W] at origins [B, K, 2] into crops "
        "[B, K, 3 or Ch, height, width].");
  m.def("rois", &Rois, arg("saliency"), arg("images"), arg("window"), arg("first_channel"),
        arg("cells"), arg("origins"), arg("crops"), arg("threads") = 1,
        "choose_windows, the pixels of its cells into origins [B, K, 2], and cut_crops there.");
}

}  // namespace diffmic
