// Bindings of `mmd` and `noise_losses`, for the CPU and for CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "include/mmd_call.h"
#if DIFFMIC_WITH_CPU
#include "cpu/mmd/mmd.h"
#endif
#if DIFFMIC_WITH_CUDA
#include "bindings/cuda_launch.h"
#include "cuda/mmd/mmd.h"
#endif

namespace py = pybind11;

namespace diffmic {
namespace {

using mmd::Kernel;
using mmd::KernelMatrixBackwardCall;
using mmd::KernelMatrixCall;
using mmd::Matrix;
using mmd::MmdCall;
using mmd::NoiseLossesCall;
using mmd::Weights;

#if DIFFMIC_WITH_CPU
using cpu::mmd::Isa;

Isa IsaOf(const char* operation, const std::string& name) {
  Isa isa = Isa::kAuto;
  if (name == "portable") {
    isa = Isa::kPortable;
  } else if (name == "avx2") {
    isa = Isa::kAvx2;
  } else if (name == "avx512") {
    isa = Isa::kAvx512;
  } else if (name != "auto") {
    throw py::value_error(
        Text(operation, ": isa must be auto, portable, avx2 or avx512, got ", name));
  }
  if (!cpu::HasIsa(isa)) {
    throw py::value_error(
        Text(operation, ": isa must be one that this processor supports, got ", name));
  }
  return isa;
}

class Cpu {
 public:
  static constexpr Place kPlace = Place::kHost;
  static constexpr std::int64_t kMaxScales = std::numeric_limits<std::int64_t>::max();
  static constexpr std::int64_t kMaxStack = std::numeric_limits<std::int64_t>::max();

  Cpu(Arrays& arrays, int threads, const std::string& isa)
      : options_{IsaOf(arrays.operation(), isa), threads} {
    CheckThreads(arrays.operation(), threads);
  }

  // The kernel of the scale 1 / (2 median).
  static Kernel MedianKernel(const double* median) {
    if (*median == 0) {
      throw py::value_error(
          "mmd: bandwidth='median' needs rows that differ, at least half of all pairs of rows are "
          "equal: pass a bandwidth");
    }
    return {{1 / (2 * *median)}, nullptr};
  }

  template <typename T>
  void Run(const MmdCall<T>& call) const {
    using cpu::mmd::Side;
    Side side = Side::kNone;
    {
      const py::gil_scoped_release release;
      side = cpu::mmd::Mmd(call, options_);
    }
    if (side != Side::kNone) {
      throw py::value_error(Text("mmd: ", side == Side::kX ? "x" : "y",
                                 "_weights must not be negative, and ",
                                 call.unbiased ? "two" : "one", " of them must be more than 0"));
    }
  }
  template <typename T>
  void Run(const NoiseLossesCall<T>& call) const {
    const py::gil_scoped_release release;
    cpu::mmd::NoiseLosses(call, options_);
  }
  template <typename T>
  void Run(const KernelMatrixCall<T>& call) const {
    const py::gil_scoped_release release;
    cpu::mmd::KernelMatrix(call, options_);
  }
  template <typename T>
  void Run(const KernelMatrixBackwardCall<T>& call) const {
    const py::gil_scoped_release release;
    cpu::mmd::KernelMatrixBackward(call, options_);
  }
  template <typename T>
  double Median(const Matrix<T>& x, const Matrix<T>& y) const {
    const py::gil_scoped_release release;
    return cpu::mmd::MedianSquaredDistance(x, y, options_);
  }

 private:
  cpu::mmd::Options options_;
};
#endif

#if DIFFMIC_WITH_CUDA
class Cuda {
 public:
  static constexpr Place kPlace = Place::kDevice;
  static constexpr std::int64_t kMaxScales = cuda::mmd::kMaxScales;
  static constexpr std::int64_t kMaxStack = cuda::mmd::kMaxStack;

  Cuda(Arrays& arrays, py::handle workspace, std::uintptr_t stream)
      : launch_(arrays, stream), workspace_(workspace) {}
  Cuda(Arrays& arrays, std::uintptr_t stream) : Cuda(arrays, py::none(), stream) {}

  static Kernel MedianKernel(const double* median) { return {{}, median}; }

  template <typename T>
  void Run(const MmdCall<T>& call) const {
    const bool gradients = call.x_gradient != nullptr || call.y_gradient != nullptr;
    double* const workspace = Doubles(
        cuda::mmd::MmdWorkspace(call.x.count, call.y.count, call.x.width, sizeof(T), gradients));
    launch_([&](cudaStream_t stream) { cuda::mmd::Mmd(call, workspace, stream); });
  }
  template <typename T>
  void Run(const NoiseLossesCall<T>& call) const {
    double* const workspace = Doubles(
        cuda::mmd::NoiseLossesWorkspace(call.predictions.count, call.noise.count, call.noise.width,
                                        sizeof(T), call.gradients != nullptr));
    launch_([&](cudaStream_t stream) { cuda::mmd::NoiseLosses(call, workspace, stream); });
  }
  template <typename T>
  void Run(const KernelMatrixCall<T>& call) const {
    launch_([&](cudaStream_t stream) { cuda::mmd::KernelMatrix(call, stream); });
  }
  template <typename T>
  void Run(const KernelMatrixBackwardCall<T>& call) const {
    double* const workspace = Doubles(
        cuda::mmd::KernelMatrixWorkspace(call.x.count, call.y.count, call.x.width, sizeof(T)));
    launch_([&](cudaStream_t stream) { cuda::mmd::KernelMatrixBackward(call, workspace, stream); });
  }
  template <typename T>
  void Median(const Matrix<T>& x, const Matrix<T>& y, double* median) const {
    auto* const words = reinterpret_cast<std::uint64_t*>(launch_.Workspace<std::int64_t>(
        workspace_, cuda::mmd::MedianWorkspace(x.count, y.count, sizeof(T))));
    launch_([&](cudaStream_t stream) {
      cuda::mmd::MedianSquaredDistance(x, y, median, words, stream);
    });
  }

 private:
  double* Doubles(std::int64_t count) const { return launch_.Workspace<double>(workspace_, count); }

  cuda::Launch launch_;
  py::handle workspace_;
};
#endif

// ---- reading: what both backends share

constexpr std::initializer_list<DType> kFloating = {DType::kFloat32, DType::kFloat64};

// Calls body(T{}) for the dtype, float32 or float64.
template <typename Body>
auto Dispatch(const TensorView& view, const Body& body) {
  return view.dtype() == DType::kFloat32 ? body(float{}) : body(double{});
}

template <typename T>
Matrix<T> AsMatrix(const TensorView& view) {
  return {view.data_as<T>(), view.size(0), view.size(1), {view.stride(0), view.stride(1)}};
}

// The rows x [n, d] and y [m, d] of an operation.
struct Rows {
  Rows(Arrays& arrays, py::handle x_array, py::handle y_array)
      : x(arrays.Input(x_array, "x", kFloating)), y(arrays.Input(y_array, "y", {x.dtype()})) {
    x.OfRank(2, "[n, d]");
    y.OfRank(2, "[m, d]").OfShape({y.size(0), x.size(1)});
    if (x.numel() == 0 || y.numel() == 0) {
      throw py::value_error(Text(arrays.operation(), ": x and y must not be empty"));
    }
  }

  const TensorView &x, &y;
};

template <typename T>
Weights<T> ReadWeights(Arrays& arrays, py::handle array, const char* name, const TensorView& rows) {
  if (array.is_none()) return {nullptr, 0};
  const TensorView& view = arrays.Input(array, name, {rows.dtype()}).OfShape({rows.size(0)});
  return {view.data_as<T>(), view.stride(0)};
}

template <typename T>
T* ReadGradient(Arrays& arrays, py::handle array, const char* name, const TensorView& rows) {
  return arrays.OptionalOutput<T>(array, name, {rows.size(0), rows.size(1)});
}

template <typename Backend>
Kernel ReadKernel(Arrays& arrays, std::vector<double> scales, py::handle median) {
  const char* operation = arrays.operation();
  if (!median.is_none()) {
    if (!scales.empty()) {
      throw py::value_error(Text(operation, ": scales must be empty if there is a median"));
    }
    return Backend::MedianKernel(arrays.Contiguous<double>(median, "median", {}));
  }
  if (scales.empty()) throw py::value_error(Text(operation, ": scales must not be empty"));
  if (static_cast<std::int64_t>(scales.size()) > Backend::kMaxScales) {
    throw py::value_error(Text(operation, ": scales must be at most ", Backend::kMaxScales,
                               " on a GPU, got ", scales.size()));
  }
  for (const double scale : scales) {
    if (scale <= 0) {
      throw py::value_error(Text(operation, ": scales must be more than 0, got ", scale));
    }
  }
  return {std::move(scales), nullptr};
}

// ---- functions

template <typename Backend, typename... Launch>
void Mmd(py::handle x, py::handle y, py::handle x_weights, py::handle y_weights,
         std::vector<double> scales, py::handle median, bool unbiased, py::handle value,
         py::handle x_gradient, py::handle y_gradient, Launch... launch) {
  Arrays arrays("mmd", Backend::kPlace);
  const Rows rows(arrays, x, y);
  if (unbiased && (rows.x.size(0) < 2 || rows.y.size(0) < 2)) {
    throw py::value_error(
        "mmd: the unbiased estimator needs at least two rows of x and two rows of y");
  }
  const Backend backend(arrays, launch...);
  Dispatch(rows.x, [&]<typename T>(T) {
    backend.Run(MmdCall<T>{AsMatrix<T>(rows.x), AsMatrix<T>(rows.y),
                           ReadWeights<T>(arrays, x_weights, "x_weights", rows.x),
                           ReadWeights<T>(arrays, y_weights, "y_weights", rows.y),
                           ReadKernel<Backend>(arrays, std::move(scales), median), unbiased,
                           arrays.Output<T>(value, "value", {}),
                           ReadGradient<T>(arrays, x_gradient, "x_gradient", rows.x),
                           ReadGradient<T>(arrays, y_gradient, "y_gradient", rows.y)});
  });
}

template <typename Backend, typename... Launch>
void NoiseLosses(py::handle noise_array, py::handle predictions_array, py::handle losses,
                 py::handle gradients, Launch... launch) {
  Arrays arrays("noise_losses", Backend::kPlace);
  const TensorView& noise = arrays.Input(noise_array, "noise", kFloating).OfRank(2, "[n, d]");
  const TensorView& predictions =
      arrays.Input(predictions_array, "predictions", {noise.dtype()}).OfRank(3, "[S, n, d]");
  const std::int64_t count = predictions.size(0), n = noise.size(0), d = noise.size(1);
  predictions.OfShape({count, n, d});
  if (predictions.numel() == 0) arrays.Fail("predictions", "must not be empty");
  if (count > Backend::kMaxStack) {
    throw py::value_error(Text(arrays.operation(), ": predictions must be at most ",
                               Backend::kMaxStack, " on a GPU, got ", count));
  }
  const Backend backend(arrays, launch...);
  Dispatch(noise, [&]<typename T>(T) {
    const Matrix<T> first = {
        predictions.data_as<T>(), n, d, {predictions.stride(1), predictions.stride(2)}};
    backend.Run(
        NoiseLossesCall<T>{AsMatrix<T>(noise),
                           {first, count, predictions.stride(0)},
                           arrays.Output<T>(losses, "losses", {count}),
                           arrays.OptionalOutput<T>(gradients, "gradients", {count, n, d})});
  });
}

template <typename Backend, typename... Launch>
void KernelMatrix(py::handle x, py::handle y, std::vector<double> scales, py::handle median,
                  py::handle kernel, Launch... launch) {
  Arrays arrays("mmd.kernel_matrix", Backend::kPlace);
  const Rows rows(arrays, x, y);
  const Backend backend(arrays, launch...);
  Dispatch(rows.x, [&]<typename T>(T) {
    backend.Run(
        KernelMatrixCall<T>{AsMatrix<T>(rows.x), AsMatrix<T>(rows.y),
                            ReadKernel<Backend>(arrays, std::move(scales), median),
                            arrays.Output<T>(kernel, "kernel", {rows.x.size(0), rows.y.size(0)})});
  });
}

template <typename Backend, typename... Launch>
void KernelMatrixBackward(py::handle cotangent_array, py::handle x, py::handle y,
                          std::vector<double> scales, py::handle median, py::handle x_gradient,
                          py::handle y_gradient, Launch... launch) {
  Arrays arrays("mmd.kernel_matrix", Backend::kPlace);
  const Rows rows(arrays, x, y);
  const TensorView& cotangent = arrays.Input(cotangent_array, "cotangent", {rows.x.dtype()});
  cotangent.OfShape({rows.x.size(0), rows.y.size(0)});
  const Backend backend(arrays, launch...);
  Dispatch(rows.x, [&]<typename T>(T) {
    backend.Run(KernelMatrixBackwardCall<T>{
        AsMatrix<T>(cotangent), AsMatrix<T>(rows.x), AsMatrix<T>(rows.y),
        ReadKernel<Backend>(arrays, std::move(scales), median),
        ReadGradient<T>(arrays, x_gradient, "x_gradient", rows.x),
        ReadGradient<T>(arrays, y_gradient, "y_gradient", rows.y)});
  });
}

// Binds the functions of a backend: `launch` names the arguments of its launch, of types Launch.
template <typename Backend, typename... Launch, typename... Names>
void Bind(py::module_& m, const Names&... launch) {
  using py::arg;
  m.def("mmd", &Mmd<Backend, Launch...>, arg("x"), arg("y"), arg("x_weights"), arg("y_weights"),
        arg("scales"), arg("median"), arg("unbiased"), arg("value"), arg("x_gradient"),
        arg("y_gradient"), launch...,
        "Writes the discrepancy of x [n, d] and y [m, d] into value [], and its gradients where "
        "they are not None; k(u, v) = mean over scales of exp(-scale |u - v|^2), with the scale "
        "1 / (2 median) if median [] is not None. Weights that are negative or leave no pair, and "
        "a median of 0, raise on the CPU and give NaN on a GPU.");
  m.def("noise_losses", &NoiseLosses<Backend, Launch...>, arg("noise"), arg("predictions"),
        arg("losses"), arg("gradients"), launch...,
        "Writes the mean squared error of predictions[0] [n, d] and the discrepancies of the "
        "others from noise [n, d] into losses [S], and the gradients [S, n, d] if not None.");
  m.def("mmd_kernel_matrix_backward", &KernelMatrixBackward<Backend, Launch...>, arg("cotangent"),
        arg("x"), arg("y"), arg("scales"), arg("median"), arg("x_gradient"), arg("y_gradient"),
        launch..., "Writes the gradients of sum(cotangent * k(x, y)) where they are not None.");
}

template <typename Backend, typename... Launch, typename... Names>
void BindKernelMatrix(py::module_& m, const Names&... launch) {
  using py::arg;
  m.def("mmd_kernel_matrix", &KernelMatrix<Backend, Launch...>, arg("x"), arg("y"), arg("scales"),
        arg("median"), arg("kernel"), launch..., "Writes k(x_i, y_j) into kernel [n, m].");
}

constexpr char kMedian[] = "mmd.median_squared_distance";

}  // namespace

#if DIFFMIC_WITH_CPU
void BindMmd(py::module_& m) {
  using py::arg;
  Bind<Cpu, int, const std::string&>(m, arg("threads") = 1, arg("isa") = "auto");
  BindKernelMatrix<Cpu, int, const std::string&>(m, arg("threads") = 1, arg("isa") = "auto");
  m.def(
      "mmd_median_squared_distance",
      [](py::handle x, py::handle y, int threads, const std::string& isa) {
        Arrays arrays(kMedian, Place::kHost);
        const Rows rows(arrays, x, y);
        const Cpu backend(arrays, threads, isa);
        return Dispatch(rows.x, [&]<typename T>(T) {
          return backend.Median(AsMatrix<T>(rows.x), AsMatrix<T>(rows.y));
        });
      },
      arg("x"), arg("y"), arg("threads") = 1, arg("isa") = "auto",
      "The lower median of |z_i - z_j|^2, i < j, z the rows of x and y.");
  m.def(
      "mmd_instruction_sets",
      [] {
        std::vector<std::string> names = {"portable"};
        if (cpu::HasIsa(Isa::kAvx2)) names.emplace_back("avx2");
        if (cpu::HasIsa(Isa::kAvx512)) names.emplace_back("avx512");
        return names;
      },
      "Values of isa that run on this processor.");
}
#endif

#if DIFFMIC_WITH_CUDA
void cuda::BindMmd(py::module_& m) {
  using py::arg;
  Bind<Cuda, py::handle, std::uintptr_t>(m, arg("workspace"), arg("stream"));
  BindKernelMatrix<Cuda, std::uintptr_t>(m, arg("stream"));
  m.def(
      "mmd_median_squared_distance",
      [](py::handle x, py::handle y, py::handle median_array, py::handle workspace,
         std::uintptr_t stream) {
        Arrays arrays(kMedian, Place::kDevice);
        const Rows rows(arrays, x, y);
        double* const median = arrays.Output<double>(median_array, "median", {});
        const Cuda backend(arrays, workspace, stream);
        Dispatch(rows.x, [&]<typename T>(T) {
          backend.Median(AsMatrix<T>(rows.x), AsMatrix<T>(rows.y), median);
        });
      },
      arg("x"), arg("y"), arg("median"), arg("workspace"), arg("stream"),
      "Writes the lower median of |z_i - z_j|^2, i < j, z the rows of x and y, into median [].");
  m.def("mmd_workspace", &mmd::MmdWorkspace, arg("n"), arg("m"), arg("d"), arg("element_bytes"),
        arg("gradients"), "Elements of float64 workspace for mmd, often 0.");
  m.def("noise_losses_workspace", &mmd::NoiseLossesWorkspace, arg("count"), arg("n"), arg("d"),
        arg("element_bytes"), arg("gradients"),
        "Elements of float64 workspace for noise_losses, often 0.");
  m.def("mmd_kernel_matrix_workspace", &mmd::KernelMatrixWorkspace, arg("n"), arg("m"), arg("d"),
        arg("element_bytes"),
        "Elements of float64 workspace for mmd_kernel_matrix_backward, often 0.");
  m.def("mmd_median_workspace", &mmd::MedianWorkspace, arg("n"), arg("m"), arg("element_bytes"),
        "Elements of int64 workspace for mmd_median_squared_distance, often 0.");
}
#endif

}  // namespace diffmic
