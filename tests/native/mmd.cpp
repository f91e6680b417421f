// `mmd`: both estimators, one scale and several, weights, each choice of gradients, the kernel
// matrix with its gradients, the median, and the training losses, in float and double.
#include "cpu/mmd/mmd.h"

#include <limits>

#include "support.h"

namespace {

namespace mmd = diffmic::cpu::mmd;
using mmd::Isa;
using mmd::Matrix;
using mmd::Options;
using mmd::Side;
using mmd::Weights;

// [count, width], contiguous in row-major or column-major order.
template <typename T>
struct Rows {
  Rows(std::int64_t count, std::int64_t width, bool by_columns = false)
      : memory(count * width, -1.0, 1.0),
        matrix{memory.get(),
               count,
               width,
               {by_columns ? std::int64_t{1} : width, by_columns ? count : std::int64_t{1}}} {}

  NumbersOf<T> memory;
  Matrix<T> matrix;
};

template <typename T>
void Append(std::vector<T>* all, const NumbersOf<T>& more, bool wanted = true) {
  if (!wanted) return;
  const std::vector<T> values = more.copy();
  all->insert(all->end(), values.begin(), values.end());
}

struct Size {
  std::int64_t n, m, d;
};

template <typename T>
void CheckValue(Isa isa, const Size& size, const std::vector<double>& scales, bool unbiased,
                bool weighted) {
  const Rows<T> x(size.n, size.d, true), y(size.m, size.d);
  const NumbersOf<T> p(2 * size.n - 1, 0.1, 1.0), q(size.m, 0.1, 1.0);
  const Weights<T> x_weights{weighted ? p.get() : nullptr, 2};
  const Weights<T> y_weights{weighted ? q.get() : nullptr, 1};
  for (const bool x_slope : {false, true}) {
    for (const bool y_slope : {false, true}) {
      Trace<T> trace("mmd");
      for (const int threads : {1, 2, 4}) {
        const NumbersOf<T> value(1, 0, 0), gx(size.n * size.d, 0, 0), gy(size.m * size.d, 0, 0);
        const mmd::MmdCall<T> call{x.matrix,
                                   y.matrix,
                                   x_weights,
                                   y_weights,
                                   {scales, nullptr},
                                   unbiased,
                                   value.get(),
                                   x_slope ? gx.get() : nullptr,
                                   y_slope ? gy.get() : nullptr};
        if (mmd::Mmd(call, {isa, threads}) != Side::kNone) {
          Fail("mmd: valid weights were rejected");
        }
        std::vector<T> found = value.copy();
        Append(&found, gx, x_slope);
        Append(&found, gy, y_slope);
        trace.Compare(found, threads);
      }
    }
  }
}

template <typename T>
void CheckWeights() {
  const Rows<T> x(3, 2), y(4, 2);
  const T negative[] = {1, -1, 1}, alone[] = {0, 0, 2, 0};
  const NumbersOf<T> value(1, 0, 0);
  const Weights<T> none{nullptr, 0};
  const auto side = [&](const Weights<T>& of_x, const Weights<T>& of_y, bool unbiased) {
    const mmd::Kernel kernel{{1.0}, nullptr};
    return mmd::Mmd<T>(
        {x.matrix, y.matrix, of_x, of_y, kernel, unbiased, value.get(), nullptr, nullptr},
        {Isa::kAuto, 1});
  };
  if (side({negative, 1}, none, false) != Side::kX ||
      side(none, {alone, 1}, false) != Side::kNone || side(none, {alone, 1}, true) != Side::kY ||
      side(none, {alone, 0}, false) != Side::kY) {
    Fail("mmd: weights were validated wrongly");
  }
}

template <typename T>
void CheckKernelMatrix(Isa isa, const Size& size, const std::vector<double>& scales) {
  const Rows<T> x(size.n, size.d), y(size.m, size.d, true);
  const Rows<T> cotangent(size.n, size.m, true);
  Trace<T> trace("mmd.kernel_matrix");
  for (const int threads : {1, 3}) {
    const Options options{isa, threads};
    const mmd::Kernel function{scales, nullptr};
    const NumbersOf<T> kernel(size.n * size.m, 0, 0);
    mmd::KernelMatrix<T>({x.matrix, y.matrix, function, kernel.get()}, options);
    std::vector<T> found = kernel.copy();
    const NumbersOf<T> gx(size.n * size.d, 0, 0), gy(size.m * size.d, 0, 0);
    const auto backward = [&](T* x_gradient, T* y_gradient) {
      mmd::KernelMatrixBackward<T>(
          {cotangent.matrix, x.matrix, y.matrix, function, x_gradient, y_gradient}, options);
    };
    backward(gx.get(), gy.get());
    Append(&found, gx);
    Append(&found, gy);
    backward(gx.get(), nullptr);
    backward(nullptr, gy.get());
    Append(&found, gx);
    Append(&found, gy);
    trace.Compare(found, threads);
  }
}

template <typename T>
void CheckMedian(Isa isa, const Size& size) {
  const Rows<T> x(size.n, size.d, true), y(size.m, size.d);
  Trace<double> trace("mmd.median_squared_distance");
  for (const int threads : {1, 4}) {
    trace.Compare({mmd::MedianSquaredDistance(x.matrix, y.matrix, {isa, threads})}, threads);
  }
  x.memory.get()[0] = std::numeric_limits<T>::quiet_NaN();
  if (!std::isnan(mmd::MedianSquaredDistance(x.matrix, y.matrix, {isa, 2}))) {
    Fail("mmd: the median of NaN is not NaN");
  }
}

// Negative strides, and a stride of 0.
template <typename T>
void CheckStrides(Isa isa) {
  const NumbersOf<T> a(5 * 3, -1.0, 1.0), b(3, -1.0, 1.0);
  const Matrix<T> x{a.get() + 14, 5, 3, {-3, -1}}, y{b.get(), 4, 3, {0, 1}};
  const Options options{isa, 1};
  const mmd::Kernel function{{0.3}, nullptr};
  const NumbersOf<T> kernel(20, 0, 0), gx(15, 0, 0), gy(12, 0, 0);
  mmd::KernelMatrix<T>({x, y, function, kernel.get()}, options);
  const Matrix<T> cotangent{b.get(), 5, 4, {0, 0}};
  mmd::KernelMatrixBackward<T>({cotangent, x, y, function, gx.get(), gy.get()}, options);
  Trace<T> finite("mmd, strides");
  finite.Compare(kernel.copy(), 1);
}

// The last prediction of a stack ends at the end of its allocation.
template <typename T>
void CheckNoiseLosses(Isa isa, std::int64_t count, const Size& size) {
  const std::int64_t apart = size.n * size.d + 3;
  const Rows<T> noise(size.n, size.d, true);
  const NumbersOf<T> predictions((count - 1) * apart + size.n * size.d, -1.0, 1.0);
  const mmd::Stack<T> stack{{predictions.get(), size.n, size.d, {size.d, 1}}, count, apart};
  for (const bool slope : {false, true}) {
    Trace<T> trace("noise_losses");
    for (const int threads : {1, 2, 4}) {
      const NumbersOf<T> losses(count, 0, 0), gradients(count * size.n * size.d, 0, 0);
      mmd::NoiseLosses<T>({noise.matrix, stack, losses.get(), slope ? gradients.get() : nullptr},
                          {isa, threads});
      std::vector<T> found = losses.copy();
      Append(&found, gradients, slope);
      trace.Compare(found, threads);
    }
  }
}

template <typename T>
void CheckAll(Isa isa, bool quick) {
  const std::vector<double> one{0.2}, several{0.01, 0.3, 30.0};
  for (const bool weighted : {false, true}) {
    CheckValue<T>(isa, {1, 1, 1}, one, false, weighted);
    for (const bool unbiased : {false, true}) {
      CheckValue<T>(isa, {3, 7, 2}, several, unbiased, weighted);
      if (quick && !(weighted && unbiased)) continue;
      CheckValue<T>(isa, {97, 131, 33}, one, unbiased, weighted);
    }
  }
  CheckMedian<T>(isa, {1, 2, 1});
  CheckMedian<T>(isa, {97, 131, 17});
  CheckStrides<T>(isa);
  CheckNoiseLosses<T>(isa, 1, {1, 1, 1});
  CheckNoiseLosses<T>(isa, 3, {32, 32, 5});
  CheckKernelMatrix<T>(isa, {97, 131, 33}, several);
  if (quick) return;
  CheckValue<T>(isa, {5, 230, 129}, several, true, true);
  CheckValue<T>(isa, {487, 395, 9}, several, true, true);  // odd and even numbers of blocks
  CheckValue<T>(isa, {13, 14, 4099}, one, false, false);   // wide rows, whose blocks are smaller
  for (const Size& size : {Size{1, 1, 1}, Size{97, 131, 33}, Size{130, 5, 200}}) {
    CheckKernelMatrix<T>(isa, size, one);
    CheckKernelMatrix<T>(isa, size, several);
  }
  CheckNoiseLosses<T>(isa, 3, {230, 230, 33});
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::pair<std::string, Isa>> known{
      {"avx512", Isa::kAvx512}, {"avx2", Isa::kAvx2}, {"portable", Isa::kPortable}};
  std::vector<std::string> available;
  for (const auto& [name, isa] : known) {
    if (diffmic::cpu::HasIsa(isa)) available.push_back(name);
  }
  const Request request(argc, argv, available);
  for (const std::string& set : request.sets()) {
    for (const auto& [name, isa] : known) {
      if (name != set) continue;
      CheckAll<float>(isa, request.quick());
      CheckAll<double>(isa, request.quick());
    }
  }
  CheckWeights<float>();
  CheckWeights<double>();
  if (!request.quick()) {  // enough pairs for 16-bit digits
    CheckMedian<float>(Isa::kAuto, {700, 800, 1});
    CheckMedian<double>(Isa::kAuto, {700, 800, 1});
  }
  request.Finish("mmd");
}
