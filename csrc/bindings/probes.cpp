// Bindings of the benchmarks' probes: what bounds `denoise` on this processor, and its softplus.
#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/denoise_names.h"
#include "cpu/common/parallel.h"
#include "cpu/denoise/denoise_probes.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace py = pybind11;

namespace diffmic {
namespace {

void Softplus(py::handle in, py::handle out, const std::string& instructions) {
  const auto x = TensorView::Input(in, "softplus", "x");
  const auto y = TensorView::Output(out, "softplus", "out");
  x.OfType({DType::kFloat32}).OfRank(1, "[n]");
  y.OfType({DType::kFloat32}).OfShape({x.size(0)});
  if (x.size(0) > 1 && x.stride(0) != 1) throw py::value_error("softplus: x must be compact");
  FindKernels(instructions, Precision::kFloat32)
      ->softplus(x.data_as<float>(), x.size(0), y.mutable_data_as<float>());
}

// The way of reading that read_probe uses, an index of kReaders: which one is fastest differs
// between processors, and with the number of threads.
std::atomic<int> chosen_reader{static_cast<int>(std::size(cpu::kReaders)) - 2};

float Read(const TensorView& x, int threads, const cpu::DenoiseKernels* kernels, int reader) {
  std::vector<float> sums(static_cast<std::size_t>(threads));
  cpu::ParallelFor(threads, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      const std::int64_t first = x.numel() / threads * part;
      const std::int64_t last = part + 1 == threads ? x.numel() : first + x.numel() / threads;
      sums[static_cast<std::size_t>(part)] =
          kernels->read(x.data_as<float>() + first, last - first, reader);
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0f);
}

TensorView ReadProbeInput(py::handle array, const char* operation) {
  auto x = TensorView::Input(array, operation, "x");
  x.OfType({DType::kFloat32});
  if (!x.is_compact()) throw py::value_error(Text(operation, ": x must be compact"));
  return x;
}

float ReadProbe(py::handle array, int threads, const std::string& instructions) {
  const TensorView x = ReadProbeInput(array, "read_probe");
  CheckThreads("read_probe", threads);
  const cpu::DenoiseKernels* kernels = FindKernels(instructions, Precision::kFloat32);
  const py::gil_scoped_release release;
  return Read(x, threads, kernels, chosen_reader);
}

std::string CalibrateReadProbe(py::handle array, int threads, const std::string& instructions) {
  using Clock = std::chrono::steady_clock;
  constexpr int kTrials = 5;
  const TensorView x = ReadProbeInput(array, "calibrate_read_probe");
  CheckThreads("calibrate_read_probe", threads);
  const cpu::DenoiseKernels* kernels = FindKernels(instructions, Precision::kFloat32);
  int fastest = 0;
  {
    const py::gil_scoped_release release;
    auto least = Clock::duration::max();
    for (int trial = 0; trial < kTrials; ++trial) {
      for (int reader = 0; reader < static_cast<int>(std::size(cpu::kReaders)); ++reader) {
        const auto begin = Clock::now();
        Read(x, threads, kernels, reader);
        const auto took = Clock::now() - begin;
        if (took < least) {
          least = took;
          fastest = reader;
        }
      }
    }
    chosen_reader = fastest;
  }
  const cpu::Reader& reader = cpu::kReaders[fastest];
  return Text(reader.streams, " streams, ", reader.ahead, " bytes ahead");
}

float MultiplyAddProbe(std::int64_t count, int threads, const std::string& instructions,
                       const std::string& precision) {
  CheckThreads("multiply_add_probe", threads);
  const Precision of = ReadPrecision("multiply_add_probe", precision, Place::kHost);
  const cpu::DenoiseKernels* kernels = FindKernels(instructions, of);
  const py::gil_scoped_release release;
  std::vector<float> sums(static_cast<std::size_t>(threads));
  cpu::ParallelFor(threads, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      sums[static_cast<std::size_t>(part)] = kernels->multiply_add(count / threads);
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0f);
}

}  // namespace

void BindProbes(py::module_& m) {
  using py::arg;
  m.def("softplus", &Softplus, arg("x"), arg("out"), arg("instructions") = "auto",
        "softplus of x [n], as the kernels of `denoise` compute it; for tests.");
  m.def("read_probe", &ReadProbe, arg("x"), arg("threads") = 1, arg("instructions") = "auto",
        "Read an array and return its sum; what bounds `denoise` over few rows, for benchmarks.");
  m.def(
      "calibrate_read_probe", &CalibrateReadProbe, arg("x"), arg("threads") = 1,
      arg("instructions") = "auto",
      "Time every implementation of `read_probe` on an array larger than the caches; from then on "
      "the process uses the fastest. Return its description.");
  m.def("multiply_add_probe", &MultiplyAddProbe, arg("count"), arg("threads") = 1,
        arg("instructions") = "auto", arg("precision") = "fp32",
        "Do `count` multiply-adds of random operands by the fastest instructions of a precision; "
        "what bounds `denoise` over many rows.");
}

}  // namespace diffmic
