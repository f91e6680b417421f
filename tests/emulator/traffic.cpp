#include "traffic.h"

#include <algorithm>
#include <tuple>
#include <unordered_map>
#include <unordered_set>

#include "launch_state.h"

namespace diffmic::emulator {
namespace {

// An access of one lane. The n-th accesses of the lanes of a warp at the same place are one
// request.
struct Access {
  std::uint32_t warp, site, occurrence, lane;
  std::uintptr_t address;
  std::uint32_t size;
  bool write, shared, copy;
};

std::vector<Access> accesses;
std::unordered_map<const void*, std::uint32_t> sites;
std::unordered_set<std::uintptr_t> loaded, stored;
std::int64_t threads_matrix = 0, threads_shuffles = 0, threads_barriers = 0;

std::int64_t Sectors(const Access* begin, const Access* end) {
  std::vector<std::uintptr_t> sectors;
  for (const Access* access = begin; access != end; ++access) {
    for (auto at = access->address / 32; at <= (access->address + access->size - 1) / 32; ++at) {
      sectors.push_back(at);
      (access->write ? stored : loaded).insert(at);
    }
  }
  std::sort(sectors.begin(), sectors.end());
  return std::unique(sectors.begin(), sectors.end()) - sectors.begin();
}

// Shared memory has 32 banks of 4 bytes. A wavefront serves 128 bytes: 32 lanes of up to 4 bytes,
// 16 of 8 or 8 of 16. Lanes that access the same word share it.
void Wavefronts(const Access* begin, const Access* end, Traffic* traffic) {
  const std::uint32_t lanes = begin->size <= 4 ? 32 : begin->size <= 8 ? 16 : 8;
  for (const Access* first = begin; first != end;) {
    const Access* last = first;
    std::vector<std::uintptr_t> words;
    while (last != end && last->lane / lanes == first->lane / lanes) {
      for (auto at = last->address / 4; at <= (last->address + last->size - 1) / 4; ++at) {
        words.push_back(at);
      }
      ++last;
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    std::int64_t banks[32] = {};
    for (const std::uintptr_t word : words) ++banks[word % 32];
    traffic->shared_wavefronts += *std::max_element(banks, banks + 32);
    traffic->shared_ideal += static_cast<std::int64_t>(words.size() + 31) / 32;
    first = last;
  }
}

}  // namespace

std::map<std::string, Traffic>& AllTraffic() {
  static std::map<std::string, Traffic> all;
  return all;
}

void CountAccess(const void* address, std::size_t size, bool write, bool shared, bool copy,
                 const void* place) {
  const auto site =
      sites.try_emplace(place, static_cast<std::uint32_t>(sites.size())).first->second * 2 + shared;
  auto& occurrences = running->occurrences;
  if (occurrences.size() <= site) occurrences.resize(site + 1);
  const std::uint32_t warp = running->block->number * 32 + running->id / 32;
  accesses.push_back({warp, site, occurrences[site]++, running->id % 32,
                      reinterpret_cast<std::uintptr_t>(address), static_cast<std::uint32_t>(size),
                      write, shared, copy});
}

void Count(Event event) {
  if (config.mode != Mode::kCounted || running == nullptr) return;
  ++(event == Event::kMatrix ? threads_matrix : threads_shuffles);
}

void CountBarrier() {
  if (config.mode == Mode::kCounted) ++threads_barriers;
}

void SumTraffic(Block& block) {
  if (config.mode != Mode::kCounted) return;
  Traffic& traffic = AllTraffic()[NameOf(launch->kernel)];
  const auto key = [](const Access& a) { return std::tie(a.warp, a.site, a.occurrence, a.lane); };
  const auto request = [](const Access& a) { return std::tie(a.warp, a.site, a.occurrence); };
  std::sort(accesses.begin(), accesses.end(),
            [&](const Access& a, const Access& b) { return key(a) < key(b); });
  for (std::size_t first = 0; first < accesses.size();) {
    std::size_t last = first;
    while (last < accesses.size() && request(accesses[last]) == request(accesses[first])) ++last;
    const Access* begin = accesses.data() + first;
    const Access* end = accesses.data() + last;
    if (begin->shared) {
      Wavefronts(begin, end, &traffic);
    } else {
      std::int64_t bytes = 0;
      for (const Access* access = begin; access != end; ++access) bytes += access->size;
      const std::int64_t sector_bytes = 32 * Sectors(begin, end);
      (begin->write ? traffic.store_bytes : traffic.load_bytes) += bytes;
      (begin->write ? traffic.store_sector_bytes : traffic.load_sector_bytes) += sector_bytes;
      if (begin->copy) traffic.copy_bytes += bytes;
    }
    first = last;
  }
  accesses.clear();
  EndRounds(block);
  traffic.matrix_instructions += threads_matrix / 32;
  traffic.shuffles += threads_shuffles / 32;
  traffic.barriers += threads_barriers / static_cast<std::int64_t>(block.threads.size());
  threads_matrix = threads_shuffles = threads_barriers = 0;
}

void EndTraffic() {
  if (config.mode != Mode::kCounted) return;
  Traffic& traffic = AllTraffic()[NameOf(launch->kernel)];
  ++traffic.launches;
  traffic.load_unique_bytes += 32 * static_cast<std::int64_t>(loaded.size());
  traffic.store_unique_bytes += 32 * static_cast<std::int64_t>(stored.size());
  loaded.clear();
  stored.clear();
  ForgetRounds();
}

}  // namespace diffmic::emulator
