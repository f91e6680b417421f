// Precisions and kernels of `denoise` by their names, or the error that lists the names there are.
#ifndef DIFFMIC_BINDINGS_DENOISE_NAMES_H_
#define DIFFMIC_BINDINGS_DENOISE_NAMES_H_

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/common/cpu_capabilities.h"
#include "cpu/denoise/denoise.h"
#include "include/precision.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace diffmic {

inline Precision ReadPrecision(const char* operation, const std::string& name, Place place) {
  std::string names;
  for (const PrecisionName& known : kPrecisions) {
    if (!(place == Place::kHost ? known.on_cpu : known.on_cuda)) continue;
    if (name == known.name) return known.precision;
    names += (names.empty() ? "" : ", ") + std::string(known.name);
  }
  throw pybind11::value_error(
      Text(operation, ": precision must be one of ", names, ", got ", name));
}

inline const cpu::DenoiseKernels* FindKernels(const std::string& name, Precision precision) {
  const cpu::DenoiseKernels* kernels = cpu::FindDenoiseKernels(name, precision);
  if (kernels != nullptr) return kernels;
  if (name == "amx") {
    throw pybind11::value_error(
        Text("denoise: instructions=\"amx\" cannot be served: ", cpu::WhyNoAmx()));
  }
  std::string names = "auto";
  for (const std::string& known : cpu::DenoiseKernelNames()) names += ", " + known;
  throw pybind11::value_error(Text("denoise: instructions must be one of what this processor has (",
                                   names, "), got ", name));
}

}  // namespace diffmic

#endif  // DIFFMIC_BINDINGS_DENOISE_NAMES_H_
