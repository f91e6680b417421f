// Shadow memory of a launch: the last writes and reads of each cell of four bytes.
#ifndef DIFFMIC_EMULATOR_CELLS_H_
#define DIFFMIC_EMULATOR_CELLS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>

#include "launch_state.h"

namespace diffmic::emulator {

extern const char kAnchor;  // an address in the module; places are stored relative to it

struct Entry {
  std::int32_t place = 0;
  std::uint32_t who = 0;  // block << 10 | thread
  Clock clock = 0;
  std::uint8_t mask = 0;  // bytes of the cell
  bool atomic = false;
  bool pending = false;  // an asynchronous copy in flight

  const void* Place() const { return &kAnchor + place; }
};
// An access by the running thread at its present clock.
Entry MakeEntry(const void* place, std::uint8_t mask, bool atomic, bool pending);

// One pair of entries per byte, since each byte may be accessed by another thread.
struct Cell {
  struct Pair {
    Entry write, read;
  };
  std::uint8_t written = 0;               // initialised bytes
  std::uint8_t writers = 0, readers = 0;  // bytes that may have entries
  Pair pairs[4];
};

// Checks an access against earlier ones and records it.
void Touch(Cell& cell, std::uint8_t mask, bool write, bool atomic, bool shared, const void* place);

// Cells by address, created at the first access.
class Shadow {
 public:
  Cell& At(std::uintptr_t address) {
    const std::uintptr_t number = address / kPageBytes;
    Recent& recent = recent_[number % recent_.size()];
    if (recent.page == nullptr || recent.number != number) {
      auto& page = pages_[number];
      if (page == nullptr) page = std::make_unique<Page>();
      recent = {number, page.get()};
    }
    return (*recent.page)[address / 4 % kPageCells];
  }
  void Clear() {
    pages_.clear();
    recent_.fill({});
  }

 private:
  static constexpr std::size_t kPageBytes = 1024;
  static constexpr std::size_t kPageCells = kPageBytes / 4;
  using Page = std::array<Cell, kPageCells>;
  struct Recent {
    std::uintptr_t number = 0;
    Page* page = nullptr;
  };
  std::unordered_map<std::uintptr_t, std::unique_ptr<Page>> pages_;
  std::array<Recent, 256> recent_;
};

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

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_CELLS_H_
