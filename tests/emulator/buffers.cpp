#include "buffers.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "emulator/memory.h"

namespace diffmic::emulator {
namespace {

std::vector<std::unique_ptr<Buffer>> buffers;
std::array<Buffer*, 256> recent;  // by instruction, which usually accesses one buffer

}  // namespace

Buffer* BufferOf(std::uintptr_t address, std::size_t size, const void* place, bool write) {
  Buffer*& last = recent[reinterpret_cast<std::uintptr_t>(place) >> 1 & 255];
  const auto fits = [&](const Buffer& buffer) {
    return address >= buffer.first && address + size <= buffer.past_last &&
           (!write || buffer.writable);
  };
  if (last != nullptr && fits(*last)) return last;
  Buffer* any = nullptr;
  for (const auto& buffer : buffers) {
    if (fits(*buffer)) return last = buffer.get();
    if (address >= buffer->first && address + size <= buffer->past_last) any = buffer.get();
  }
  return any;
}

std::string Near(std::uintptr_t address) {
  const Buffer* best = nullptr;
  std::uintptr_t least = ~std::uintptr_t{0};
  for (const auto& buffer : buffers) {
    const std::uintptr_t away = address < buffer->first       ? buffer->first - address
                                : address > buffer->past_last ? address - buffer->past_last
                                                              : 0;
    if (away < least) {
      least = away;
      best = buffer.get();
    }
  }
  if (best == nullptr) return "";
  const auto offset = static_cast<std::int64_t>(address - best->first);
  return ", byte " + std::to_string(offset) + " of " + best->name + ", which has " +
         std::to_string(best->past_last - best->first);
}

void Register(const std::shared_ptr<void>& owner, const char* name, const void* first,
              const void* past_last, bool writable) {
  ForgetBuffers();
  auto buffer = std::make_unique<Buffer>();
  buffer->owner = owner;
  buffer->name = name;
  buffer->first = reinterpret_cast<std::uintptr_t>(first);
  buffer->past_last = reinterpret_cast<std::uintptr_t>(past_last);
  buffer->writable = writable;
  if (writable && buffer->name == "workspace") {
    std::memset(reinterpret_cast<void*>(buffer->first), 0xFF, buffer->past_last - buffer->first);
    buffer->written.assign(buffer->past_last - buffer->first, false);
  }
  buffers.push_back(std::move(buffer));
}

void MarkWritten(const void* address, std::size_t size) {
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  for (const auto& buffer : buffers) {
    if (buffer->written.empty()) continue;
    for (std::size_t i = 0; i < size; ++i) {
      if (first + i >= buffer->first && first + i < buffer->past_last) {
        buffer->written[first + i - buffer->first] = true;
      }
    }
  }
}

void ForgetBuffers() {
  std::erase_if(buffers, [](const auto& buffer) { return buffer->owner.expired(); });
  recent.fill(nullptr);
}

}  // namespace diffmic::emulator
