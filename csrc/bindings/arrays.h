// The arrays of one call, for the CPU and for a GPU: each is checked (dtype, shape, layout, device)
// when it is read, with the same messages everywhere, and is kept alive until the call ends.
//
// A binding takes the call's arguments as one Python record, a NamedTuple of diffmic_fast.ops, and
// reads each field by name:
//
//   Arrays arrays("denoise", Place::kHost);
//   Sizes sizes{...};
//   call.features = arrays.Rows(record.attr("features"), "features", {rows, F}, &stride);
//   call.prior = arrays.Contiguous<float>(record.attr("prior"), "prior", {rows, C});
//   call.out = arrays.Output<float>(out, "out", {rows, C});
#ifndef DIFFMIC_BINDINGS_ARRAYS_H_
#define DIFFMIC_BINDINGS_ARRAYS_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "include/conditional_layer.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace diffmic {

template <typename T>
constexpr DType DTypeOf() {
  if constexpr (std::is_same_v<T, float>) return DType::kFloat32;
  if constexpr (std::is_same_v<T, double>) return DType::kFloat64;
  if constexpr (std::is_same_v<T, std::int64_t>) return DType::kInt64;
  if constexpr (std::is_same_v<T, std::uint8_t>) return DType::kUInt8;
}

class Arrays {
 public:
  using Shape = std::initializer_list<std::int64_t>;
  using DTypes = std::initializer_list<DType>;

  Arrays(const char* operation, Place place) : operation_(operation), place_(place) {}

  // An array of any rank and strides, to be described further by the caller.
  const TensorView& Input(pybind11::handle array, const char* name, DTypes dtypes) {
    return Keep(TensorView::Input(array, operation_, name, place_), dtypes);
  }

  // The address of a contiguous array.
  template <typename T>
  const T* Contiguous(pybind11::handle array, const char* name, Shape shape) {
    const TensorView& view = Input(array, name, {DTypeOf<T>()}).OfShape(shape);
    if (!view.is_compact()) Fail(name, "must be contiguous");
    return view.data_as<T>();
  }

  // The same for an array that may be None: null then.
  template <typename T>
  const T* OptionalContiguous(pybind11::handle array, const char* name, Shape shape) {
    return array.is_none() ? nullptr : Contiguous<T>(array, name, shape);
  }

  // The address of a matrix whose rows have unit stride.
  const float* Rows(pybind11::handle array, const char* name, Shape shape, std::int64_t* stride) {
    const TensorView& view = Input(array, name, {DType::kFloat32}).OfShape(shape);
    CheckUnitStride(view, name);
    *stride = view.stride(0);
    return view.data_as<float>();
  }

  // Raises ValueError where the last dimension of a view does not have unit stride. Strides of an
  // array without elements are never used, and PyTorch takes any of them for contiguous.
  void CheckUnitStride(const TensorView& view, const char* name) const {
    const int last = view.rank() - 1;
    if (view.numel() == 0 || view.size(last) <= 1 || view.stride(last) == 1) return;
    Fail(name, "must have rows of unit stride");
  }

  // Memory that is written: contiguous, and apart from every array read or written before it.
  const TensorView& Output(pybind11::handle array, const char* name, DTypes dtypes) {
    const TensorView& view = Keep(TensorView::Output(array, operation_, name, place_), dtypes);
    for (const TensorView& other : views_) {
      if (&other != &view) view.ApartFrom(other);
    }
    return view;
  }
  template <typename T>
  T* Output(pybind11::handle array, const char* name, Shape shape) {
    return Output(array, name, {DTypeOf<T>()}).OfShape(shape).template mutable_data_as<T>();
  }
  // The same for memory that may be None: null then.
  template <typename T>
  T* OptionalOutput(pybind11::handle array, const char* name, Shape shape) {
    return array.is_none() ? nullptr : Output<T>(array, name, shape);
  }

  // A conditional layer [F, inputs] from a ConditionalLayer of diffmic_fast.reference, whose
  // running statistics are read unless `running` is false. Messages name the layer ("hidden 1"), or
  // where `name` is "" the field.
  ConditionalLayer Layer(pybind11::handle record, const char* name, std::int64_t features,
                         std::int64_t inputs, double eps, bool running = true) {
    const auto named = [&](const char* field) { return *name == '\0' ? field : name; };
    const auto vector = [&](const char* field) {
      return Contiguous<float>(record.attr(field), named(field), {features});
    };
    ConditionalLayer layer{};
    const TensorView& weight = Input(record.attr("weight"), named("weight"), {DType::kFloat32});
    weight.OfShape({features, inputs});
    layer.weight = weight.data_as<float>();
    layer.weight_stride[0] = weight.stride(0);
    layer.weight_stride[1] = weight.stride(1);
    layer.bias = vector("bias");
    const TensorView& gamma = Input(record.attr("gamma"), named("gamma"), {DType::kFloat32});
    gamma.OfRank(2, "[T + 1, F]").OfShape({gamma.size(0), features});
    CheckUnitStride(gamma, named("gamma"));
    layer.gamma = gamma.data_as<float>();
    layer.gamma_rows = gamma.size(0);
    layer.gamma_stride = gamma.stride(0);
    layer.norm_weight = vector("norm_weight");
    layer.norm_bias = vector("norm_bias");
    layer.running_mean = running ? vector("running_mean") : nullptr;
    layer.running_var = running ? vector("running_var") : nullptr;
    layer.eps = eps;
    return layer;
  }

  const char* operation() const { return operation_; }
  Place place() const { return place_; }

  // The GPU of the arrays; 0 on the host.
  int device() const { return views_.front().device(); }

  [[noreturn]] void Fail(const char* name, const char* what) const {
    throw pybind11::value_error(Text(operation_, ": ", name, " ", what));
  }

 private:
  const TensorView& Keep(TensorView view, DTypes dtypes) {
    // A deque: references to its elements stay valid.
    return views_.emplace_back(std::move(view)).OfType(dtypes).OnDeviceOf(views_.front());
  }

  const char* operation_;
  Place place_;
  std::deque<TensorView> views_;
};

}  // namespace diffmic

#endif  // DIFFMIC_BINDINGS_ARRAYS_H_
