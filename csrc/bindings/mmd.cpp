// Bindings of `mmd`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/mmd/mmd.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace py = pybind11;

namespace diffmic {
namespace {

using cpu::mmd::Isa;
using cpu::mmd::Side;

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
    throw py::value_error(Text(operation, ": isa ", name, " is not what this processor has"));
  }
  return isa;
}

cpu::mmd::Options OptionsOf(const char* operation, std::vector<double> scales, bool unbiased,
                            int threads, const std::string& isa) {
  CheckThreads(operation, threads);
  if (scales.empty()) throw py::value_error(Text(operation, ": scales must not be empty"));
  for (const double scale : scales) {
    if (scale <= 0) {
      throw py::value_error(Text(operation, ": scales must be more than 0, got ", scale));
    }
  }
  return {std::move(scales), unbiased, IsaOf(operation, isa), threads};
}

// The rows x [n, d] and y [m, d] of an operation.
struct Rows {
  Rows(py::handle x_array, py::handle y_array, const char* operation)
      : x(TensorView::Input(x_array, operation, "x")),
        y(TensorView::Input(y_array, operation, "y")) {
    x.OfType({DType::kFloat32, DType::kFloat64}).OfRank(2, "[n, d]");
    y.OfType({x.dtype()}).OfRank(2, "[m, d]").OfShape({y.size(0), x.size(1)});
    if (x.numel() == 0 || y.numel() == 0) {
      throw py::value_error(Text(operation, ": x and y must not be empty"));
    }
  }

  bool single() const { return x.dtype() == DType::kFloat32; }

  TensorView x, y;
};

template <typename T>
cpu::mmd::Matrix<T> AsMatrix(const TensorView& view) {
  return {view.data_as<T>(), view.size(0), view.size(1), {view.stride(0), view.stride(1)}};
}

// Views of arguments that may be None.
class Optional {
 public:
  static Optional Weights(py::handle array, const char* operation, const char* name,
                          const TensorView& rows) {
    Optional result;
    if (array.is_none()) return result;
    result.view_.push_back(TensorView::Input(array, operation, name));
    result.view_[0].OfType({rows.dtype()}).OfShape({rows.size(0)});
    return result;
  }

  static Optional Gradient(py::handle array, const char* operation, const char* name,
                           const TensorView& rows) {
    Optional result;
    if (array.is_none()) return result;
    result.view_.push_back(TensorView::Output(array, operation, name));
    result.view_[0].OfType({rows.dtype()}).OfShape({rows.size(0), rows.size(1)}).ApartFrom(rows);
    return result;
  }

  template <typename T>
  cpu::mmd::Weights<T> weights() const {
    if (view_.empty()) return {nullptr, 0};
    return {view_[0].data_as<T>(), view_[0].stride(0)};
  }

  template <typename T>
  T* data() const {
    return view_.empty() ? nullptr : view_[0].mutable_data_as<T>();
  }

 private:
  std::vector<TensorView> view_;
};

void Mmd(py::handle x_array, py::handle y_array, py::handle x_weights_array,
         py::handle y_weights_array, std::vector<double> scales, bool unbiased,
         py::handle value_array, py::handle x_gradient_array, py::handle y_gradient_array,
         int threads, const std::string& isa) {
  constexpr char kOperation[] = "mmd";
  const Rows rows(x_array, y_array, kOperation);
  const auto x_weights = Optional::Weights(x_weights_array, kOperation, "x_weights", rows.x);
  const auto y_weights = Optional::Weights(y_weights_array, kOperation, "y_weights", rows.y);
  const auto x_gradient = Optional::Gradient(x_gradient_array, kOperation, "x_gradient", rows.x);
  const auto y_gradient = Optional::Gradient(y_gradient_array, kOperation, "y_gradient", rows.y);
  const auto value = TensorView::Output(value_array, kOperation, "value");
  value.OfType({rows.x.dtype()}).OfShape({});
  const auto options = OptionsOf(kOperation, std::move(scales), unbiased, threads, isa);
  if (unbiased && (rows.x.size(0) < 2 || rows.y.size(0) < 2)) {
    throw py::value_error("mmd: the unbiased estimator needs two rows of x and two of y at least");
  }
  Side side = Side::kNone;
  const auto run = [&]<typename T>(T) {
    const py::gil_scoped_release release;
    side = cpu::mmd::Mmd(AsMatrix<T>(rows.x), AsMatrix<T>(rows.y), x_weights.weights<T>(),
                         y_weights.weights<T>(), options, value.mutable_data_as<T>(),
                         x_gradient.data<T>(), y_gradient.data<T>());
  };
  rows.single() ? run(float{}) : run(double{});
  if (side != Side::kNone) {
    throw py::value_error(Text("mmd: ", side == Side::kX ? "x" : "y",
                               "_weights must not be negative, and ", unbiased ? "two" : "one",
                               " of them must be more than 0"));
  }
}

void NoiseLosses(py::handle noise_array, py::handle predictions_array, py::handle losses_array,
                 py::handle gradients_array, int threads, const std::string& isa_name) {
  constexpr char kOperation[] = "noise_losses";
  const auto noise = TensorView::Input(noise_array, kOperation, "noise");
  const auto predictions = TensorView::Input(predictions_array, kOperation, "predictions");
  const auto losses = TensorView::Output(losses_array, kOperation, "losses");
  noise.OfType({DType::kFloat32, DType::kFloat64}).OfRank(2, "[n, d]");
  predictions.OfType({noise.dtype()}).OfRank(3, "[S, n, d]");
  predictions.OfShape({predictions.size(0), noise.size(0), noise.size(1)});
  losses.OfType({noise.dtype()}).OfShape({predictions.size(0)});
  if (predictions.numel() == 0) {
    throw py::value_error(Text(kOperation, ": predictions must not be empty"));
  }
  std::vector<TensorView> gradients;  // none or one
  if (!gradients_array.is_none()) {
    gradients.push_back(TensorView::Output(gradients_array, kOperation, "gradients"));
    gradients[0].OfType({noise.dtype()}).ApartFrom(noise).ApartFrom(predictions);
    gradients[0].OfShape({predictions.size(0), noise.size(0), noise.size(1)});
  }
  CheckThreads(kOperation, threads);
  const Isa isa = IsaOf(kOperation, isa_name);
  const auto run = [&]<typename T>(T) {
    const py::gil_scoped_release release;
    const cpu::mmd::Stack<T> stack = {{predictions.data_as<T>(),
                                       predictions.size(1),
                                       predictions.size(2),
                                       {predictions.stride(1), predictions.stride(2)}},
                                      predictions.size(0),
                                      predictions.stride(0)};
    cpu::mmd::NoiseLosses(AsMatrix<T>(noise), stack, isa, threads, losses.mutable_data_as<T>(),
                          gradients.empty() ? nullptr : gradients[0].mutable_data_as<T>());
  };
  noise.dtype() == DType::kFloat32 ? run(float{}) : run(double{});
}

void KernelMatrix(py::handle x_array, py::handle y_array, std::vector<double> scales,
                  py::handle kernel_array, int threads, const std::string& isa) {
  constexpr char kOperation[] = "mmd.kernel_matrix";
  const Rows rows(x_array, y_array, kOperation);
  const auto kernel = TensorView::Output(kernel_array, kOperation, "kernel");
  kernel.OfType({rows.x.dtype()}).OfShape({rows.x.size(0), rows.y.size(0)});
  kernel.ApartFrom(rows.x).ApartFrom(rows.y);
  const auto options = OptionsOf(kOperation, std::move(scales), false, threads, isa);
  const auto run = [&]<typename T>(T) {
    const py::gil_scoped_release release;
    cpu::mmd::KernelMatrix(AsMatrix<T>(rows.x), AsMatrix<T>(rows.y), options,
                           kernel.mutable_data_as<T>());
  };
  rows.single() ? run(float{}) : run(double{});
}

void KernelMatrixBackward(py::handle cotangent_array, py::handle x_array, py::handle y_array,
                          std::vector<double> scales, py::handle x_gradient_array,
                          py::handle y_gradient_array, int threads, const std::string& isa) {
  constexpr char kOperation[] = "mmd.kernel_matrix";
  const Rows rows(x_array, y_array, kOperation);
  const auto cotangent = TensorView::Input(cotangent_array, kOperation, "cotangent");
  cotangent.OfType({rows.x.dtype()}).OfShape({rows.x.size(0), rows.y.size(0)});
  const auto x_gradient = Optional::Gradient(x_gradient_array, kOperation, "x_gradient", rows.x);
  const auto y_gradient = Optional::Gradient(y_gradient_array, kOperation, "y_gradient", rows.y);
  const auto options = OptionsOf(kOperation, std::move(scales), false, threads, isa);
  const auto run = [&]<typename T>(T) {
    const py::gil_scoped_release release;
    cpu::mmd::KernelMatrixBackward(AsMatrix<T>(cotangent), AsMatrix<T>(rows.x), AsMatrix<T>(rows.y),
                                   options, x_gradient.data<T>(), y_gradient.data<T>());
  };
  rows.single() ? run(float{}) : run(double{});
}

double MedianSquaredDistance(py::handle x_array, py::handle y_array, int threads,
                             const std::string& isa_name) {
  constexpr char kOperation[] = "mmd.median_squared_distance";
  const Rows rows(x_array, y_array, kOperation);
  CheckThreads(kOperation, threads);
  const Isa isa = IsaOf(kOperation, isa_name);
  const auto run = [&]<typename T>(T) {
    const py::gil_scoped_release release;
    return cpu::mmd::MedianSquaredDistance(AsMatrix<T>(rows.x), AsMatrix<T>(rows.y), isa, threads);
  };
  return rows.single() ? run(float{}) : run(double{});
}

std::vector<std::string> InstructionSets() {
  std::vector<std::string> names = {"portable"};
  if (cpu::HasIsa(Isa::kAvx2)) names.emplace_back("avx2");
  if (cpu::HasIsa(Isa::kAvx512)) names.emplace_back("avx512");
  return names;
}

}  // namespace

void BindMmd(py::module_& m) {
  using py::arg;
  m.def("mmd", &Mmd, arg("x"), arg("y"), arg("x_weights"), arg("y_weights"), arg("scales"),
        arg("unbiased"), arg("value"), arg("x_gradient"), arg("y_gradient"), arg("threads") = 1,
        arg("isa") = "auto",
        "Write the discrepancy of x [n, d] and y [m, d] into value [], and its gradients where "
        "they are not None; k(u, v) = mean over scales of exp(-scale |u - v|^2).");
  m.def("noise_losses", &NoiseLosses, arg("noise"), arg("predictions"), arg("losses"),
        arg("gradients"), arg("threads") = 1, arg("isa") = "auto",
        "Write the mean squared error of predictions[0] [n, d] and the discrepancies of the others "
        "from noise [n, d] into losses [S], and the gradients [S, n, d] where they are not None.");
  m.def("mmd_kernel_matrix", &KernelMatrix, arg("x"), arg("y"), arg("scales"), arg("kernel"),
        arg("threads") = 1, arg("isa") = "auto", "Write k(x_i, y_j) into kernel [n, m].");
  m.def("mmd_kernel_matrix_backward", &KernelMatrixBackward, arg("cotangent"), arg("x"), arg("y"),
        arg("scales"), arg("x_gradient"), arg("y_gradient"), arg("threads") = 1,
        arg("isa") = "auto",
        "Write the gradients of sum(cotangent * k(x, y)) where they are not None.");
  m.def("mmd_median_squared_distance", &MedianSquaredDistance, arg("x"), arg("y"),
        arg("threads") = 1, arg("isa") = "auto",
        "The lower median of |z_i - z_j|^2, i < j, z the rows of x and y.");
  m.def("mmd_instruction_sets", &InstructionSets, "Values of isa that run on this processor.");
}

}  // namespace diffmic
