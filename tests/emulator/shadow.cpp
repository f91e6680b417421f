// What is known of every byte that a kernel touches: who wrote and read it last, and whether
// anything was written there at all. The compiler's -fsanitize=thread calls OnAccess (hooks.cpp) at
// every load and store of a kernel.
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <unordered_map>

#include "emulator/memory.h"
#include "launch_state.h"

extern thread_local unsigned char dynamic_shared[];

namespace diffmic::emulator {
namespace {

constexpr std::size_t kMostShared = 232448;

struct Entry {
  const void* place = nullptr;
  std::uint32_t who = 0;  // block << 10 | thread
  Clock clock = 0;
  std::uint8_t mask = 0;  // of the cell's four bytes
  bool atomic = false;
  bool pending = false;  // a copy that is under way
};

// Four bytes.
struct Cell {
  Entry writes[2], reads[2];
  std::uint8_t written = 0;
};

// Cells by address, made as they are touched.
class Shadow {
 public:
  Cell& At(std::uintptr_t address) {
    const std::uintptr_t page = address >> 10;
    if (page != last_number_ || last_ == nullptr) {
      auto& cells = pages_[page];
      if (cells == nullptr) cells = std::make_unique<std::array<Cell, 256>>();
      last_ = cells.get();
      last_number_ = page;
    }
    return (*last_)[address >> 2 & 255];
  }
  void Clear() {
    pages_.clear();
    last_ = nullptr;
  }

 private:
  std::unordered_map<std::uintptr_t, std::unique_ptr<std::array<Cell, 256>>> pages_;
  std::array<Cell, 256>* last_ = nullptr;
  std::uintptr_t last_number_ = 0;
};

struct Buffer {
  std::weak_ptr<void> owner;
  std::string name;
  std::uintptr_t first, past_last;
  bool writable;
  std::vector<bool> written;  // of scratch memory, a bit a byte
};

struct Range {
  std::uintptr_t first = 0, past_last = 0;
  bool Holds(std::uintptr_t address, std::size_t size) const {
    return address >= first && address + size <= past_last;
  }
};

std::vector<std::unique_ptr<Buffer>> buffers;
std::array<Buffer*, 256> recent;  // by place: a place tends to touch one buffer
Shadow global_shadow;
std::unordered_map<const Block*, Shadow> shared_shadows;
Shadow* shared_shadow = nullptr;
std::vector<Range> image;  // what the module itself consists of
Range host_stack;
SharedMemory shared_memory;  // not thread-local: it would lie in what it describes

SharedMemory FindShared() {
  dynamic_shared[0] = 0;  // makes the thread's part
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

Range FindHostStack() {
  pthread_attr_t attributes;
  void* low = nullptr;
  std::size_t size = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &low, &size);
  pthread_attr_destroy(&attributes);
  return {reinterpret_cast<std::uintptr_t>(low), reinterpret_cast<std::uintptr_t>(low) + size};
}

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

// The buffer that an address is nearest to, in words.
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

std::uint32_t Who() { return running->block->number << 10 | running->id; }

std::string OtherInWords(const Entry& entry) {
  const unsigned number = entry.who >> 10;
  const Dim grid = launch->grid;
  return std::string(", with ") + "block (" + std::to_string(number % grid.x) + ", " +
         std::to_string(number / grid.x % grid.y) + ", " +
         std::to_string(number / grid.x / grid.y) + ") thread " + std::to_string(entry.who & 1023) +
         " at " + PlaceOf(entry.place);
}

void CheckAgainst(const Entry& entry, std::uint8_t mask, bool atomic, bool shared, const char* kind,
                  const void* place) {
  if ((entry.mask & mask) == 0 || (atomic && entry.atomic)) return;
  if (entry.pending) {
    Report("memory is touched while an asynchronous copy writes it", place, OtherInWords(entry));
    return;
  }
  if (HappenedBefore(entry.who >> 10, entry.who & 1023, entry.clock)) return;
  Report(kind, place,
         std::string(" on ") + (shared ? "shared" : "global") + " memory" + OtherInWords(entry));
}

void Put(Entry (&entries)[2], const Entry& entry) {
  for (Entry& old : entries) {
    if (old.who == entry.who && old.clock == entry.clock && old.mask != 0 && !old.pending &&
        old.atomic == entry.atomic) {
      old.mask |= entry.mask;
      old.place = entry.place;
      return;
    }
  }
  for (Entry& old : entries) {
    if ((old.mask & ~entry.mask) == 0 &&
        (old.mask == 0 || old.who == entry.who ||
         HappenedBefore(old.who >> 10, old.who & 1023, old.clock))) {
      old = entry;
      return;
    }
  }
  entries[Random()() & 1] = entry;
}

void Touch(Cell& cell, std::uint8_t mask, bool write, bool atomic, bool shared, const void* place) {
  for (const Entry& entry : cell.writes) {
    CheckAgainst(entry, mask, atomic, shared, write ? "two writes race" : "a read races a write",
                 place);
  }
  const Entry entry{place, Who(), running->clock, mask, atomic, false};
  if (!write) {
    Put(cell.reads, entry);
    return;
  }
  for (Entry& read : cell.reads) {
    CheckAgainst(read, mask, atomic, shared, "a write races a read", place);
    read.mask &= static_cast<std::uint8_t>(~mask);
  }
  for (Entry& old : cell.writes) old.mask &= static_cast<std::uint8_t>(~mask);
  Put(cell.writes, entry);
  cell.written |= mask;
}

// Calls f(cell address, mask) for the cells of a range.
template <typename F>
void EachCell(std::uintptr_t address, std::size_t size, F f) {
  const std::uintptr_t end = address + size;
  for (std::uintptr_t cell = address & ~std::uintptr_t{3}; cell < end; cell += 4) {
    const unsigned low = address > cell ? static_cast<unsigned>(address - cell) : 0;
    const unsigned high = end < cell + 4 ? static_cast<unsigned>(end - cell) : 4;
    f(cell, static_cast<std::uint8_t>((1u << high) - (1u << low)));
  }
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

// Checks an access to shared or global memory and enters it; false where it is neither.
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
        Report("shared memory is read that nothing was written to", place, "");
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
        Report("global memory is read that nothing was written to", place, Near(address));
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

void Register(const std::shared_ptr<void>& owner, const char* name, const void* first,
              const void* past_last, bool writable) {
  std::erase_if(buffers, [](const auto& buffer) { return buffer->owner.expired(); });
  recent.fill(nullptr);
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

void BeginShadow() {
  std::erase_if(buffers, [](const auto& buffer) { return buffer->owner.expired(); });
  recent.fill(nullptr);
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
  }
  if (config.preempt > 0 && Random()() % static_cast<unsigned>(config.preempt) == 0) Yield();
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

// The copy reads and writes at some time until it is waited for: the writing begins now.
void OnCopyIssued(const Copy& copy, const void* place) {
  if (config.mode == Mode::kPlain) return;
  const auto to = reinterpret_cast<std::uintptr_t>(copy.to);
  const auto from = reinterpret_cast<std::uintptr_t>(copy.from);
  if (!InShared(to) || !Enter(to, copy.size, true, false, place)) {
    Impossible("an asynchronous copy to what is no shared memory", place, "");
  }
  if (!Enter(from, copy.size, false, false, place)) {
    Impossible("an asynchronous copy reads out of bounds", place, Near(from));
  }
  EachCell(to, copy.size, [&](std::uintptr_t at, std::uint8_t mask) {
    Cell& cell = shared_shadow->At(at);
    cell.writes[0] = {place, Who(), running->clock, mask, false, true};
    cell.writes[1] = {};
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
  const void* place = shared_shadow->At(to).writes[0].place;
  EachCell(to, copy.size, [&](std::uintptr_t at, std::uint8_t mask) {
    Entry& entry = shared_shadow->At(at).writes[0];
    entry = {place, Who(), running->clock, mask, false, false};
  });
  Enter(from, copy.size, false, false, place);
}

}  // namespace diffmic::emulator
