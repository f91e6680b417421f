// The module diffmic_fast._C: one function an operation. A function here reads its arrays through
// TensorView, checks them in words, releases the GIL, and calls a kernel with pointers, sizes and
// strides. Outputs are arrays that the caller allocated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>

#include "build_config.h"
#include "cpu/features.h"
#include "cpu/noise.h"
#include "cpu/rois.h"
#include "philox.h"
#include "tensor_view.h"
#include "text.h"
#if DIFFMIC_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace diffmic {
namespace {

using SizePair = std::pair<std::int64_t, std::int64_t>;

cpu::Maps AsMaps(const TensorView& view) {
  return {view.data(),  view.size(0),
          view.size(1), view.size(2),
          view.size(3), {view.stride(0), view.stride(1), view.stride(2), view.stride(3)}};
}

cpu::Keys AsKeys(const TensorView& view) {
  return {view.data_as<std::int64_t>(), view.size(0), view.stride(0)};
}

std::string InWords(SizePair size) { return Text("(", size.first, ", ", size.second, ")"); }

void CheckThreads(const char* operation, int threads) {
  if (threads < 1) {
    throw py::value_error(Text(operation, ": threads must be at least 1, got ", threads));
  }
}

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

void CheckKeys(const TensorView& keys, std::int64_t largest, const char* name) {
  for (std::int64_t i = 0; i < keys.size(0); ++i) {
    const std::int64_t value = keys.data_as<std::int64_t>()[i * keys.stride(0)];
    if (value < 0 || value > largest) {
      throw py::value_error(
          Text("philox_normal: ", name, " must be in [0, ", largest, "], got ", value));
    }
  }
}

void PhiloxNormal(py::handle out_array, const py::int_& seed, py::handle images_array,
                  py::handle samples_array, py::handle timesteps_array, int threads) {
  constexpr char kOperation[] = "philox_normal";
  const auto images = TensorView::Input(images_array, kOperation, "image_ids");
  images.OfType({DType::kInt64}).OfRank(1, "[M]");
  const auto samples = TensorView::Input(samples_array, kOperation, "sample_ids");
  samples.OfType({DType::kInt64}).OfRank(1, "[M]").OfShape({images.size(0)});
  const auto timesteps = TensorView::Input(timesteps_array, kOperation, "timesteps");
  timesteps.OfType({DType::kInt64}).OfRank(1, "[K]");
  const auto out = TensorView::Output(out_array, kOperation, "out");
  out.OfType({DType::kFloat32}).OfRank(3, "[K, M, C]");
  out.OfShape({timesteps.size(0), images.size(0), out.size(2)});
  out.ApartFrom(images).ApartFrom(samples).ApartFrom(timesteps);
  CheckThreads(kOperation, threads);
  if (out.size(2) < 1 || out.size(2) > philox::kMaxClasses) {
    throw py::value_error(
        Text(kOperation, ": classes must be in [1, ", philox::kMaxClasses, "], got ", out.size(2)));
  }
  CheckKeys(samples, philox::kMaxSample, "sample_ids");
  CheckKeys(timesteps, philox::kMaxTimestep, "timesteps");
  // Any whole number is a key: its lowest 64 bits count, as in the reference.
  const std::uint64_t key = PyLong_AsUnsignedLongLongMask(seed.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  const py::gil_scoped_release release;
  cpu::PhiloxNormal(key, AsKeys(images), AsKeys(samples), AsKeys(timesteps), out.size(2),
                    out.mutable_data_as<float>(), threads);
}

py::dict BuildInfo() {
  py::dict info;
  info["version"] = DIFFMIC_VERSION;
  info["compiler"] = DIFFMIC_CXX_COMPILER;
  info["flags"] = DIFFMIC_CXX_FLAGS;
  info["architecture"] = cpu::Architecture();
  info["instruction_sets"] = cpu::AssumedInstructionSets();
  info["cuda"] = static_cast<bool>(DIFFMIC_WITH_CUDA);
  info["cuda_compiler"] = DIFFMIC_CUDA_COMPILER;
  info["cuda_architectures"] = DIFFMIC_CUDA_ARCHITECTURES;
  return info;
}

#if DIFFMIC_WITH_CUDA
py::dict CudaState() {
  cuda::State state;
  {
    const py::gil_scoped_release release;  // starting the driver can take seconds
    state = cuda::Query();
  }
  py::list devices;
  for (const cuda::Device& device : state.devices) {
    py::dict entry;
    entry["index"] = device.index;
    entry["name"] = device.name;
    entry["compute_capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory_bytes"] = device.memory_bytes;
    entry["served"] = device.served;
    devices.append(entry);
  }
  py::dict result;
  result["runtime_version"] = state.runtime_version;
  result["driver_version"] = state.driver_version;
  result["reason"] = state.reason;
  result["devices"] = devices;
  return result;
}
#endif

}  // namespace
}  // namespace diffmic

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using py::arg;
  m.doc() = "Kernels of diffmic_fast. The public calls are in diffmic_fast.ops.";
  m.def("choose_windows", &diffmic::ChooseWindows, arg("saliency"), arg("window"), arg("cells"),
        arg("threads") = 1,
        "Write the cells of the best windows of saliency [B, C, h, w] into cells [B, K, 2].");
  m.def("cut_crops", &diffmic::CutCrops, arg("images"), arg("origins"), arg("first_channel"),
        arg("crops"), arg("threads") = 1,
        "Write the crops of images [B, Ch, H, W] at origins [B, K, 2] into crops "
        "[B, K, 3 or Ch, height, width].");
  m.def("rois", &diffmic::Rois, arg("saliency"), arg("images"), arg("window"), arg("first_channel"),
        arg("cells"), arg("origins"), arg("crops"), arg("threads") = 1,
        "choose_windows, the pixels of its cells into origins [B, K, 2], and cut_crops there.");
  m.def("philox_normal", &diffmic::PhiloxNormal, arg("out"), arg("seed"), arg("image_ids"),
        arg("sample_ids"), arg("timesteps"), arg("threads") = 1,
        "Write the standard normal noise of (seed, image, sample, timestep) into out [K, M, C].");
  m.def("build_info", &diffmic::BuildInfo, "What this extension was built from, as a dict.");
  m.def("cpu_features", &diffmic::cpu::AvailableInstructionSets,
        "The instruction sets of this machine's processor.");
#if DIFFMIC_WITH_CUDA
  py::register_exception<diffmic::cuda::Error>(m, "CudaError", PyExc_RuntimeError);
  m.def("cuda_state", &diffmic::CudaState, "Driver and GPUs of this machine, as a dict.");
  m.def("cuda_serves", &diffmic::cuda::Serves, arg("architectures"), arg("major"), arg("minor"),
        "Whether code for these architectures runs on a GPU of this compute capability.");
#endif
}
