// What CUDA offers on this machine, for `info` and for the choice of a backend. Needs neither
// driver nor GPU to be linked or called: the runtime is part of the extension and looks for the
// driver when it is first asked.
#ifndef DIFFMIC_CUDA_COMMON_DEVICE_QUERY_H_
#define DIFFMIC_CUDA_COMMON_DEVICE_QUERY_H_

#include <cstdint>
#include <string>
#include <vector>

namespace diffmic::cuda {

struct Device {
  int index;
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  std::int64_t memory_bytes;
  bool served;  // this build holds machine code for it, or PTX that its driver can translate
};

struct State {
  int runtime_version;  // 13000 is 13.0
  int driver_version;   // the newest CUDA that the driver knows; 0 without a driver
  std::string reason;   // why `devices` is empty; "" when it is not
  std::vector<Device> devices;
};

// Never initialises a context, so it costs no GPU memory.
// Throws Error where the driver fails in a way that is not simply "there is no GPU".
State Query();

// Whether code for `architectures` ("80 90a 120+PTX": sm_80, sm_90a, sm_120 and PTX of 120) runs on
// a device of this compute capability. Machine code serves its own major version from its own minor
// version on, code of an "a" architecture that very version, PTX everything newer.
bool Serves(const std::string& architectures, int major, int minor);

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_DEVICE_QUERY_H_
