// The CUDA devices of this machine, for `info` and backend dispatch. Needs neither a driver nor a
// GPU: the runtime is linked statically and looks for the driver at the first call.
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
  bool served;  // this build has machine code for it, or PTX that its driver can compile
};

struct State {
  int runtime_version;  // 13000 is 13.0
  int driver_version;   // the newest CUDA version that the driver supports; 0 without a driver
  std::string reason;   // why `devices` is empty; "" if it is not
  std::vector<Device> devices;
};

// Creates no context, so it uses no GPU memory. Throws Error if the driver fails for a reason other
// than a missing GPU or a driver that is too old.
State Query();

// Whether code for `architectures` ("80 90a 120+PTX": sm_80, sm_90a, sm_120 and its PTX) runs on a
// device of this compute capability. Machine code runs on equal or higher minor versions of its
// major version, code for an "a" architecture on that version only, PTX on all later versions.
bool Serves(const std::string& architectures, int major, int minor);

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_DEVICE_QUERY_H_
