// Bindings of the noise.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/bindings.h"
#include "cpu/common/noise.h"
#include "include/philox.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace py = pybind11;

namespace diffmic {
namespace {

cpu::Keys AsKeys(const TensorView& view) {
  return {view.data_as<std::int64_t>(), view.size(0), view.stride(0)};
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

}  // namespace

void BindNoise(py::module_& m) {
  using py::arg;
  m.def("philox_normal", &PhiloxNormal, arg("out"), arg("seed"), arg("image_ids"),
        arg("sample_ids"), arg("timesteps"), arg("threads") = 1,
        "Write the standard normal noise of (seed, image, sample, timestep) into out [K, M, C].");
}

}  // namespace diffmic
