// The module _selftest: the cases by name, and the instructions of instructions.cu.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "cases.h"
#include "include/tensor_view.h"
#include "include/text.h"
#include "instructions.h"

namespace py = pybind11;

namespace diffmic::selftest {
namespace {

const std::vector<Case>& AllCases() {
  static const std::vector<Case> all = [] {
    std::vector<Case> found;
    for (auto part : {&Barriers, &Bounds, &Copies, &Grids, &Latency, &Warps}) {
      for (const Case& each : part()) found.push_back(each);
    }
    return found;
  }();
  return all;
}

py::list Cases() {
  py::list names;
  for (const Case& each : AllCases()) names.append(py::make_tuple(each.kernel, each.fault));
  return names;
}

void RunCase(const std::string& kernel, const std::string& fault, py::handle in_array,
             py::handle out_array, py::handle workspace_array) {
  const auto in = TensorView::Input(in_array, "selftest", "in", Place::kDevice);
  const auto out = TensorView::Output(out_array, "selftest", "out", Place::kDevice);
  const auto workspace =
      TensorView::Output(workspace_array, "selftest", "workspace", Place::kDevice);
  in.OfType({DType::kFloat32});
  out.OfType({DType::kFloat32});
  workspace.OfType({DType::kInt32});
  for (const Case& each : AllCases()) {
    if (each.kernel != kernel || each.fault != fault) continue;
    auto* words = workspace.mutable_data_as<std::uint32_t>();
    cudaMemsetAsync(words, 0, 16 * sizeof(std::uint32_t), nullptr);
    cuda::Launch("selftest", each.function, each.shape, in.data_as<float>(),
                 out.mutable_data_as<float>(), words, static_cast<int>(in.numel()));
    return;
  }
  throw py::value_error(Text("selftest: no case ", kernel, ", ", fault));
}

void RunInstruction(const std::string& name, py::handle in_array, py::handle out_array) {
  const auto in = TensorView::Input(in_array, "selftest", "in", Place::kDevice);
  const auto out = TensorView::Output(out_array, "selftest", "out", Place::kDevice);
  in.OfType({DType::kInt32});
  out.OfType({DType::kInt32});
  for (const Instruction& each : Instructions()) {
    if (each.name != name) continue;
    cuda::Launch("selftest", each.function, each.shape, in.data_as<std::uint32_t>(),
                 out.mutable_data_as<std::uint32_t>(), static_cast<int>(in.numel()));
    return;
  }
  throw py::value_error(Text("selftest: no instruction ", name));
}

}  // namespace
}  // namespace diffmic::selftest

void BindSelftest(py::module_& m) {
  using namespace diffmic::selftest;
  using py::arg;
  m.def("cases", &Cases, "(kernel, fault) of every case; the fault of a correct one is empty.");
  m.def("run", &RunCase, arg("kernel"), arg("fault"), arg("in"), arg("out"), arg("workspace"));
  m.def("instruction", &RunInstruction, arg("name"), arg("in"), arg("out"),
        "Apply one instruction to int32 words.");
}
