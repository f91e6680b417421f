// Bindings of `conditioning` and `noised_conditioning`, for the CPU and CUDA. Arguments are records
// of diffmic_fast/ops/_conditioning.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "include/conditioning_call.h"
#include "include/philox.h"
#if DIFFMIC_WITH_CPU
#include "cpu/conditioning/conditioning.h"
#endif
#if DIFFMIC_WITH_CUDA
#include "bindings/cuda_launch.h"
#include "cuda/conditioning/conditioning.h"
#endif

namespace py = pybind11;

namespace diffmic {
namespace {

using conditioning::BackwardCall;
using conditioning::Batch;
using conditioning::ForwardCall;
using conditioning::Gradients;
using conditioning::Labels;
using conditioning::Layer;
using conditioning::Running;

constexpr char kOperation[] = "conditioning";

// Reads the arguments that both passes have, and knows their sizes.
class Reader {
 public:
  Reader(Arrays& arrays, py::handle record) : arrays_(arrays), record_(record) {
    const TensorView& guidance = Floats("guidance");
    branched_ = guidance.rank() == 3;
    guidance.OfRank(branched_ ? 3 : 2, "[B, C] or [S, B, C]");
    batch.streams = branched_ ? guidance.size(0) : 1;
    batch.rows = guidance.size(branched_ ? 1 : 0);
    layer.classes = guidance.size(branched_ ? 2 : 1);
    batch.guidance = AsLabels(guidance);
    batch.training = record.attr("training").cast<bool>();
    if (batch.training && batch.rows < 2) {
      throw py::value_error(Text(kOperation, ": training needs at least 2 rows, got ", batch.rows));
    }
    const TensorView& x = Floats("x").OfRank(2, "[B, F]");
    layer.features = x.size(1);
    x.OfShape({batch.rows, layer.features});
    arrays.CheckUnitStride(x, "x");
    batch.x = x.data_as<float>();
    batch.x_stride = x.stride(0);
    const TensorView& timesteps =
        arrays.Input(record.attr("timesteps"), "timesteps", {DType::kInt64})
            .OfRank(1, "[B] or [1]");
    if (timesteps.size(0) != 1) timesteps.OfShape({batch.rows});
    batch.timesteps = timesteps.data_as<std::int64_t>();
    batch.timestep_stride = timesteps.size(0) == 1 ? 0 : timesteps.stride(0);
  }

  void ReadLayer(bool running) {
    static_cast<ConditionalLayer&>(layer) =
        arrays_.Layer(record_.attr("layer"), "", layer.features, 2 * layer.classes,
                      record_.attr("eps").cast<double>(), running);
  }

  const TensorView& Floats(const char* name) {
    return arrays_.Input(record_.attr(name), name, {DType::kFloat32});
  }

  // A view of shape [S, B, last], or [B, last] without branches.
  const TensorView& OfRows(const TensorView& view, std::int64_t last) const {
    return branched_ ? view.OfShape({batch.streams, batch.rows, last})
                     : view.OfShape({batch.rows, last});
  }
  float* OutputRows(py::handle array, const char* name, std::int64_t last) {
    return OfRows(arrays_.Output(array, name, {DType::kFloat32}), last)
        .template mutable_data_as<float>();
  }

  static Labels AsLabels(const TensorView& view) {
    const int row = view.rank() - 2;
    return {view.data_as<float>(),
            {row == 1 ? view.stride(0) : 0, view.stride(row), view.stride(row + 1)}};
  }

  Layer layer{};
  Batch batch{};

 private:
  Arrays& arrays_;
  py::handle record_;
  bool branched_;
};

// Reads a Noising; the noisy labels and the drawn noise are outputs.
Noising ReadNoising(Arrays& arrays, py::handle record, std::int64_t rows, std::int64_t classes) {
  if (classes > philox::kMaxClasses) {
    throw py::value_error(Text(kOperation, ": classes must be in [1, ", philox::kMaxClasses,
                               "] for noise, got ", classes));
  }
  if (record.attr("noise").is_none() == record.attr("drawn").is_none()) {
    throw py::value_error(Text(kOperation, ": noise must be either given or drawn"));
  }
  Noising noising{};
  const TensorView& y_0 = arrays.Input(record.attr("y_0"), "y_0", {DType::kFloat32});
  y_0.OfShape({rows, classes});
  noising.y_0 = y_0.data_as<float>();
  noising.y_0_stride[0] = y_0.stride(0);
  noising.y_0_stride[1] = y_0.stride(1);
  static constexpr char kTable[] = "sqrt_alpha_bar";  // views keep the names of their arrays
  noising.timesteps =
      arrays.Input(record.attr(kTable), kTable, {DType::kFloat32}).OfRank(1, "[T]").size(0);
  const auto table = [&](const char* name) {
    return arrays.Contiguous<float>(record.attr(name), name, {noising.timesteps});
  };
  noising.sqrt_alpha_bar = table(kTable);
  noising.sqrt_one_minus_alpha_bar = table("sqrt_one_minus_alpha_bar");
  noising.seed = record.attr("seed").cast<std::uint64_t>();
  const auto ids = [&](const char* name) {
    return arrays.OptionalContiguous<std::int64_t>(record.attr(name), name, {rows});
  };
  noising.images = ids("image_ids");
  noising.samples = ids("sample_ids");
  noising.given = arrays.OptionalContiguous<float>(record.attr("noise"), "noise", {rows, classes});
  noising.drawn =
      arrays.OptionalOutput<float>(record.attr("drawn"), "drawn noise", {rows, classes});
  return noising;
}

ForwardCall ReadForward(Arrays& arrays, py::handle record, py::handle outputs, py::handle noising) {
  Reader in(arrays, record);
  const std::int64_t features = in.layer.features;
  ForwardCall call{};
  if (noising.is_none()) {
    in.batch.y = Reader::AsLabels(in.OfRows(in.Floats("y_t"), in.layer.classes));
  }
  in.ReadLayer(true);
  if (!noising.is_none()) {
    call.noising = ReadNoising(arrays, noising, in.batch.rows, in.layer.classes);
    const TensorView& y = arrays.Output(record.attr("y_t"), "y_t", {DType::kFloat32});
    in.batch.y = Reader::AsLabels(in.OfRows(y, in.layer.classes));
    call.noising.y = y.mutable_data_as<float>();
  }
  call.layer = in.layer;
  call.batch = in.batch;
  call.running = {in.layer.running_mean, in.layer.running_var, nullptr, nullptr,
                  record.attr("momentum").cast<double>()};
  if (in.batch.training) {
    const auto updated = [&](const char* name) {
      return arrays.Output<float>(outputs.attr(name), name, {features});
    };
    call.running.updated_mean = updated("updated_mean");
    call.running.updated_variance = updated("updated_var");
  }
  call.statistics = arrays.Output<float>(outputs.attr("statistics"), "statistics",
                                         {2, StatisticsStreams(in.batch), features});
  call.out = in.OutputRows(outputs.attr("h"), "h", features);
  return call;
}

BackwardCall ReadBackward(Arrays& arrays, py::handle record, py::handle gradients) {
  Reader in(arrays, record);
  in.batch.y = Reader::AsLabels(in.OfRows(in.Floats("y_t"), in.layer.classes));
  in.ReadLayer(false);
  const std::int64_t features = in.layer.features;
  BackwardCall call{};
  const TensorView& grad = in.OfRows(in.Floats("grad"), features);
  arrays.CheckUnitStride(grad, "grad");
  call.grad = grad.data_as<float>();
  call.grad_stride[0] = grad.rank() == 3 ? grad.stride(0) : 0;
  call.grad_stride[1] = grad.stride(grad.rank() - 2);
  call.statistics = arrays.Contiguous<float>(record.attr("statistics"), "statistics",
                                             {2, StatisticsStreams(in.batch), features});
  const auto labels = [&](const char* name, const char* label) {
    const py::object array = gradients.attr(name);
    return array.is_none() ? nullptr : in.OutputRows(array, label, in.layer.classes);
  };
  const auto parameter = [&](const char* name, const char* label, Arrays::Shape shape) {
    return arrays.OptionalOutput<float>(gradients.attr(name), label, shape);
  };
  call.gradients = {
      parameter("x", "x gradient", {in.batch.rows, features}),
      labels("y_t", "y_t gradient"),
      labels("guidance", "guidance gradient"),
      parameter("weight", "weight gradient", {features, 2 * in.layer.classes}),
      parameter("bias", "bias gradient", {features}),
      parameter("gamma", "gamma gradient", {in.layer.gamma_rows, features}),
      parameter("norm_weight", "norm_weight gradient", {features}),
      parameter("norm_bias", "norm_bias gradient", {features}),
  };
  call.layer = in.layer;
  call.batch = in.batch;
  return call;
}

// ---- the CPU

#if DIFFMIC_WITH_CPU

// The kernels of a GPU check these themselves.
void CheckTimesteps(const Batch& batch, std::int64_t gamma_rows) {
  // Null for an empty array; one element for stride 0, which all rows share.
  const std::int64_t count = batch.timesteps == nullptr   ? 0
                             : batch.timestep_stride == 0 ? 1
                                                          : batch.rows;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t value = batch.timesteps[i * batch.timestep_stride];
    if (value < 0 || value >= gamma_rows) {
      throw py::value_error(
          Text(kOperation, ": timesteps must be in [0, ", gamma_rows - 1, "], got ", value));
    }
  }
}

cpu::conditioning::Options OptionsOf(int threads, const std::string& isa) {
  CheckThreads(kOperation, threads);
  const auto* kernels = cpu::conditioning::FindKernels(isa);
  if (kernels == nullptr) {
    throw py::value_error(
        Text(kOperation, ": isa must be auto or one that this processor has, got ", isa));
  }
  return {kernels, threads};
}

void Forward(py::handle record, py::handle outputs, py::handle noising, int threads,
             const std::string& isa) {
  Arrays arrays(kOperation, Place::kHost);
  const ForwardCall call = ReadForward(arrays, record, outputs, noising);
  CheckTimesteps(call.batch, call.layer.gamma_rows);
  const auto options = OptionsOf(threads, isa);
  const py::gil_scoped_release release;
  cpu::conditioning::Forward(call, options);
}

void Backward(py::handle record, py::handle gradients, int threads, const std::string& isa) {
  Arrays arrays(kOperation, Place::kHost);
  const BackwardCall call = ReadBackward(arrays, record, gradients);
  CheckTimesteps(call.batch, call.layer.gamma_rows);
  const auto options = OptionsOf(threads, isa);
  const py::gil_scoped_release release;
  cpu::conditioning::Backward(call, options);
}

#endif  // DIFFMIC_WITH_CPU

// ---- CUDA

#if DIFFMIC_WITH_CUDA

void ForwardOnCuda(py::handle record, py::handle outputs, py::handle noising,
                   std::uintptr_t stream) {
  Arrays arrays(kOperation, Place::kDevice);
  const ForwardCall call = ReadForward(arrays, record, outputs, noising);
  cuda::Launch(arrays,
               stream)([&](cudaStream_t launch) { cuda::conditioning::Forward(call, launch); });
}

void BackwardOnCuda(py::handle record, py::handle gradients, py::handle workspace_array,
                    std::uintptr_t stream) {
  Arrays arrays(kOperation, Place::kDevice);
  const BackwardCall call = ReadBackward(arrays, record, gradients);
  const bool labels = call.gradients.y != nullptr || call.gradients.guidance != nullptr;
  if (labels && workspace_array.is_none()) {
    throw py::value_error(
        Text(kOperation, ": workspace must be there for the gradients of y_t and guidance"));
  }
  const cuda::Launch launch(arrays, stream);
  float* const workspace =
      labels ? launch.Workspace<float>(workspace_array, cuda::conditioning::LabelSums(
                                                            call.layer.features, call.batch.streams,
                                                            call.batch.rows, call.layer.classes))
             : nullptr;
  launch([&](cudaStream_t on) { cuda::conditioning::Backward(call, workspace, on); });
}

#endif  // DIFFMIC_WITH_CUDA

constexpr char kForward[] =
    "Writes x * softplus(BN(gamma_t * (W [y_t ; guidance] + b))) and its statistics into outputs. "
    "call: a Conditioning; outputs: an Outputs; noising: a Noising, which makes call.y_t, or None. "
    "A timestep that gamma or the schedule does not have, and a sample beyond 32 bits, raise on "
    "the CPU (timesteps of gamma alone) or make their row NaN.";
constexpr char kBackward[] =
    "Writes the gradients that are not None. call: a ConditioningBackward; gradients: a Gradients, "
    "whose gamma must be zeros.";

}  // namespace

#if DIFFMIC_WITH_CPU
void BindConditioning(py::module_& m) {
  using py::arg;
  m.def("conditioning", &Forward, arg("call"), arg("outputs"), arg("noising") = py::none(),
        arg("threads") = 1, arg("isa") = "auto", kForward);
  m.def("conditioning_backward", &Backward, arg("call"), arg("gradients"), arg("threads") = 1,
        arg("isa") = "auto", kBackward);
  m.def("conditioning_instruction_sets", &cpu::conditioning::KernelNames,
        "Values of isa that run on this processor.");
}
#endif

#if DIFFMIC_WITH_CUDA
void cuda::BindConditioning(py::module_& m) {
  using py::arg;
  m.def("conditioning", &ForwardOnCuda, arg("call"), arg("outputs"), arg("noising"), arg("stream"),
        kForward);
  m.def("conditioning_backward", &BackwardOnCuda, arg("call"), arg("gradients"), arg("workspace"),
        arg("stream"), kBackward);
  m.def("conditioning_workspace", &conditioning::LabelSums, arg("features"), arg("streams"),
        arg("rows"), arg("classes"),
        "Elements of float32 workspace for conditioning_backward with the gradient of y_t or "
        "guidance.");
}
#endif

}  // namespace diffmic
