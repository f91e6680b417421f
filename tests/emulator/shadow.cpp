// Checks every access of a kernel against shadow memory: the last writes and reads of every byte,
// and whether it is initialised. -fsanitize=thread calls OnAccess (hooks.cpp) at every load and
// store.
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <bit>
#include <map>
#include <unordered_map>

#include "buffers.h"
#include "cells.h"
#include "launch_state.h"

extern thread_local unsigned char dynamic_shared[];

namespace diffmic::emulator {
namespace {

constexpr std::size_t kMostShared = 232448;

struct Range {
  std::uintptr_t first = 0, past_last = 0;
  bool Holds(std::uintptr_t address, std::size_t size) const {
    return address >= first && address + size <= past_last;
  }
};

Shadow global_shadow;
std::unordered_map<const Block*, Shadow> shared_shadows;
Shadow* shared_shadow = nullptr;
std::vector<Range> image;  // the loaded segments of the module
Range host_stack;
SharedMemory shared_memory;  // not thread-local: it would be part of the memory that it describes

SharedMemory FindShared() {
  dynamic_shared[0] = 0;  // allocates this thread's storage
  SharedMemory found{nullptr, nullptr, dynamic_shared, dynamic_shared + kMostShared};
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* out) {
        auto* memory = static_cast<SharedMemory*>(out);
        auto* tls = static_cast<unsigned char*>(info->dlpi_tls_data);
        bool here = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_TLS || tls == nullptr) continue;
          here = memory->dynamic >= tls && memory->dynamic < tls + header.p_memsz;
          if (here) memory->begin = tls;
          if (here) memory->end = tls + header.p_memsz;
        }
        if (!here) return 0;
        image.clear();
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_LOAD) continue;
          const std::uintptr_t first = info->dlpi_addr + header.p_vaddr;
          image.push_back({first, first + header.p_memsz});
        }
        return 1;
      },
      &found);
  if (found.begin == nullptr) throw Fault("the emulator's shared memory was not found");
  return found;
}

// Cached per thread: for the main thread the C library reads a file.
Range FindHostStack() {
  static std::map<pthread_t, Range> known;
  const auto [found, is_new] = known.try_emplace(pthread_self());
  if (is_new) {
    pthread_attr_t attributes;
    void* low = nullptr;
    std::size_t size = 0;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &low, &size);
    pthread_attr_destroy(&attributes);
    const auto first = reinterpret_cast<std::uintptr_t>(low);
    found->second = {first, first + size};
  }
  return found->second;
}

[[noreturn]] void Impossible(const char* kind, const void* place, const std::string& rest) {
  Report(kind, place, rest);
  AbortThread();
}

bool InShared(std::uintptr_t address) {
  const SharedMemory& memory = Shared();
  return address >= reinterpret_cast<std::uintptr_t>(memory.begin) &&
         address < reinterpret_cast<std::uintptr_t>(memory.end);
}

// Checks and records an access to shared or global memory; returns false if it is to neither.
bool Enter(std::uintptr_t address, std::size_t size, bool write, bool atomic, const void* place) {
  const bool shared = InShared(address);
  if (size <= 16 && std::has_single_bit(size) && address % size != 0) {
    Impossible("a misaligned access", place,
               " of " + std::to_string(size) + " bytes" + (shared ? "" : Near(address)));
  }
  if (shared) {
    const auto dynamic = reinterpret_cast<std::uintptr_t>(Shared().dynamic);
    const auto end = reinterpret_cast<std::uintptr_t>(Shared().dynamic_end);
    if (address >= dynamic && address < end && address + size > dynamic + launch->shared) {
      Impossible(
          "out of bounds of dynamic shared memory", place,
          ", byte " + std::to_string(address - dynamic) + " of " + std::to_string(launch->shared));
    }
    EachCell(address, size, [&](std::uintptr_t at, std::uint8_t mask) {
      Cell& cell = shared_shadow->At(at);
      if (!write && (cell.written & mask) != mask) {
        Report("a read of uninitialized shared memory", place, "");
      }
      Touch(cell, mask, write, atomic, true, place);
    });
    return true;
  }
  Buffer* buffer = BufferOf(address, size, place, write);
  if (buffer == nullptr) return false;
  if (write && !buffer->writable) Impossible("a write to an input", place, Near(address));
  if (!buffer->written.empty()) {
    for (std::size_t i = address - buffer->first; i < address - buffer->first + size; ++i) {
      if (write) {
        buffer->written[i] = true;
      } else if (!buffer->written[i]) {
        Report("a read of uninitialized global memory", place, Near(address));
        break;
      }
    }
  }
  EachCell(address, size, [&](std::uintptr_t at, std::uint8_t mask) {
    Touch(global_shadow.At(at), mask, write, atomic, false, place);
  });
  return true;
}

}  // namespace

const SharedMemory& Shared() { return shared_memory; }

void BeginShadow() {
  ForgetBuffers();
  shared_memory = FindShared();
  host_stack = FindHostStack();
  global_shadow.Clear();
}

void EndShadow() {
  global_shadow.Clear();
  shared_shadows.clear();
  shared_shadow = nullptr;
}

void ResetSharedShadow(Block& block) { shared_shadows[&block].Clear(); }
void SwapSharedShadow(Block* /*from*/, Block* to) { shared_shadow = &shared_shadows[to]; }

void OnAccess(void* pointer, std::size_t size, bool write, const void* place) {
  if (!in_kernel) return;
  const OwnAccount own;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (address - reinterpret_cast<std::uintptr_t>(running->stack) < kStack) return;
  if (config.mode != Mode::kPlain && !Enter(address, size, write, false, place)) {
    const auto holds = [&](const Range& range) { return range.Holds(address, size); };
    if (!write && (holds(host_stack) || std::any_of(image.begin(), image.end(), holds))) return;
    Impossible(write ? "a write out of bounds" : "a read out of bounds", place, Near(address));
  }
  if (config.mode == Mode::kCounted) {
    CountAccess(pointer, size, write, InShared(address), false, place);
    if (!InShared(address)) CountRound(pointer, write);
  }
  if (config.preempt > 0 && --launch->until_preempt <= 0) {
    // Uniform in [1, 2 preempt - 1], whose mean is preempt.
    launch->until_preempt =
        1 + static_cast<int>(Draw(2 * static_cast<unsigned>(config.preempt) - 1));
    launch->idle_spins = 0;
    Yield();
  }
}

void OnIndex(long index, const char* array, const void* place) {
  if (!in_kernel) return;
  const OwnAccount own;
  Impossible("an index out of bounds", place,
             ", " + std::to_string(index) + " in " + std::string(array));
}

void OnMisaligned(void* address, const char* type, const void* place) {
  if (!in_kernel) return;
  const OwnAccount own;
  Impossible("a misaligned access", place,
             " to " + std::string(type) + Near(reinterpret_cast<std::uintptr_t>(address)));
}

void OnAtomic(void* pointer, std::size_t size, const void* place) {
  const OwnAccount own;
  if (running == nullptr || config.mode == Mode::kPlain) return;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (!Enter(address, size, true, true, place)) {
    Impossible("an atomic operation out of bounds", place, Near(address));
  }
}

// Not an access: what is prefetched may be written meanwhile.
void OnPrefetch(const void* pointer, const void* place) {
  if (config.mode == Mode::kPlain) return;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (InShared(address) || BufferOf(address, 1, place, false) == nullptr) {
    Impossible("a prefetch out of bounds", place, Near(address));
  }
}

// A copy may read and write at any time until it is waited for. From now on it writes.
void OnCopyIssued(const Copy& copy, const void* place) {
  if (config.mode == Mode::kPlain) return;
  const auto to = reinterpret_cast<std::uintptr_t>(copy.to);
  const auto from = reinterpret_cast<std::uintptr_t>(copy.from);
  if (!InShared(to) || !Enter(to, copy.size, true, false, place)) {
    Impossible("an asynchronous copy to an address outside shared memory", place, "");
  }
  if (!Enter(from, copy.size, false, false, place)) {
    Impossible("an asynchronous copy reads out of bounds", place, Near(from));
  }
  EachCell(to, copy.size, [&](std::uintptr_t at, std::uint8_t mask) {
    Cell& cell = shared_shadow->At(at);
    for (Cell::Pair& pair : cell.pairs) pair.write = {};
    cell.pairs[0].write = MakeEntry(place, mask, false, true);
  });
  if (config.mode == Mode::kCounted) {
    CountAccess(copy.from, copy.size, false, false, true, place);
    CountAccess(copy.to, copy.size, true, true, true, place);
  }
}

void OnCopyDelivered(const Copy& copy) {
  if (config.mode == Mode::kPlain) return;
  const auto to = reinterpret_cast<std::uintptr_t>(copy.to);
  const auto from = reinterpret_cast<std::uintptr_t>(copy.from);
  const void* place = shared_shadow->At(to).pairs[0].write.Place();
  EachCell(to, copy.size, [&](std::uintptr_t at, std::uint8_t mask) {
    shared_shadow->At(at).pairs[0].write = MakeEntry(place, mask, false, false);
  });
  Enter(from, copy.size, false, false, place);
}

}  // namespace diffmic::emulator
