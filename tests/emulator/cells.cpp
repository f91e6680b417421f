#include "cells.h"

namespace diffmic::emulator {
namespace {

std::string OtherInWords(const Entry& entry) {
  const unsigned number = entry.who >> 10;
  const Dim grid = launch->grid;
  return std::string(", with ") + "block (" + std::to_string(number % grid.x) + ", " +
         std::to_string(number / grid.x % grid.y) + ", " +
         std::to_string(number / grid.x / grid.y) + ") thread " + std::to_string(entry.who & 1023) +
         " at " + PlaceOf(entry.Place());
}

// Reports a fault if an entry is not ordered before the running thread.
void CheckAgainst(const Cell& cell, Entry Cell::Pair::* which, std::uint8_t mask, bool atomic,
                  bool shared, const char* kind, const void* place) {
  for (const Cell::Pair& pair : cell.pairs) {
    const Entry& entry = pair.*which;
    if ((entry.mask & mask) == 0 || (atomic && entry.atomic)) continue;
    const char* what = kind;
    if (entry.pending) {
      what = "an access to memory with an asynchronous copy in flight";
    } else if (HappenedBefore(entry.who >> 10, entry.who & 1023, entry.clock)) {
      continue;
    }
    if (!IsNews(what, place)) continue;
    Report(what, place,
           std::string(" on ") + (shared ? "shared" : "global") + " memory" + OtherInWords(entry));
  }
}

// 0: different blocks, 1: the same block, 2: the same warp.
int Closeness(const Entry& a, const Entry& b) {
  const std::uint32_t difference = a.who ^ b.who;
  return difference >> 10 != 0 ? 0 : difference >> 5 != 0 ? 1 : 2;
}

// Records an access. If there is no free entry, the one closest to it is replaced: a later access
// that races with the replaced entry races with a remaining one too, since a thread is ordered with
// whole warps and blocks.
void Put(Cell& cell, Entry Cell::Pair::* which, const Entry& entry) {
  Entry* closest = nullptr;
  int most = -1;
  for (Cell::Pair& pair : cell.pairs) {
    Entry& old = pair.*which;
    const bool same = old.who == entry.who && old.atomic == entry.atomic && !old.pending;
    if (same && old.clock == entry.clock && old.mask != 0) {
      old.mask |= entry.mask;
      old.place = entry.place;
      return;
    }
    if (old.mask == 0) {
      // A later entry may also be of this thread, if a write has cleared part of the cell.
      closest = &old;
      break;
    }
    if (most < 3) {
      const bool covered = (old.mask & ~entry.mask) == 0;
      const bool known =
          covered && (same || HappenedBefore(old.who >> 10, old.who & 1023, old.clock));
      const int closeness = known ? 3 : Closeness(old, entry);
      if (closeness > most || (closeness == most && (Random()() & 1) != 0)) {
        closest = &old;
        most = closeness;
      }
    }
  }
  *closest = entry;
}

}  // namespace

const char kAnchor = 0;

Entry MakeEntry(const void* place, std::uint8_t mask, bool atomic, bool pending) {
  const auto away = static_cast<const char*>(place) - &kAnchor;
  return {static_cast<std::int32_t>(away),
          running->block->number << 10 | running->id,
          running->clock,
          mask,
          atomic,
          pending};
}

void Touch(Cell& cell, std::uint8_t mask, bool write, bool atomic, bool shared, const void* place) {
  if ((cell.writers & mask) != 0) {
    CheckAgainst(cell, &Cell::Pair::write, mask, atomic, shared,
                 write ? "two writes race" : "a read races a write", place);
  }
  const Entry entry = MakeEntry(place, mask, atomic, false);
  if (!write) {
    cell.readers |= mask;
    Put(cell, &Cell::Pair::read, entry);
    return;
  }
  if ((cell.readers & mask) != 0) {
    CheckAgainst(cell, &Cell::Pair::read, mask, atomic, shared, "a write races a read", place);
  }
  if (((cell.readers | cell.writers) & mask) != 0) {
    for (Cell::Pair& pair : cell.pairs) {
      pair.write.mask &= static_cast<std::uint8_t>(~mask);
      pair.read.mask &= static_cast<std::uint8_t>(~mask);
    }
  }
  cell.readers &= static_cast<std::uint8_t>(~mask);
  cell.writers |= mask;
  cell.written |= mask;
  Put(cell, &Cell::Pair::write, entry);
}

}  // namespace diffmic::emulator
