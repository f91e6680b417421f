// The buffers in global memory that kernels may access.
#ifndef DIFFMIC_EMULATOR_BUFFERS_H_
#define DIFFMIC_EMULATOR_BUFFERS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace diffmic::emulator {

struct Buffer {
  std::weak_ptr<void> owner;
  std::string name;
  std::uintptr_t first, past_last;
  bool writable;
  std::vector<bool> written;  // per byte; workspaces only
};

// The buffer that contains the range, preferably a writable one if `write`; NULL if there is none.
// `place` is the calling instruction, for a cache.
Buffer* BufferOf(std::uintptr_t address, std::size_t size, const void* place, bool write);
std::string Near(std::uintptr_t address);                 // describes the nearest buffer
void MarkWritten(const void* address, std::size_t size);  // by the host
void ForgetBuffers();                                     // of destroyed owners

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_BUFFERS_H_
