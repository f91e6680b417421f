// Bindings of `conditioning` on a GPU; the twin of csrc/bindings/conditioning.cpp. The timesteps'
// values are in the GPU's memory, so that the kernels look after those that are out of range.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "bindings/cuda_bindings.h"
#include "bindings/noising_arrays.h"
#include "cuda/common/error.h"
#include "cuda/conditioning/conditioning.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace py = pybind11;

namespace diffmic::cuda {
namespace {

namespace kernel = conditioning;

constexpr char kOperation[] = "conditioning";

using Shape = std::initializer_list<std::int64_t>;

// What both passes read, checked, and every array of a call kept alive.
class Inputs {
 public:
  Inputs(py::handle x_array, py::handle y_array, py::handle guidance_array,
         py::handle timesteps_array, const py::sequence& layer_arrays, double eps, bool training) {
    const TensorView x = Floats(x_array, "x");
    x.OfRank(2, "[B, F]");
    CheckRows(x, "x");
    rows = x.size(0);
    features = x.size(1);
    const TensorView y = Floats(y_array, "y_t");
    streamed = y.rank() == 3;
    y.OfRank(streamed ? 3 : 2, "[B, C] or [S, B, C]");
    streams = streamed ? y.size(0) : 1;
    classes = y.size(streamed ? 2 : 1);
    OfRows(y, classes);
    const TensorView guidance = Floats(guidance_array, "guidance");
    guidance.OfRank(y.rank(), "that of y_t");
    OfRows(guidance, classes);
    if (training && rows < 2) {
      throw py::value_error(Text(kOperation, ": training needs at least 2 rows, got ", rows));
    }
    const TensorView timesteps =
        Keep(TensorView::Input(timesteps_array, kOperation, "timesteps", Place::kDevice));
    timesteps.OfType({DType::kInt64}).OfRank(1, "[B] or [1]");
    if (timesteps.size(0) != 1) timesteps.OfShape({rows});
    ReadLayer(layer_arrays, eps);
    batch = {streams,
             rows,
             x.data_as<float>(),
             x.stride(0),
             LabelsOf(y),
             LabelsOf(guidance),
             timesteps.data_as<std::int64_t>(),
             timesteps.size(0) == 1 ? 0 : timesteps.stride(0),
             training};
  }

  // An array [S, B, F], or [B, F], whose rows have unit stride.
  const TensorView Rows(py::handle array, const char* name) {
    const TensorView view = Floats(array, name);
    view.OfRank(streamed ? 3 : 2, streamed ? "[S, B, F]" : "[B, F]");
    OfRows(view, features);
    CheckRows(view, name);
    return view;
  }

  const float* Compact(py::handle array, const char* name, Shape shape) {
    const TensorView view = Floats(array, name);
    view.OfShape(shape);
    if (!view.is_compact()) {
      throw py::value_error(Text(kOperation, ": ", name, " must be compact"));
    }
    return view.data_as<float>();
  }

  // Outputs, apart from the arrays that have a row's or a label's number for each of theirs.
  float* Written(py::handle array, const char* name, Shape shape) {
    return Output(array, name).OfShape(shape).mutable_data_as<float>();
  }
  float* WrittenRows(py::handle array, const char* name, std::int64_t last) {
    const TensorView view = Output(array, name);
    OfRows(view, last);
    return view.mutable_data_as<float>();
  }
  // Those that may be None.
  float* Optional(py::handle array, const char* name, Shape shape) {
    return array.is_none() ? nullptr : Written(array, name, shape);
  }
  float* OptionalRows(py::handle array, const char* name, std::int64_t last) {
    return array.is_none() ? nullptr : WrittenRows(array, name, last);
  }

  int device() const { return views_[0].device(); }

  bool streamed;
  std::int64_t streams, rows, classes, features;
  kernel::Layer layer;
  kernel::Batch batch;

 private:
  const TensorView& Keep(TensorView view) {
    views_.push_back(std::move(view));
    return views_.back().OnDeviceOf(views_.front());
  }

  const TensorView Floats(py::handle array, const char* name) {
    return Keep(TensorView::Input(array, kOperation, name, Place::kDevice))
        .OfType({DType::kFloat32});
  }

  const TensorView Output(py::handle array, const char* name) {
    const TensorView view = Keep(TensorView::Output(array, kOperation, name, Place::kDevice));
    view.OfType({DType::kFloat32});
    for (std::size_t i = 0; i < 3; ++i) view.ApartFrom(views_[i]);  // x, y_t, guidance
    return view;
  }

  void OfRows(const TensorView& view, std::int64_t last) const {
    if (streamed) {
      view.OfShape({streams, rows, last});
    } else {
      view.OfShape({rows, last});
    }
  }

  static void CheckRows(const TensorView& view, const char* name) {
    const int last = view.rank() - 1;
    if (view.size(last) > 1 && view.stride(last) != 1) {
      throw py::value_error(Text(kOperation, ": ", name, " must have rows of unit stride"));
    }
  }

  void ReadLayer(const py::sequence& arrays, double eps) {
    if (py::len(arrays) != 5) {
      throw py::value_error(Text(kOperation, ": layer must be five arrays, got ", py::len(arrays)));
    }
    const TensorView weight = Floats(arrays[0], "weight");
    weight.OfShape({features, 2 * classes});
    const TensorView gamma = Floats(arrays[2], "gamma");
    gamma.OfRank(2, "[T + 1, F]").OfShape({gamma.size(0), features});
    CheckRows(gamma, "gamma");
    layer = {features,
             classes,
             weight.data_as<float>(),
             {weight.stride(0), weight.stride(1)},
             Compact(arrays[1], "bias", {features}),
             gamma.data_as<float>(),
             gamma.size(0),
             gamma.stride(0),
             Compact(arrays[3], "norm_weight", {features}),
             Compact(arrays[4], "norm_bias", {features}),
             static_cast<float>(eps)};
  }

  kernel::Labels LabelsOf(const TensorView& view) const {
    const int row = streamed ? 1 : 0;
    return {view.data_as<float>(),
            {streamed ? view.stride(0) : 0, view.stride(row), view.stride(row + 1)}};
  }

  std::vector<TensorView> views_;
};

void Forward(py::handle x, py::handle y_t, py::handle guidance, py::handle timesteps,
             const py::sequence& layer, py::handle running_mean, py::handle running_var,
             bool training, double momentum, double eps, py::handle statistics_array,
             py::handle updated_mean, py::handle updated_var, py::handle out_array,
             py::handle noising_arrays, std::uintptr_t stream) {
  const NoisingArrays noising(kOperation, noising_arrays, y_t, x, guidance, Place::kDevice);
  Inputs in(x, y_t, guidance, timesteps, layer, eps, training);
  if (training == updated_mean.is_none() || training == updated_var.is_none()) {
    throw py::value_error(
        Text(kOperation, ": updated_mean and updated_var belong to training, and are None else"));
  }
  const std::int64_t f = in.features;
  const kernel::Running running{in.Compact(running_mean, "running_mean", {f}),
                                in.Compact(running_var, "running_var", {f}),
                                in.Optional(updated_mean, "updated_mean", {f}),
                                in.Optional(updated_var, "updated_var", {f}), momentum};
  float* const out = in.WrittenRows(out_array, "out", f);
  float* const statistics =
      in.Written(statistics_array, "statistics", {2, kernel::StatisticsStreams(in.batch), f});
  const py::gil_scoped_release release;
  const DeviceGuard guard(kOperation, in.device());
  kernel::Forward(in.layer, in.batch, noising.noising(), running, statistics, out,
                  AsStream(stream));
}

void Backward(py::handle grad_array, py::handle x, py::handle y_t, py::handle guidance,
              py::handle timesteps, const py::sequence& layer, py::handle statistics_array,
              bool training, double eps, const py::sequence& to, py::handle workspace_array,
              std::uintptr_t stream) {
  Inputs in(x, y_t, guidance, timesteps, layer, eps, training);
  const TensorView grad = in.Rows(grad_array, "grad");
  const std::int64_t grad_stride[2] = {in.streamed ? grad.stride(0) : 0,
                                       grad.stride(in.streamed ? 1 : 0)};
  const std::int64_t f = in.features;
  const float* statistics =
      in.Compact(statistics_array, "statistics", {2, kernel::StatisticsStreams(in.batch), f});
  if (py::len(to) != 8) {
    throw py::value_error(Text(kOperation, ": gradients must be eight arrays, got ", py::len(to)));
  }
  const kernel::Gradients gradients{
      in.Optional(py::object(to[0]), "x gradient", {in.rows, f}),
      in.OptionalRows(py::object(to[1]), "y_t gradient", in.classes),
      in.OptionalRows(py::object(to[2]), "guidance gradient", in.classes),
      in.Optional(py::object(to[3]), "weight gradient", {f, 2 * in.classes}),
      in.Optional(py::object(to[4]), "bias gradient", {f}),
      in.Optional(py::object(to[5]), "gamma gradient", {in.layer.gamma_rows, f}),
      in.Optional(py::object(to[6]), "norm_weight gradient", {f}),
      in.Optional(py::object(to[7]), "norm_bias gradient", {f}),
  };
  const bool labels = gradients.y != nullptr || gradients.guidance != nullptr;
  if (labels && workspace_array.is_none()) {
    throw py::value_error(
        Text(kOperation, ": workspace must be there for the gradients of y_t and guidance"));
  }
  float* const workspace = in.Optional(workspace_array, "workspace",
                                       {kernel::LabelSums(f, in.streams, in.rows, in.classes)});
  const py::gil_scoped_release release;
  const DeviceGuard guard(kOperation, in.device());
  kernel::Backward(in.layer, in.batch, grad.data_as<float>(), grad_stride, statistics, gradients,
                   workspace, AsStream(stream));
}

}  // namespace

void BindConditioning(py::module_& m) {
  using py::arg;
  m.def("conditioning", &Forward, arg("x"), arg("y_t"), arg("guidance"), arg("timesteps"),
        arg("layer"), arg("running_mean"), arg("running_var"), arg("training"), arg("momentum"),
        arg("eps"), arg("statistics"), arg("updated_mean"), arg("updated_var"), arg("out"),
        arg("noising"), arg("stream"),
        "Write x * softplus(BN(gamma_t * (W [y_t ; guidance] + b))) into out, what normalised into "
        "statistics [2, S or 1, F], and in training the running statistics that follow into "
        "updated_mean and updated_var. layer: weight, bias, gamma, norm_weight, norm_bias. "
        "noising: as in the CPU's. A timestep that gamma or the schedule does not have, or a "
        "sample beyond 32 bits, makes its row not-a-number.");
  m.def("conditioning_workspace", &kernel::LabelSums, arg("features"), arg("streams"), arg("rows"),
        arg("classes"),
        "Elements of workspace, float32 scratch memory that conditioning_backward needs where the "
        "gradients of y_t or guidance are wanted.");
  m.def("conditioning_backward", &Backward, arg("grad"), arg("x"), arg("y_t"), arg("guidance"),
        arg("timesteps"), arg("layer"), arg("statistics"), arg("training"), arg("eps"),
        arg("gradients"), arg("workspace"), arg("stream"),
        "Write the gradients of x, y_t, guidance and the layer's five where they are not None; "
        "that of gamma into its rows of the timesteps alone, which must be zeros.");
}

}  // namespace diffmic::cuda
