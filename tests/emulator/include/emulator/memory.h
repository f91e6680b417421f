// The memory that kernels may access: the tensors of a call (csrc/bindings/tensor_view.cpp).
#ifndef DIFFMIC_EMULATOR_MEMORY_H_
#define DIFFMIC_EMULATOR_MEMORY_H_

#include <memory>

namespace diffmic::emulator {

// Allows accesses to [first, past_last) for the lifetime of `owner`. A buffer named "workspace" is
// uninitialised: reading it before writing is a fault.
void Register(const std::shared_ptr<void>& owner, const char* name, const void* first,
              const void* past_last, bool writable);

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_MEMORY_H_
