#include "cuda/common/device_query.h"

#include <cuda_runtime_api.h>

#include <sstream>

#include "build_config.h"
#include "cuda/common/error.h"
#include "include/text.h"

namespace diffmic::cuda {

bool Serves(const std::string& architectures, int major, int minor) {
  std::istringstream words(architectures);
  for (std::string word; words >> word;) {
    std::size_t digits = 0;
    const int number = std::stoi(word, &digits);
    const int capability = major * 10 + minor;
    const std::string suffix = word.substr(digits, word.find('+') - digits);
    const bool ptx = word.find('+') != std::string::npos;
    const bool same_major = number / 10 == major;
    if (suffix == "a" ? number == capability : same_major && number <= capability) return true;
    if (ptx && suffix.empty() && number <= capability) return true;
  }
  return false;
}

State Query() {
  State state{};
  Check(cudaRuntimeGetVersion(&state.runtime_version), "info", "cudaRuntimeGetVersion");
  Check(cudaDriverGetVersion(&state.driver_version), "info", "cudaDriverGetVersion");
  if (state.driver_version == 0) {
    state.reason = "no NVIDIA driver is installed";
    return state;
  }
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    state.reason = Text("the NVIDIA driver supports CUDA ", state.driver_version / 1000, ".",
                        state.driver_version % 1000 / 10, ", this build needs ",
                        state.runtime_version / 1000, ".", state.runtime_version % 1000 / 10);
    return state;
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
    cudaGetLastError();
    state.reason = "the NVIDIA driver reports no GPU (CUDA_VISIBLE_DEVICES may hide it)";
    return state;
  }
  Check(status, "info", "cudaGetDeviceCount");
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    Check(cudaGetDeviceProperties(&properties, index), "info", "cudaGetDeviceProperties");
    state.devices.push_back(
        {index, properties.name, properties.major, properties.minor, properties.multiProcessorCount,
         static_cast<std::int64_t>(properties.totalGlobalMem),
         Serves(DIFFMIC_CUDA_ARCHITECTURES, properties.major, properties.minor)});
  }
  return state;
}

}  // namespace diffmic::cuda
