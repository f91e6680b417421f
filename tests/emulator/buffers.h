// The buffers in global memory that kernels may touch.
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
  std::vector<bool> written;  // of scratch memory, a bit a byte
};

// The buffer that holds the range, one that may be written where there is a choice and `write`;
// NULL where none does.
Buffer* BufferOf(std::uintptr_t address, std::size_t size, const void* place, bool write);
std::string Near(std::uintptr_t address);  // the buffer that an address is nearest to, in words
void MarkWritten(const void* address, std::size_t size);  // by the host
void ForgetBuffers();                                     // those whose owners are gone

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_BUFFERS_H_
