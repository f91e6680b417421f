// Arrays of a noising (noising.h), from the host or a GPU.
#ifndef DIFFMIC_BINDINGS_NOISING_ARRAYS_H_
#define DIFFMIC_BINDINGS_NOISING_ARRAYS_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "include/noising.h"
#include "include/philox.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace diffmic {

// A call's noising, its arrays checked and kept alive. `labels` is the call's [S, B, C] or [B, C]
// that the noisy labels are written to.
class NoisingArrays {
 public:
  // `arrays`: None, for labels that have their noise, or y_0, sqrt_alpha_bar,
  // sqrt_one_minus_alpha_bar, noise or None, seed, image_ids or None, sample_ids or None, and where
  // there is no noise the memory for it, else None.
  // What is written must be apart from all that is read, from x and guidance too.
  NoisingArrays(const char* operation, pybind11::handle arrays, pybind11::handle labels,
                pybind11::handle x, pybind11::handle guidance, Place place) {
    namespace py = pybind11;
    if (arrays.is_none()) return;
    const auto parts = py::reinterpret_borrow<py::sequence>(arrays);
    if (py::len(parts) != 8) {
      throw py::value_error(
          Text(operation, ": noising must be None or of eight parts, got ", py::len(parts)));
    }
    const auto keep = [&](TensorView view, DType type) -> const TensorView& {
      views_.push_back(std::move(view));
      return views_.back().OfType({type}).OnDeviceOf(views_.front());
    };
    const auto input = [&](std::size_t i, const char* name, DType type) {
      return keep(TensorView::Input(py::object(parts[i]), operation, name, place), type);
    };
    const TensorView y = keep(TensorView::Output(labels, operation, "y_t", place), DType::kFloat32);
    keep(TensorView::Input(x, operation, "x", place), DType::kFloat32);
    keep(TensorView::Input(guidance, operation, "guidance", place), DType::kFloat32);
    if (y.rank() < 2) throw py::value_error(Text(operation, ": y_t must be [B, C] or [S, B, C]"));
    const std::int64_t rows = y.size(y.rank() - 2), classes = y.size(y.rank() - 1);
    const auto compact = [&](std::size_t i, const char* name, DType type) {
      const TensorView view = input(i, name, type);
      if (!view.is_compact()) {
        throw py::value_error(Text(operation, ": ", name, " must be compact"));
      }
      return view;
    };
    const auto keys = [&](std::size_t i, const char* name) -> const std::int64_t* {
      if (py::object(parts[i]).is_none()) return nullptr;
      return compact(i, name, DType::kInt64).OfShape({rows}).template data_as<std::int64_t>();
    };
    if (classes > philox::kMaxClasses) {
      throw py::value_error(Text(operation, ": classes must be in [1, ", philox::kMaxClasses,
                                 "] for noise, got ", classes));
    }
    const TensorView y_0 = input(0, "y_0", DType::kFloat32);
    y_0.OfShape({rows, classes});
    const TensorView label_weights = compact(1, "sqrt_alpha_bar", DType::kFloat32);
    label_weights.OfRank(1, "[T]");
    const TensorView noise_weights = compact(2, "sqrt_one_minus_alpha_bar", DType::kFloat32);
    noise_weights.OfShape({label_weights.size(0)});
    noising_.y_0 = y_0.data_as<float>();
    noising_.y_0_stride[0] = y_0.stride(0);
    noising_.y_0_stride[1] = y_0.stride(1);
    noising_.timesteps = label_weights.size(0);
    noising_.sqrt_alpha_bar = label_weights.data_as<float>();
    noising_.sqrt_one_minus_alpha_bar = noise_weights.data_as<float>();
    noising_.seed = parts[4].cast<std::uint64_t>();
    noising_.images = keys(5, "image_ids");
    noising_.samples = keys(6, "sample_ids");
    const bool given = !py::object(parts[3]).is_none();
    if (given == !py::object(parts[7]).is_none()) {
      throw py::value_error(Text(operation, ": noise is read or written, and the other is None"));
    }
    if (given) {
      noising_.given =
          compact(3, "noise", DType::kFloat32).OfShape({rows, classes}).data_as<float>();
    } else {
      const TensorView drawn =
          keep(TensorView::Output(py::object(parts[7]), operation, "drawn noise", place),
               DType::kFloat32);
      drawn.OfShape({rows, classes});
      for (std::size_t i = 0; i + 1 < views_.size(); ++i) drawn.ApartFrom(views_[i]);
      noising_.drawn = drawn.mutable_data_as<float>();
    }
    noising_.y = y.mutable_data_as<float>();
    for (std::size_t i = 1; i < views_.size(); ++i) y.ApartFrom(views_[i]);
  }

  const Noising& noising() const { return noising_; }

 private:
  std::vector<TensorView> views_;
  Noising noising_{};
};

}  // namespace diffmic

#endif  // DIFFMIC_BINDINGS_NOISING_ARRAYS_H_
