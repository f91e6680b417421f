// Bindings of `mmd` on a GPU; the twin of csrc/bindings/mmd.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/cuda_bindings.h"
#include "cuda/common/error.h"
#include "cuda/mmd/mmd.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace py = pybind11;

namespace diffmic::cuda {
namespace {

// The rows x [n, d] and y [m, d] of an operation.
struct Rows {
  Rows(py::handle x_array, py::handle y_array, const char* operation)
      : x(TensorView::Input(x_array, operation, "x", Place::kDevice)),
        y(TensorView::Input(y_array, operation, "y", Place::kDevice)) {
    x.OfType({DType::kFloat32, DType::kFloat64}).OfRank(2, "[n, d]");
    y.OfType({x.dtype()}).OfRank(2, "[m, d]").OfShape({y.size(0), x.size(1)}).OnDeviceOf(x);
    if (x.numel() == 0 || y.numel() == 0) {
      throw py::value_error(Text(operation, ": x and y must not be empty"));
    }
  }

  bool single() const { return x.dtype() == DType::kFloat32; }
  std::int64_t element_bytes() const { return single() ? 4 : 8; }

  TensorView x, y;
};

template <typename T>
mmd::Matrix<T> AsMatrix(const TensorView& view) {
  return {view.data_as<T>(), view.size(0), view.size(1), {view.stride(0), view.stride(1)}};
}

// Views of arguments that may be None.
class Optional {
 public:
  static Optional Weights(py::handle array, const char* operation, const char* name,
                          const TensorView& rows) {
    Optional result;
    if (array.is_none()) return result;
    result.view_.push_back(TensorView::Input(array, operation, name, Place::kDevice));
    result.view_[0].OfType({rows.dtype()}).OfShape({rows.size(0)}).OnDeviceOf(rows);
    return result;
  }

  static Optional Median(py::handle array, const char* operation, const TensorView& rows) {
    Optional result;
    if (array.is_none()) return result;
    result.view_.push_back(TensorView::Input(array, operation, "median", Place::kDevice));
    result.view_[0].OfType({DType::kFloat64}).OfShape({}).OnDeviceOf(rows);
    return result;
  }

  static Optional Gradient(py::handle array, const char* operation, const char* name,
                           const TensorView& rows) {
    Optional result;
    if (array.is_none()) return result;
    result.view_.push_back(TensorView::Output(array, operation, name, Place::kDevice));
    const TensorView& view = result.view_[0];
    view.OfType({rows.dtype()}).OfShape({rows.size(0), rows.size(1)});
    view.ApartFrom(rows).OnDeviceOf(rows);
    return result;
  }

  template <typename T>
  mmd::Weights<T> weights() const {
    if (view_.empty()) return {nullptr, 0};
    return {view_[0].data_as<T>(), view_[0].stride(0)};
  }

  template <typename T>
  T* data() const {
    return view_.empty() ? nullptr : static_cast<T*>(view_[0].mutable_data());
  }

  explicit operator bool() const { return !view_.empty(); }

 private:
  std::vector<TensorView> view_;
};

mmd::Kernel KernelOf(const char* operation, std::vector<double> scales, const Optional& median) {
  if (median) {
    if (scales.empty()) return {{}, median.data<const double>()};
    throw py::value_error(Text(operation, ": scales must be empty beside a median"));
  }
  if (scales.empty()) throw py::value_error(Text(operation, ": scales must not be empty"));
  if (scales.size() > static_cast<std::size_t>(mmd::kMaxScales)) {
    throw py::value_error(Text(operation, ": scales must be at most ", mmd::kMaxScales,
                               " on a GPU, got ", scales.size()));
  }
  for (const double scale : scales) {
    if (scale <= 0) {
      throw py::value_error(Text(operation, ": scales must be more than 0, got ", scale));
    }
  }
  return {std::move(scales), nullptr};
}

// Scratch memory of `needed` elements of eight bytes; NULL where none is needed.
template <typename T>
T* AsScratch(const TensorView& view, const char* operation, DType type, std::int64_t needed,
             const TensorView& rows) {
  view.OfType({type});
  if (needed == 0) return nullptr;
  view.OnDeviceOf(rows);
  if (view.numel() < needed) {
    throw py::value_error(
        Text(operation, ": scratch must have ", needed, " elements, got ", view.numel()));
  }
  if (reinterpret_cast<std::uintptr_t>(view.data()) % 16 != 0) {
    throw py::value_error(Text(operation, ": scratch must begin at a multiple of 16 bytes"));
  }
  return static_cast<T*>(view.mutable_data());
}

void Mmd(py::handle x_array, py::handle y_array, py::handle x_weights_array,
         py::handle y_weights_array, std::vector<double> scales, py::handle median_array,
         bool unbiased, py::handle value_array, py::handle x_gradient_array,
         py::handle y_gradient_array, py::handle scratch_array, std::uintptr_t stream) {
  constexpr char kOperation[] = "mmd";
  const Rows rows(x_array, y_array, kOperation);
  const auto x_weights = Optional::Weights(x_weights_array, kOperation, "x_weights", rows.x);
  const auto y_weights = Optional::Weights(y_weights_array, kOperation, "y_weights", rows.y);
  const auto median = Optional::Median(median_array, kOperation, rows.x);
  const auto x_gradient = Optional::Gradient(x_gradient_array, kOperation, "x_gradient", rows.x);
  const auto y_gradient = Optional::Gradient(y_gradient_array, kOperation, "y_gradient", rows.y);
  const auto value = TensorView::Output(value_array, kOperation, "value", Place::kDevice);
  const auto scratch = TensorView::Output(scratch_array, kOperation, "scratch", Place::kDevice);
  value.OfType({rows.x.dtype()}).OfShape({}).OnDeviceOf(rows.x);
  const mmd::Kernel kernel = KernelOf(kOperation, std::move(scales), median);
  if (unbiased && (rows.x.size(0) < 2 || rows.y.size(0) < 2)) {
    throw py::value_error("mmd: the unbiased estimator needs two rows of x and two of y at least");
  }
  const bool gradients = x_gradient || y_gradient;
  auto* const doubles =
      AsScratch<double>(scratch, kOperation, DType::kFloat64,
                        mmd::MmdScratch(rows.x.size(0), rows.y.size(0), rows.x.size(1),
                                        rows.element_bytes(), gradients),
                        rows.x);
  const auto run = [&]<typename T>(T) {
    const py::gil_scoped_release release;
    const DeviceGuard guard(kOperation, rows.x.device());
    mmd::Mmd(AsMatrix<T>(rows.x), AsMatrix<T>(rows.y), x_weights.weights<T>(),
             y_weights.weights<T>(), kernel, unbiased, value.mutable_data_as<T>(),
             x_gradient.data<T>(), y_gradient.data<T>(), doubles, AsStream(stream));
  };
  rows.single() ? run(float{}) : run(double{});
}

void NoiseLosses(py::handle noise_array, py::handle predictions_array, py::handle losses_array,
                 py::handle gradients_array, py::handle scratch_array, std::uintptr_t stream) {
  constexpr char kOperation[] = "noise_losses";
  const auto noise = TensorView::Input(noise_array, kOperation, "noise", Place::kDevice);
  const auto predictions =
      TensorView::Input(predictions_array, kOperation, "predictions", Place::kDevice);
  const auto losses = TensorView::Output(losses_array, kOperation, "losses", Place::kDevice);
  const auto scratch = TensorView::Output(scratch_array, kOperation, "scratch", Place::kDevice);
  noise.OfType({DType::kFloat32, DType::kFloat64}).OfRank(2, "[n, d]");
  predictions.OfType({noise.dtype()}).OfRank(3, "[S, n, d]").OnDeviceOf(noise);
  const std::int64_t count = predictions.size(0), n = noise.size(0), d = noise.size(1);
  predictions.OfShape({count, n, d});
  losses.OfType({noise.dtype()}).OfShape({count}).OnDeviceOf(noise);
  if (predictions.numel() == 0 || count > mmd::kMaxStack) {
    throw py::value_error(Text(kOperation, ": predictions must be 1 to ", mmd::kMaxStack,
                               " of noise that is not empty, got [", count, ", ", n, ", ", d, "]"));
  }
  std::vector<TensorView> gradients;  // none or one
  if (!gradients_array.is_none()) {
    gradients.push_back(
        TensorView::Output(gradients_array, kOperation, "gradients", Place::kDevice));
    gradients[0].OfType({noise.dtype()}).OfShape({count, n, d}).OnDeviceOf(noise);
    gradients[0].ApartFrom(noise).ApartFrom(predictions);
  }
  const bool single = noise.dtype() == DType::kFloat32;
  auto* const doubles = AsScratch<double>(
      scratch, kOperation, DType::kFloat64,
      mmd::NoiseLossesScratch(count, n, d, single ? 4 : 8, !gradients.empty()), noise);
  const auto run = [&]<typename T>(T) {
    const py::gil_scoped_release release;
    const DeviceGuard guard(kOperation, noise.device());
    const mmd::Matrix<T> first = {
        predictions.data_as<T>(), n, d, {predictions.stride(1), predictions.stride(2)}};
    mmd::NoiseLosses<T>(
        AsMatrix<T>(noise), {first, count, predictions.stride(0)}, losses.mutable_data_as<T>(),
        gradients.empty() ? nullptr : gradients[0].mutable_data_as<T>(), doubles, AsStream(stream));
  };
  single ? run(float{}) : run(double{});
}

void KernelMatrix(py::handle x_array, py::handle y_array, std::vector<double> scales,
                  py::handle median_array, py::handle matrix_array, std::uintptr_t stream) {
  constexpr char kOperation[] = "mmd.kernel_matrix";
  const Rows rows(x_array, y_array, kOperation);
  const auto median = Optional::Median(median_array, kOperation, rows.x);
  const auto matrix = TensorView::Output(matrix_array, kOperation, "kernel", Place::kDevice);
  matrix.OfType({rows.x.dtype()}).OfShape({rows.x.size(0), rows.y.size(0)}).OnDeviceOf(rows.x);
  matrix.ApartFrom(rows.x).ApartFrom(rows.y);
  const mmd::Kernel kernel = KernelOf(kOperation, std::move(scales), median);
  const auto run = [&]<typename T>(T) {
    const py::gil_scoped_release release;
    const DeviceGuard guard(kOperation, rows.x.device());
    mmd::KernelMatrix(AsMatrix<T>(rows.x), AsMatrix<T>(rows.y), kernel, matrix.mutable_data_as<T>(),
                      AsStream(stream));
  };
  rows.single() ? run(float{}) : run(double{});
}

void KernelMatrixBackward(py::handle cotangent_array, py::handle x_array, py::handle y_array,
                          std::vector<double> scales, py::handle median_array,
                          py::handle x_gradient_array, py::handle y_gradient_array,
                          py::handle scratch_array, std::uintptr_t stream) {
  constexpr char kOperation[] = "mmd.kernel_matrix";
  const Rows rows(x_array, y_array, kOperation);
  const auto cotangent =
      TensorView::Input(cotangent_array, kOperation, "cotangent", Place::kDevice);
  cotangent.OfType({rows.x.dtype()}).OfShape({rows.x.size(0), rows.y.size(0)}).OnDeviceOf(rows.x);
  const auto median = Optional::Median(median_array, kOperation, rows.x);
  const auto x_gradient = Optional::Gradient(x_gradient_array, kOperation, "x_gradient", rows.x);
  const auto y_gradient = Optional::Gradient(y_gradient_array, kOperation, "y_gradient", rows.y);
  const auto scratch = TensorView::Output(scratch_array, kOperation, "scratch", Place::kDevice);
  const mmd::Kernel kernel = KernelOf(kOperation, std::move(scales), median);
  auto* const doubles =
      AsScratch<double>(scratch, kOperation, DType::kFloat64,
                        mmd::KernelMatrixScratch(rows.x.size(0), rows.y.size(0), rows.x.size(1),
                                                 rows.element_bytes()),
                        rows.x);
  const auto run = [&]<typename T>(T) {
    const py::gil_scoped_release release;
    const DeviceGuard guard(kOperation, rows.x.device());
    mmd::KernelMatrixBackward(AsMatrix<T>(cotangent), AsMatrix<T>(rows.x), AsMatrix<T>(rows.y),
                              kernel, x_gradient.data<T>(), y_gradient.data<T>(), doubles,
                              AsStream(stream));
  };
  rows.single() ? run(float{}) : run(double{});
}

void MedianSquaredDistance(py::handle x_array, py::handle y_array, py::handle median_array,
                           py::handle scratch_array, std::uintptr_t stream) {
  constexpr char kOperation[] = "mmd.median_squared_distance";
  const Rows rows(x_array, y_array, kOperation);
  const auto median = TensorView::Output(median_array, kOperation, "median", Place::kDevice);
  median.OfType({DType::kFloat64}).OfShape({}).OnDeviceOf(rows.x);
  const auto scratch = TensorView::Output(scratch_array, kOperation, "scratch", Place::kDevice);
  auto* const words = AsScratch<std::uint64_t>(
      scratch, kOperation, DType::kInt64,
      mmd::MedianScratch(rows.x.size(0), rows.y.size(0), rows.element_bytes()), rows.x);
  const auto run = [&]<typename T>(T) {
    const py::gil_scoped_release release;
    const DeviceGuard guard(kOperation, rows.x.device());
    mmd::MedianSquaredDistance(AsMatrix<T>(rows.x), AsMatrix<T>(rows.y),
                               median.mutable_data_as<double>(), words, AsStream(stream));
  };
  rows.single() ? run(float{}) : run(double{});
}

}  // namespace

void BindMmd(py::module_& m) {
  using py::arg;
  m.def("mmd_scratch", &mmd::MmdScratch, arg("n"), arg("m"), arg("d"), arg("element_bytes"),
        arg("gradients"), "Elements of float64 scratch memory that mmd needs, often 0.");
  m.def("noise_losses_scratch", &mmd::NoiseLossesScratch, arg("count"), arg("n"), arg("d"),
        arg("element_bytes"), arg("gradients"),
        "Elements of float64 scratch memory that noise_losses needs, often 0.");
  m.def("noise_losses", &NoiseLosses, arg("noise"), arg("predictions"), arg("losses"),
        arg("gradients"), arg("scratch"), arg("stream"),
        "Write the mean squared error of predictions[0] [n, d] and the discrepancies of the others "
        "from noise [n, d] into losses [S], and the gradients [S, n, d] where they are not None.");
  m.def("mmd_kernel_matrix_scratch", &mmd::KernelMatrixScratch, arg("n"), arg("m"), arg("d"),
        arg("element_bytes"),
        "Elements of float64 scratch memory that mmd_kernel_matrix_backward needs, often 0.");
  m.def("mmd_median_scratch", &mmd::MedianScratch, arg("n"), arg("m"), arg("element_bytes"),
        "Elements of int64 scratch memory that mmd_median_squared_distance needs, often 0.");
  m.def("mmd", &Mmd, arg("x"), arg("y"), arg("x_weights"), arg("y_weights"), arg("scales"),
        arg("median"), arg("unbiased"), arg("value"), arg("x_gradient"), arg("y_gradient"),
        arg("scratch"), arg("stream"),
        "Write the discrepancy of x [n, d] and y [m, d] into value [], and its gradients where "
        "they are not None; k(u, v) = mean over scales of exp(-scale |u - v|^2), the scale being "
        "1 / (2 median) where median [] is not None. Not-a-number where weights are negative or "
        "leave no pair, or the median is 0.");
  m.def("mmd_kernel_matrix", &KernelMatrix, arg("x"), arg("y"), arg("scales"), arg("median"),
        arg("kernel"), arg("stream"), "Write k(x_i, y_j) into kernel [n, m].");
  m.def("mmd_kernel_matrix_backward", &KernelMatrixBackward, arg("cotangent"), arg("x"), arg("y"),
        arg("scales"), arg("median"), arg("x_gradient"), arg("y_gradient"), arg("scratch"),
        arg("stream"), "Write the gradients of sum(cotangent * k(x, y)) where they are not None.");
  m.def("mmd_median_squared_distance", &MedianSquaredDistance, arg("x"), arg("y"), arg("median"),
        arg("scratch"), arg("stream"),
        "Write the lower median of |z_i - z_j|^2, i < j, z the rows of x and y, into median [].");
}

}  // namespace diffmic::cuda
