// Bindings of `conditioning`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/noising_arrays.h"
#include "cpu/conditioning/conditioning.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace py = pybind11;

namespace diffmic {
namespace {

namespace kernel = cpu::conditioning;

constexpr char kOperation[] = "conditioning";

TensorView Floats(py::handle array, const char* name) {
  auto view = TensorView::Input(array, kOperation, name);
  view.OfType({DType::kFloat32});
  return view;
}

TensorView Compact(py::handle array, const char* name, std::initializer_list<std::int64_t> shape) {
  auto view = Floats(array, name);
  view.OfShape(shape);
  if (!view.is_compact()) throw py::value_error(Text(kOperation, ": ", name, " must be compact"));
  return view;
}

void CheckRows(const TensorView& view, const char* name) {
  const int last = view.rank() - 1;
  if (view.size(last) > 1 && view.stride(last) != 1) {
    throw py::value_error(Text(kOperation, ": ", name, " must have rows of unit stride"));
  }
}

TensorView Rows(py::handle array, const char* name, std::initializer_list<std::int64_t> shape) {
  auto view = Floats(array, name);
  view.OfShape(shape);
  CheckRows(view, name);
  return view;
}

// Output of float32 of that shape, apart from what is read.
TensorView Written(py::handle array, const char* name, std::initializer_list<std::int64_t> shape) {
  auto view = TensorView::Output(array, kOperation, name);
  view.OfType({DType::kFloat32}).OfShape(shape);
  return view;
}

// What both passes read, checked and kept alive for a call.
struct Inputs {
  Inputs(py::handle x_array, py::handle y_array, py::handle guidance_array,
         py::handle timesteps_array, const py::sequence& layer_arrays, double eps, bool training)
      : y(Floats(y_array, "y_t")), guidance(Floats(guidance_array, "guidance")) {
    streamed = y.rank() == 3;
    y.OfRank(streamed ? 3 : 2, "[B, C] or [S, B, C]");
    guidance.OfRank(y.rank(), "that of y_t");
    streams = streamed ? y.size(0) : 1;
    rows = y.size(streamed ? 1 : 0);
    classes = y.size(streamed ? 2 : 1);
    if (streamed) {
      guidance.OfShape({streams, rows, classes});
    } else {
      guidance.OfShape({rows, classes});
    }
    if (training && rows < 2) {
      throw py::value_error(Text(kOperation, ": training needs at least 2 rows, got ", rows));
    }
    views.push_back(Floats(x_array, "x"));
    views[0].OfRank(2, "[B, F]");
    features = views[0].size(1);
    views[0].OfShape({rows, features});
    CheckRows(views[0], "x");
    ReadLayer(layer_arrays);
    ReadTimesteps(timesteps_array);
    layer.eps = static_cast<float>(eps);
    batch = {streams,
             rows,
             views[0].data_as<float>(),
             views[0].stride(0),
             LabelsOf(y),
             LabelsOf(guidance),
             views.back().data_as<std::int64_t>(),
             views.back().size(0) == 1 ? 0 : views.back().stride(0),
             training};
  }

  TensorView y, guidance;
  std::vector<TensorView> views;  // x, the layer's five, timesteps
  bool streamed;
  std::int64_t streams, rows, classes, features, gamma_rows;
  kernel::Layer layer;
  kernel::Batch batch;

  // [S, B, last], or [B, last] where the labels have no streams.
  TensorView WrittenRows(py::handle array, const char* name, std::int64_t last) const {
    return streamed ? Written(array, name, {streams, rows, last})
                    : Written(array, name, {rows, last});
  }

 private:
  void ReadLayer(const py::sequence& arrays) {
    if (py::len(arrays) != 5) {
      throw py::value_error(Text(kOperation, ": layer must be five arrays, got ", py::len(arrays)));
    }
    const auto weight = Floats(arrays[0], "weight");
    weight.OfShape({features, 2 * classes});
    const auto gamma = Floats(arrays[2], "gamma");
    gamma.OfRank(2, "[T + 1, F]");
    views.push_back(weight);
    views.push_back(Compact(arrays[1], "bias", {features}));
    views.push_back(Rows(arrays[2], "gamma", {gamma.size(0), features}));
    views.push_back(Compact(arrays[3], "norm_weight", {features}));
    views.push_back(Compact(arrays[4], "norm_bias", {features}));
    layer.features = features;
    layer.classes = classes;
    layer.weight = weight.data_as<float>();
    layer.weight_stride[0] = weight.stride(0);
    layer.weight_stride[1] = weight.stride(1);
    layer.bias = views[2].data_as<float>();
    layer.gamma = views[3].data_as<float>();
    layer.gamma_stride = views[3].stride(0);
    layer.norm_weight = views[4].data_as<float>();
    layer.norm_bias = views[5].data_as<float>();
    gamma_rows = gamma.size(0);
  }

  void ReadTimesteps(py::handle array) {
    auto timesteps = TensorView::Input(array, kOperation, "timesteps");
    timesteps.OfType({DType::kInt64}).OfRank(1, "[B] or [1]");
    if (timesteps.size(0) != 1) timesteps.OfShape({rows});
    const std::int64_t* t = timesteps.data_as<std::int64_t>();
    for (std::int64_t i = 0; i < timesteps.size(0); ++i) {
      const std::int64_t value = t[i * timesteps.stride(0)];
      if (value < 0 || value >= gamma_rows) {
        throw py::value_error(
            Text(kOperation, ": timesteps must be in [0, ", gamma_rows - 1, "], got ", value));
      }
    }
    views.push_back(timesteps);
  }

  kernel::Labels LabelsOf(const TensorView& view) const {
    const int row = streamed ? 1 : 0;
    return {view.data_as<float>(),
            {streamed ? view.stride(0) : 0, view.stride(row), view.stride(row + 1)}};
  }
};

kernel::Options OptionsOf(int threads, const std::string& isa) {
  CheckThreads(kOperation, threads);
  const kernel::Kernels* kernels = kernel::FindKernels(isa);
  if (kernels == nullptr) {
    throw py::value_error(
        Text(kOperation, ": isa must be auto or one that this processor has, got ", isa));
  }
  return {kernels, threads};
}

// An output that may be None.
float* Optional(std::vector<TensorView>& kept, py::handle array, const char* name,
                std::initializer_list<std::int64_t> shape) {
  if (array.is_none()) return nullptr;
  kept.push_back(Written(array, name, shape));
  return kept.back().mutable_data_as<float>();
}

void Forward(py::handle x, py::handle y_t, py::handle guidance, py::handle timesteps,
             const py::sequence& layer, py::handle running_mean_array, py::handle running_var_array,
             bool training, double momentum, double eps, py::handle statistics_array,
             py::handle updated_mean_array, py::handle updated_var_array, py::handle out_array,
             py::handle noising_arrays, int threads, const std::string& isa) {
  const NoisingArrays noising(kOperation, noising_arrays, y_t, x, guidance, Place::kHost);
  const Inputs in(x, y_t, guidance, timesteps, layer, eps, training);
  const auto running_mean = Compact(running_mean_array, "running_mean", {in.features});
  const auto running_var = Compact(running_var_array, "running_var", {in.features});
  const auto options = OptionsOf(threads, isa);
  const auto out = in.WrittenRows(out_array, "out", in.features);
  out.ApartFrom(in.views[0]).ApartFrom(in.y).ApartFrom(in.guidance);
  const std::int64_t streams = kernel::StatisticsStreams(in.batch);
  const auto statistics = Written(statistics_array, "statistics", {2, streams, in.features});
  std::vector<TensorView> updated;
  if (training == updated_mean_array.is_none() || training == updated_var_array.is_none()) {
    throw py::value_error(
        Text(kOperation, ": updated_mean and updated_var belong to training, and are None else"));
  }
  const kernel::Running running{
      running_mean.data_as<float>(), running_var.data_as<float>(),
      Optional(updated, updated_mean_array, "updated_mean", {in.features}),
      Optional(updated, updated_var_array, "updated_var", {in.features}), momentum};
  const py::gil_scoped_release release;
  kernel::Forward(in.layer, in.batch, noising.noising(), running, options,
                  statistics.mutable_data_as<float>(), out.mutable_data_as<float>());
}

void Backward(py::handle grad_array, py::handle x, py::handle y_t, py::handle guidance,
              py::handle timesteps, const py::sequence& layer, py::handle statistics_array,
              bool training, double eps, const py::sequence& gradient_arrays, int threads,
              const std::string& isa) {
  const Inputs in(x, y_t, guidance, timesteps, layer, eps, training);
  const auto options = OptionsOf(threads, isa);
  const auto grad = in.streamed ? Rows(grad_array, "grad", {in.streams, in.rows, in.features})
                                : Rows(grad_array, "grad", {in.rows, in.features});
  const std::int64_t grad_stride[2] = {in.streamed ? grad.stride(0) : 0,
                                       grad.stride(in.streamed ? 1 : 0)};
  const auto statistics = Compact(statistics_array, "statistics",
                                  {2, kernel::StatisticsStreams(in.batch), in.features});
  if (py::len(gradient_arrays) != 8) {
    throw py::value_error(
        Text(kOperation, ": gradients must be eight arrays, got ", py::len(gradient_arrays)));
  }
  std::vector<TensorView> kept;
  const auto labels = [&](int i, const char* name) -> float* {
    const py::object array = gradient_arrays[static_cast<std::size_t>(i)];
    if (array.is_none()) return nullptr;
    kept.push_back(in.WrittenRows(array, name, in.classes));
    return kept.back().mutable_data_as<float>();
  };
  const std::int64_t f = in.features;
  const kernel::Gradients gradients{
      Optional(kept, py::object(gradient_arrays[0]), "x gradient", {in.rows, f}),
      labels(1, "y_t gradient"),
      labels(2, "guidance gradient"),
      Optional(kept, py::object(gradient_arrays[3]), "weight gradient", {f, 2 * in.classes}),
      Optional(kept, py::object(gradient_arrays[4]), "bias gradient", {f}),
      Optional(kept, py::object(gradient_arrays[5]), "gamma gradient", {in.gamma_rows, f}),
      Optional(kept, py::object(gradient_arrays[6]), "norm_weight gradient", {f}),
      Optional(kept, py::object(gradient_arrays[7]), "norm_bias gradient", {f}),
  };
  const py::gil_scoped_release release;
  kernel::Backward(in.layer, in.batch, grad.data_as<float>(), grad_stride,
                   statistics.data_as<float>(), options, gradients);
}

}  // namespace

void BindConditioning(py::module_& m) {
  using py::arg;
  m.def("conditioning", &Forward, arg("x"), arg("y_t"), arg("guidance"), arg("timesteps"),
        arg("layer"), arg("running_mean"), arg("running_var"), arg("training"), arg("momentum"),
        arg("eps"), arg("statistics"), arg("updated_mean"), arg("updated_var"), arg("out"),
        arg("noising") = py::none(), arg("threads") = 1, arg("isa") = "auto",
        "Write x * softplus(BN(gamma_t * (W [y_t ; guidance] + b))) into out, what normalised into "
        "statistics [2, S or 1, F], and in training the running statistics that follow into "
        "updated_mean and updated_var. layer: weight, bias, gamma, norm_weight, norm_bias. "
        "noising, where y_t is to be made and written: y_0, sqrt_alpha_bar, "
        "sqrt_one_minus_alpha_bar, noise or None, seed, image_ids, sample_ids, and for noise that "
        "is None the memory of what is drawn.");
  m.def("conditioning_backward", &Backward, arg("grad"), arg("x"), arg("y_t"), arg("guidance"),
        arg("timesteps"), arg("layer"), arg("statistics"), arg("training"), arg("eps"),
        arg("gradients"), arg("threads") = 1, arg("isa") = "auto",
        "Write the gradients of x, y_t, guidance and the layer's five where they are not None; "
        "that of gamma is added to what is there.");
  m.def("conditioning_instruction_sets", &kernel::KernelNames,
        "Values of isa that run on this processor.");
}

}  // namespace diffmic
