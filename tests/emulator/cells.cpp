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

// A fault where nothing orders the entry before the running thread.
void CheckAgainst(const Entry& entry, std::uint8_t mask, bool atomic, bool shared, const char* kind,
                  const void* place) {
  if ((entry.mask & mask) == 0 || (atomic && entry.atomic)) return;
  if (entry.pending) kind = "memory is touched while an asynchronous copy writes it";
  if (!entry.pending && HappenedBefore(entry.who >> 10, entry.who & 1023, entry.clock)) return;
  if (!IsNews(kind, place)) return;
  Report(kind, place,
         std::string(" on ") + (shared ? "shared" : "global") + " memory" + OtherInWords(entry));
}

// 0: of other blocks, 1: of one block, 2: of one warp.
int Closeness(const Entry& a, const Entry& b) {
  const std::uint32_t difference = a.who ^ b.who;
  return difference >> 10 != 0 ? 0 : difference >> 5 != 0 ? 1 : 2;
}

// Enters an access. Where there is no room the entry that is closest to it has to go: whoever comes
// unordered later is so to what remains as well, since it may be ordered to a warp or a block, but
// not to several.
void Put(Entry (&entries)[4], const Entry& entry) {
  Entry* closest = nullptr;
  int most = -1;
  for (Entry& old : entries) {
    const bool same = old.who == entry.who && old.atomic == entry.atomic && !old.pending;
    if (same && old.clock == entry.clock && old.mask != 0) {
      old.mask |= entry.mask;
      old.place = entry.place;
      return;
    }
    if (old.mask == 0) {
      if (most < 4) closest = &old;
      most = 4;
    } else if (most < 3) {
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
  for (const Entry& entry : cell.writes) {
    CheckAgainst(entry, mask, atomic, shared, write ? "two writes race" : "a read races a write",
                 place);
  }
  const Entry entry = MakeEntry(place, mask, atomic, false);
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

}  // namespace diffmic::emulator
