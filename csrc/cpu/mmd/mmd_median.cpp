#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <limits>
#include <mutex>
#include <type_traits>
#include <vector>

#include "cpu/common/parallel.h"
#include "cpu/mmd/mmd.h"
#include "cpu/mmd/mmd_pool.h"
#include "cpu/mmd/mmd_tiles.h"

namespace diffmic::cpu::mmd {
namespace {

// One pass of a radix selection. Squared distances are not negative, so their bit patterns order as
// integers. A pass counts the next digit of those whose leading digits are the median's. Counts are
// integers: the order in which threads add them does not matter.
template <typename T>
class DigitCount {
 public:
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;

  DigitCount(int low, int bits, Bits prefix)
      : low_(low), bits_(bits), prefix_(prefix), counts_(std::size_t{1} << bits) {}

  void Add(const T* distances, std::int64_t count) {
    const Bits mask = static_cast<Bits>((Bits{1} << bits_) - 1);
    for (std::int64_t i = 0; i < count; ++i) {
      const Bits pattern = std::bit_cast<Bits>(distances[i]);
      nan_ |= distances[i] != distances[i];
      if (pattern >> low_ >> bits_ == prefix_) ++counts_[pattern >> low_ & mask];
    }
  }

  void Add(const DigitCount& other) {
    nan_ |= other.nan_;
    for (std::size_t i = 0; i < counts_.size(); ++i) counts_[i] += other.counts_[i];
  }

  // The digit of the value with that rank among those counted; *rank becomes the rank within it.
  Bits Digit(std::int64_t* rank) const {
    std::size_t digit = 0;
    while (digit + 1 < counts_.size() && *rank >= counts_[digit]) *rank -= counts_[digit++];
    return static_cast<Bits>(digit);
  }

  bool nan() const { return nan_; }

 private:
  int low_, bits_;
  Bits prefix_;
  std::vector<std::int64_t> counts_;
  bool nan_ = false;
};

}  // namespace

template <typename T>
double MedianSquaredDistance(const Matrix<T>& x, const Matrix<T>& y, const Options& options) {
  using Bits = typename DigitCount<T>::Bits;
  const Pool<T> pool(x, y, options.isa);
  const std::vector<Block> blocks = BlocksOf(pool);
  const std::int64_t count = x.count + y.count;
  const std::int64_t pairs = count * (count - 1) / 2;
  // Few pairs: smaller counters to clear and search. Many pairs: fewer passes over the distances.
  const int digit_bits = pairs < (std::int64_t{1} << 20) ? 11 : 16;
  std::int64_t rank = (pairs - 1) / 2;
  Bits prefix = 0;
  for (int low = static_cast<int>(8 * sizeof(T)) - 1; low > 0;) {
    const int bits = std::min(digit_bits, low);
    low -= bits;
    DigitCount<T> all(low, bits, prefix);
    std::mutex mutex;
    const double work = static_cast<double>(pairs) * static_cast<double>(pool.width + 4);
    Share(work, options.threads, [&](std::atomic<std::int64_t>& next) {
      Tile<T> tile(pool);
      DigitCount<T> own(low, bits, prefix);
      for (std::size_t i; (i = static_cast<std::size_t>(next++)) < blocks.size();) {
        const std::int64_t rows = blocks[i].count();
        for (std::size_t j = i; j < blocks.size(); ++j) {
          const std::int64_t columns = blocks[j].count();
          const T* values = tile.Distances(blocks[i], blocks[j], i == j);
          for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t skip = i == j ? r + 1 : 0;
            own.Add(values + r * kTileColumns + skip, columns - skip);
          }
        }
      }
      const std::lock_guard lock(mutex);
      all.Add(own);
    });
    if (all.nan()) return std::numeric_limits<double>::quiet_NaN();
    prefix = static_cast<Bits>(prefix << bits | all.Digit(&rank));
  }
  return static_cast<double>(std::bit_cast<T>(prefix));
}

template double MedianSquaredDistance(const Matrix<float>&, const Matrix<float>&, const Options&);
template double MedianSquaredDistance(const Matrix<double>&, const Matrix<double>&, const Options&);

}  // namespace diffmic::cpu::mmd
