// Aligned memory, on huge pages for arrays of many megabytes.
#ifndef DIFFMIC_CPU_COMMON_LARGE_ARRAY_H_
#define DIFFMIC_CPU_COMMON_LARGE_ARRAY_H_

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace diffmic::cpu {

struct FreeMemory {
  void operator()(void* data) const { std::free(data); }
};

template <typename T>
using LargeArray = std::unique_ptr<T[], FreeMemory>;

// `count` uninitialised elements, aligned to a cache line. From 4 MB on, on huge pages where the
// system has them, which cost fewer page faults and TLB misses.
template <typename T>
LargeArray<T> MakeLargeArray(std::int64_t count) {
  constexpr std::size_t kPage = std::size_t{2} << 20;
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  const std::size_t unit = bytes < 2 * kPage ? 64 : kPage;
  const std::size_t whole = bytes == 0 ? unit : (bytes + unit - 1) / unit * unit;
  void* data = std::aligned_alloc(unit, whole);
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (unit == kPage) madvise(data, whole, MADV_HUGEPAGE);  // best effort
#endif
  return LargeArray<T>(static_cast<T*>(data));
}

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_COMMON_LARGE_ARRAY_H_
