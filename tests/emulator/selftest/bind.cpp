// The module _selftest: the small kernels, right and wrong.
#include <pybind11/pybind11.h>

#include <string>

#include "selftest/kernels.h"
#include "tensor_view.h"

namespace py = pybind11;
using diffmic::DType;
using diffmic::Place;
using diffmic::TensorView;

namespace {

void Run(const std::string& name, py::handle input_array, py::handle output_array,
         py::handle workspace_array, py::handle counter_array) {
  constexpr char kOperation[] = "selftest";
  const auto input = TensorView::Input(input_array, kOperation, "input", Place::kDevice);
  const auto output = TensorView::Output(output_array, kOperation, "output", Place::kDevice);
  const auto workspace =
      TensorView::Output(workspace_array, kOperation, "workspace", Place::kDevice);
  const auto counter = TensorView::Output(counter_array, kOperation, "counter", Place::kDevice);
  for (const TensorView* view : {&input, &output, &workspace}) {
    view->OfType({DType::kFloat32}).OfShape({1024});
  }
  counter.OfType({DType::kInt32}).OfShape({1});
  for (const auto& each : diffmic::selftest::Cases()) {
    if (each.name != name) continue;
    each.run({input.data_as<float>(), output.mutable_data_as<float>(),
              workspace.mutable_data_as<float>(), counter.mutable_data_as<std::uint32_t>()});
    return;
  }
  throw py::value_error("selftest: there is no " + name);
}

}  // namespace

void BindSelftest(py::module_& m) {
  m.def("run", &Run, py::arg("name"), py::arg("input"), py::arg("output"), py::arg("workspace"),
        py::arg("counter"));
  py::list right, wrong;
  for (const auto& each : diffmic::selftest::Cases())
    (each.right ? right : wrong).append(each.name);
  m.attr("right") = right;
  m.attr("wrong") = wrong;
}
