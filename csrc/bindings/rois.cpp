// Bindings of `rois`, for the CPU and for CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "include/rois_call.h"
#if DIFFMIC_WITH_CPU
#include "cpu/rois/rois.h"
#endif
#if DIFFMIC_WITH_CUDA
#include "bindings/cuda_launch.h"
#include "cuda/rois/rois.h"
#endif

namespace py = pybind11;

namespace diffmic {
namespace {

using rois::ChooseCall;
using rois::CutCall;
using rois::Maps;
using rois::Size;
using rois::Type;

using SizePair = std::pair<std::int64_t, std::int64_t>;

constexpr char kChoose[] = "rois.choose_windows";
constexpr char kCut[] = "rois.cut_crops";

// ---- reading: what both backends share

Type TypeOf(const TensorView& view) {
  switch (view.dtype()) {
    case DType::kUInt8:
      return Type::kUInt8;
    case DType::kFloat16:
      return Type::kFloat16;
    case DType::kBFloat16:
      return Type::kBFloat16;
    case DType::kFloat64:
      return Type::kFloat64;
    default:
      return Type::kFloat32;
  }
}

Maps AsMaps(const TensorView& view) {
  return {view.data(),  view.size(0),
          view.size(1), view.size(2),
          view.size(3), {view.stride(0), view.stride(1), view.stride(2), view.stride(3)}};
}

Size PlaneOf(const Maps& maps) { return {maps.height, maps.width}; }

ChooseCall ReadChoice(Arrays& arrays, const TensorView& saliency, SizePair window,
                      py::handle cells_array) {
  const Size size{window.first, window.second};
  const Size map{saliency.size(2), saliency.size(3)};
  if (saliency.size(1) < 1 || size.height < 1 || size.height > map.height || size.width < 1 ||
      size.width > map.width) {
    throw py::value_error(Text(
        arrays.operation(), ": window must lie in the saliency map of at least one class, of (",
        map.height, ", ", map.width, ") cells, got (", size.height, ", ", size.width, ")"));
  }
  const TensorView& cells = arrays.Output(cells_array, "cells", {DType::kInt64});
  cells.OfRank(3, "[B, K, 2]").OfShape({saliency.size(0), cells.size(1), 2});
  return {AsMaps(saliency), TypeOf(saliency), size, cells.size(1),
          cells.mutable_data_as<std::int64_t>()};
}

const TensorView& ReadSaliency(Arrays& arrays, py::handle array) {
  return arrays
      .Input(array, "saliency",
             {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64})
      .OfRank(4, "[B, C, h, w]");
}

const TensorView& ReadImages(Arrays& arrays, py::handle array) {
  return arrays
      .Input(array, "images",
             {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64, DType::kUInt8})
      .OfRank(4, "[B, Ch, H, W]");
}

// The call for crops, or for their gradient, which is not written.
CutCall ReadCut(Arrays& arrays, const TensorView& images, const TensorView& origins,
                const TensorView& crops, bool first_channel) {
  origins.OfRank(3, "[B, K, 2]").OfShape({images.size(0), origins.size(1), 2});
  crops.OfRank(5, "[B, K, 3 or Ch, height, width]");
  crops.OfShape({images.size(0), origins.size(1), first_channel ? 3 : images.size(1), crops.size(3),
                 crops.size(4)});
  if (crops.numel() > 0 && images.numel() == 0) {
    arrays.Fail("images", "must have at least one channel and one pixel, got none");
  }
  Maps maps = AsMaps(images);
  if (first_channel) maps.depth = 1;
  return {
      maps,
      TypeOf(images),
      {{origins.data_as<std::int64_t>(), {origins.stride(0), origins.stride(1), origins.stride(2)}},
       origins.size(1),
       {crops.size(3), crops.size(4)},
       first_channel ? 3 : 1},
      crops.mutable_data()};
}

// ---- backends

#if DIFFMIC_WITH_CPU
class Cpu {
 public:
  static constexpr Place kPlace = Place::kHost;

  Cpu(Arrays& arrays, int threads) : threads_(threads) {
    CheckThreads(arrays.operation(), threads);
  }

  void Choose(const ChooseCall& call) const {
    std::int64_t bad_image = -1;
    {
      const py::gil_scoped_release release;
      bad_image = cpu::ChooseWindows(call, threads_);
    }
    if (bad_image >= 0) {
      throw py::value_error(Text(kChoose, ": saliency of image ", bad_image,
                                 " is not finite (nan, inf, or a range beyond float32)"));
    }
  }

  void Cut(const CutCall& call) const {
    const py::gil_scoped_release release;
    cpu::CutCrops(call, threads_);
  }

  void Both(const ChooseCall& choice, std::int64_t* origins, const CutCall& cut) const {
    Choose(choice);
    cpu::CellsToPixels(choice.cells, choice.saliency.batch * choice.count, PlaneOf(choice.saliency),
                       PlaneOf(cut.images), origins);
    Cut(cut);
  }

 private:
  int threads_;
};
#endif

#if DIFFMIC_WITH_CUDA
class Cuda {
 public:
  static constexpr Place kPlace = Place::kDevice;

  Cuda(Arrays& arrays, py::handle workspace, std::uintptr_t stream)
      : launch_(arrays, stream), choice_workspace_(workspace), cut_workspace_(workspace) {}
  Cuda(Arrays& arrays, py::handle choice_workspace, py::handle cut_workspace, std::uintptr_t stream)
      : launch_(arrays, stream),
        choice_workspace_(choice_workspace),
        cut_workspace_(cut_workspace) {}

  void Choose(const ChooseCall& call) const {
    float* const floats = Floats(call);
    launch_([&](cudaStream_t stream) { cuda::rois::ChooseWindows(call, {}, floats, stream); });
  }

  void Cut(const CutCall& call) const {
    std::uint64_t* const words = Words(PlaneWords(call) * call.images.batch * call.images.depth);
    launch_([&](cudaStream_t stream) { cuda::rois::CutCrops(call, nullptr, words, stream); });
  }

  void Both(const ChooseCall& choice, std::int64_t* origins, const CutCall& cut) const {
    float* const floats = Floats(choice);
    const std::int64_t plane_words = PlaneWords(cut);
    std::uint64_t* const words = Words(plane_words * cut.images.batch * cut.images.depth);
    const cuda::rois::Continuation next{origins, PlaneOf(cut.images), cut.images.depth, words,
                                        plane_words};
    launch_([&](cudaStream_t stream) {
      cuda::rois::ChooseWindows(choice, next, floats, stream);
      cuda::rois::CutCrops(cut, choice.cells, words, stream);
    });
  }

  void CutBackward(const cuda::rois::CutBackwardCall& call) const {
    const std::int64_t plane_words =
        cuda::rois::CutWorkspace(call.type, PlaneOf(call.images), call.cut, true);
    std::uint64_t* const words = Words(plane_words * call.images.batch * call.channels);
    launch_([&](cudaStream_t stream) { cuda::rois::CutCropsBackward(call, words, stream); });
  }

 private:
  float* Floats(const ChooseCall& call) const {
    return launch_.Workspace<float>(
        choice_workspace_,
        cuda::rois::ChooseWorkspace(call.saliency.batch, PlaneOf(call.saliency), call.window));
  }

  static std::int64_t PlaneWords(const CutCall& call) {
    return cuda::rois::CutWorkspace(call.type, PlaneOf(call.images), call.cut, false);
  }

  // Holds counters that must be zeros, which the emulator's checks of a "workspace" would
  // overwrite.
  std::uint64_t* Words(std::int64_t count) const {
    return reinterpret_cast<std::uint64_t*>(
        launch_.Workspace<std::int64_t>(cut_workspace_, count, "zeroed workspace"));
  }

  cuda::Launch launch_;
  py::handle choice_workspace_, cut_workspace_;
};
#endif

// ---- functions

template <typename Backend, typename... Launch>
void ChooseWindows(py::handle saliency, SizePair window, py::handle cells, Launch... launch) {
  Arrays arrays(kChoose, Backend::kPlace);
  const ChooseCall call = ReadChoice(arrays, ReadSaliency(arrays, saliency), window, cells);
  Backend(arrays, launch...).Choose(call);
}

template <typename Backend, typename... Launch>
void CutCrops(py::handle images_array, py::handle origins_array, bool first_channel,
              py::handle crops_array, Launch... launch) {
  Arrays arrays(kCut, Backend::kPlace);
  const TensorView& images = ReadImages(arrays, images_array);
  const TensorView& origins = arrays.Input(origins_array, "origins", {DType::kInt64});
  const TensorView& crops = arrays.Output(crops_array, "crops", {images.dtype()});
  const CutCall call = ReadCut(arrays, images, origins, crops, first_channel);
  const Backend backend(arrays, launch...);
  if (crops.numel() > 0) backend.Cut(call);
}

template <typename Backend, typename... Launch>
void Rois(py::handle saliency_array, py::handle images_array, SizePair window, bool first_channel,
          py::handle cells, py::handle origins_array, py::handle crops_array, Launch... launch) {
  Arrays arrays("rois", Backend::kPlace);
  const TensorView& saliency = ReadSaliency(arrays, saliency_array);
  const TensorView& images = ReadImages(arrays, images_array);
  const ChooseCall choice = ReadChoice(arrays, saliency, window, cells);
  const TensorView& origins = arrays.Output(origins_array, "origins", {DType::kInt64});
  origins.OfShape({saliency.size(0), choice.count, 2});
  const TensorView& crops = arrays.Output(crops_array, "crops", {images.dtype()});
  const CutCall cut = ReadCut(arrays, images, origins, crops, first_channel);
  Backend(arrays, launch...).Both(choice, origins.mutable_data_as<std::int64_t>(), cut);
}

// Binds the functions of a backend: `launch` names the arguments of its launch, of types Launch.
template <typename Backend, typename... Launch, typename... Names>
void Bind(py::module_& m, const Names&... launch) {
  using py::arg;
  m.def("choose_windows", &ChooseWindows<Backend, Launch...>, arg("saliency"), arg("window"),
        arg("cells"), launch...,
        "Writes the cells of the best windows of saliency [B, C, h, w] into cells [B, K, 2]. "
        "Saliency that is not finite raises on the CPU and gives cells of -1 on a GPU.");
  m.def("cut_crops", &CutCrops<Backend, Launch...>, arg("images"), arg("origins"),
        arg("first_channel"), arg("crops"), launch...,
        "Writes the crops of images [B, Ch, H, W] at origins [B, K, 2] into crops "
        "[B, K, 3 or Ch, height, width].");
}

template <typename Backend, typename... Launch, typename... Names>
void BindBoth(py::module_& m, const Names&... launch) {
  using py::arg;
  m.def("rois", &Rois<Backend, Launch...>, arg("saliency"), arg("images"), arg("window"),
        arg("first_channel"), arg("cells"), arg("origins"), arg("crops"), launch...,
        "choose_windows, the pixels of its cells into origins [B, K, 2], and cut_crops there; "
        "crops are NaN (0 for uint8) where cells are -1.");
}

#if DIFFMIC_WITH_CUDA
void CutCropsBackward(py::handle grad_array, py::handle images_array, py::handle origins_array,
                      bool first_channel, py::handle images_grad, py::handle workspace,
                      std::uintptr_t stream) {
  Arrays arrays("rois.cut_crops_backward", Place::kDevice);
  const TensorView& images = ReadImages(arrays, images_array);
  images.OfType({DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64});
  const TensorView& grad = arrays.Input(grad_array, "grad", {images.dtype()});
  const TensorView& origins = arrays.Input(origins_array, "origins", {DType::kInt64});
  const CutCall cut = ReadCut(arrays, images, origins, grad, first_channel);
  const TensorView& written = arrays.Output(images_grad, "images_grad", {images.dtype()});
  written.OfShape({images.size(0), images.size(1), images.size(2), images.size(3)});
  Cuda(arrays, workspace, stream)
      .CutBackward(
          {cut.images,
           cut.type,
           cut.cut,
           grad.data(),
           {grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3), grad.stride(4)},
           images.size(1),
           written.mutable_data()});
}

std::int64_t ChooseWorkspace(std::int64_t batch, SizePair map, SizePair window) {
  return cuda::rois::ChooseWorkspace(batch, {map.first, map.second}, {window.first, window.second});
}

std::int64_t CutWorkspace(py::handle images_array, std::int64_t count, SizePair size,
                          bool first_channel, bool backward) {
  Arrays arrays(kCut, Place::kDevice);
  const TensorView& images = ReadImages(arrays, images_array);
  const rois::Cut cut{{}, count, {size.first, size.second}, first_channel ? 3 : 1};
  const std::int64_t depth = first_channel && !backward ? 1 : images.size(1);
  return images.size(0) * depth *
         cuda::rois::CutWorkspace(TypeOf(images), {images.size(2), images.size(3)}, cut, backward);
}
#endif

}  // namespace

#if DIFFMIC_WITH_CPU
void BindRois(py::module_& m) {
  Bind<Cpu, int>(m, py::arg("threads") = 1);
  BindBoth<Cpu, int>(m, py::arg("threads") = 1);
}
#endif

#if DIFFMIC_WITH_CUDA
void cuda::BindRois(py::module_& m) {
  using py::arg;
  Bind<Cuda, py::handle, std::uintptr_t>(m, arg("workspace"), arg("stream"));
  BindBoth<Cuda, py::handle, py::handle, std::uintptr_t>(m, arg("choice_workspace"),
                                                         arg("cut_workspace"), arg("stream"));
  m.def("cut_crops_backward", &CutCropsBackward, arg("grad"), arg("images"), arg("origins"),
        arg("first_channel"), arg("images_grad"), arg("workspace"), arg("stream"),
        "Writes the gradient of images [B, Ch, H, W], given that of their crops, to images_grad.");
  m.def("choose_windows_workspace", &ChooseWorkspace, arg("batch"), arg("map"), arg("window"),
        "Elements of float32 workspace for choose_windows, often 0.");
  m.def("cut_crops_workspace", &CutWorkspace, arg("images"), arg("count"), arg("size"),
        arg("first_channel"), arg("backward"),
        "Elements of int64 workspace, zeros, for cut_crops or cut_crops_backward; `rois` sets its "
        "own to zero.");
}
#endif

}  // namespace diffmic
