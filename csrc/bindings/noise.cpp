// Binding of the Philox noise.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "cpu/common/noise.h"
#include "include/philox.h"

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
  Arrays arrays(kOperation, Place::kHost);
  const auto ids = [&](py::handle array, const char* name) -> const TensorView& {
    return arrays.Input(array, name, {DType::kInt64});
  };
  const TensorView& images = ids(images_array, "image_ids").OfRank(1, "[M]");
  const TensorView& samples = ids(samples_array, "sample_ids").OfRank(1, "[M]");
  samples.OfShape({images.size(0)});
  const TensorView& timesteps = ids(timesteps_array, "timesteps").OfRank(1, "[K]");
  const TensorView& out = arrays.Output(out_array, "out", {DType::kFloat32});
  out.OfRank(3, "[K, M, C]").OfShape({timesteps.size(0), images.size(0), out.size(2)});
  CheckThreads(kOperation, threads);
  if (out.size(2) < 1 || out.size(2) > philox::kMaxClasses) {
    throw py::value_error(
        Text(kOperation, ": classes must be in [1, ", philox::kMaxClasses, "], got ", out.size(2)));
  }
  CheckKeys(samples, philox::kMaxSample, "sample_ids");
  CheckKeys(timesteps, philox::kMaxTimestep, "timesteps");
  // The key is the lowest 64 bits of any integer, as in the reference.
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
        "Writes the standard normal noise of (seed, image, sample, timestep) into out [K, M, C].");
}

}  // namespace diffmic
