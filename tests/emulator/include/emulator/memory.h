// The memory that kernels may touch: whatever the views of a call name
// (csrc/bindings/tensor_view.cpp).
#ifndef DIFFMIC_EMULATOR_MEMORY_H_
#define DIFFMIC_EMULATOR_MEMORY_H_

#include <memory>

namespace diffmic::emulator {

// The bytes [first, past_last) are a kernel's as long as `owner` lives. What is named "workspace"
// holds nothing before it is written: reading it then is a fault.
void Register(const std::shared_ptr<void>& owner, const char* name, const void* first,
              const void* past_last, bool writable);

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_MEMORY_H_
