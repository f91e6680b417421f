// The functions that -fsanitize=thread inserts at loads and stores of kernels. They replace the
// runtime of ThreadSanitizer, which is not linked.
#include "launch_state.h"

#define DIFFMIC_HOOKS(size)                                                         \
  extern "C" void __tsan_read##size(void* address) {                                \
    diffmic::emulator::OnAccess(address, size, false, __builtin_return_address(0)); \
  }                                                                                 \
  extern "C" void __tsan_write##size(void* address) {                               \
    diffmic::emulator::OnAccess(address, size, true, __builtin_return_address(0));  \
  }                                                                                 \
  extern "C" void __tsan_unaligned_read##size(void* address) {                      \
    diffmic::emulator::OnAccess(address, size, false, __builtin_return_address(0)); \
  }                                                                                 \
  extern "C" void __tsan_unaligned_write##size(void* address) {                     \
    diffmic::emulator::OnAccess(address, size, true, __builtin_return_address(0));  \
  }

DIFFMIC_HOOKS(1)
DIFFMIC_HOOKS(2)
DIFFMIC_HOOKS(4)
DIFFMIC_HOOKS(8)
DIFFMIC_HOOKS(16)

extern "C" void __tsan_read_range(void* address, unsigned long size) {
  diffmic::emulator::OnAccess(address, size, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, unsigned long size) {
  diffmic::emulator::OnAccess(address, size, true, __builtin_return_address(0));
}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_vptr_update(void**, void*) {}

// The leading fields of the records that -fsanitize=bounds and -fsanitize=alignment pass, as
// libubsan declares them.
namespace {
struct SourceLocation {
  const char* file;
  std::uint32_t line, column;
};
struct TypeDescriptor {
  std::uint16_t kind, info;
  char name[1];  // "'float [8]'"
};
}  // namespace

struct OutOfBoundsData {
  SourceLocation location;
  const TypeDescriptor* array;
  const TypeDescriptor* index;
};
extern "C" void __ubsan_handle_out_of_bounds(OutOfBoundsData* data, unsigned long index) {
  diffmic::emulator::OnIndex(static_cast<long>(index), data->array->name,
                             __builtin_return_address(0));
}

struct TypeMismatchData {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log_alignment, kind;
};
extern "C" void __ubsan_handle_type_mismatch_v1(TypeMismatchData* data, unsigned long pointer) {
  diffmic::emulator::OnMisaligned(reinterpret_cast<void*>(pointer), data->type->name,
                                  __builtin_return_address(0));
}

// The guard of a static variable in a launcher.
extern "C" unsigned char __tsan_atomic8_load(const volatile unsigned char* address, int order) {
  return __atomic_load_n(address, order);
}
