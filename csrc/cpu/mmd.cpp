#include "cpu/mmd.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/mmd_pool.h"
#include "cpu/mmd_tiles.h"

namespace diffmic::cpu::mmd {
namespace {

constexpr std::int64_t kWideRow = 4096;  // elements, from which a block has fewer rows
constexpr std::int64_t kFewRows = 12;

std::int64_t RowsOfBlock(std::int64_t stride) { return stride > kWideRow ? kFewRows : kTileRows; }

// Rows [begin, end) of one side.
struct Block {
  int side;
  std::int64_t begin, end;
};

template <typename T>
std::vector<Block> BlocksOf(const Pool<T>& pool, bool x, bool y) {
  const std::int64_t step = RowsOfBlock(pool.stride);
  std::vector<Block> blocks;
  for (int side = 0; side < 2; ++side) {
    if (!(side == 0 ? x : y)) continue;
    for (std::int64_t i = 0; i < pool.count[side]; i += step) {
      blocks.push_back({side, i, std::min(i + step, pool.count[side])});
    }
  }
  return blocks;
}

template <typename T>
double Work(const Pool<T>& pool, double pairs, bool gradient) {
  return pairs * (static_cast<double>(pool.stride) * (gradient ? 2 : 1) + 20);
}

template <typename T>
std::vector<T> AsType(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}

// A block's gradient in double, and its way out.
template <typename T>
class BlockGradient {
 public:
  explicit BlockGradient(const Pool<T>& pool) : pool_(pool) {
    const std::int64_t most = std::max(pool.count[0], pool.count[1]);
    rows_ = std::min(RowsOfBlock(pool.stride), (most + kFewRows - 1) / kFewRows * kFewRows);
    sums_ = std::make_unique_for_overwrite<double[]>(static_cast<std::size_t>(rows_ * pool.stride));
  }

  void Clear() { std::fill_n(sums_.get(), rows_ * pool_.stride, 0.0); }

  // Of `columns` rows from v, whose kernel's slopes the tile holds.
  void Add(const Block& block, const T* v, std::int64_t columns, const T* tile, double factor) {
    pool_.kernels.gradient(pool_.row(block.side, block.begin), v, pool_.stride,
                           block.end - block.begin, columns, tile, factor, sums_.get());
  }

  // `weights` are of the block's side, NULL where all are 1.
  void Write(const Block& block, const T* weights, T* gradient) const {
    for (std::int64_t i = block.begin; i < block.end; ++i) {
      const double weight = weights == nullptr ? 1.0 : static_cast<double>(weights[i]);
      const double* from = sums_.get() + (i - block.begin) * pool_.stride;
      T* to = gradient + i * pool_.width;
      for (std::int64_t k = 0; k < pool_.width; ++k) to[k] = static_cast<T>(weight * from[k]);
    }
  }

 private:
  const Pool<T>& pool_;
  std::int64_t rows_;
  std::unique_ptr<double[]> sums_;
};

// The weights of one side, and what its means are divided by.
template <typename T>
struct SideWeights {
  std::vector<T> weights;  // padded with zeros to whole tiles
  double sum = 0;
  double pairs = 0;  // sum over the pairs of the estimator of the product of weights
  bool uniform = true;
};

template <typename T>
bool ReadWeights(const Weights<T>& from, std::int64_t count, bool unbiased, SideWeights<T>* share) {
  share->uniform = from.data == nullptr;
  share->weights.assign(static_cast<std::size_t>(count + kTileColumns), T{0});
  double squares = 0;
  std::int64_t positive = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const T weight = share->uniform ? T{1} : from.data[i * from.stride];
    if (weight < 0) return false;
    positive += weight != 0;  // not-a-number counts, and goes on into the result
    share->weights[static_cast<std::size_t>(i)] = weight;
    share->sum += static_cast<double>(weight);
    squares += static_cast<double>(weight) * static_cast<double>(weight);
  }
  share->pairs = share->sum * share->sum - (unbiased ? squares : 0.0);
  return positive >= (unbiased ? 2 : 1);
}

// Columns [begin, end) of a side that a block meets, each counting `times` for the value.
struct Segment {
  int side;
  std::int64_t begin, end;
  double times;
};

struct Sums {
  double within = 0, between = 0;
};

// All that a thread needs to do blocks of `Mmd`.
template <typename T>
class Worker {
 public:
  Worker(const Pool<T>& pool, const SideWeights<T>* shares, const std::vector<T>& scales,
         T* const* gradients)
      : pool_(pool), shares_(shares), scales_(scales), gradients_(gradients), tile_(pool) {
    if (gradients[0] != nullptr || gradients[1] != nullptr) {
      gradient_ = std::make_unique<BlockGradient<T>>(pool);
    }
  }

  Sums Do(const Block& block) {
    const int side = block.side, other = 1 - side;
    const bool slope = gradients_[side] != nullptr;
    // Pairs of x and y are counted by one side alone, one that meets the other in any case.
    const int counting = gradients_[0] == nullptr && gradients_[1] != nullptr ? 1 : 0;
    const std::int64_t own = pool_.count[side], others = pool_.count[other];
    Sums sums;
    if (slope) {
      gradient_->Clear();
      Meet(block, {side, 0, own, 1}, &sums.within);
    } else {
      // Each pair once: within the block, and with later rows for both of its orders.
      Meet(block, {side, block.begin, block.end, 1}, &sums.within);
      Meet(block, {side, block.end, own, 2}, &sums.within);
    }
    double ignored = 0;
    if (slope || side == counting) {
      Meet(block, {other, 0, others, 1}, side == counting ? &sums.between : &ignored);
    }
    if (slope) {
      const SideWeights<T>& share = shares_[side];
      gradient_->Write(block, share.uniform ? nullptr : share.weights.data(), gradients_[side]);
    }
    return sums;
  }

 private:
  void Meet(const Block& block, const Segment& segment, double* sum) {
    const std::int64_t rows = block.end - block.begin;
    const T* u = pool_.row(block.side, block.begin);
    const bool slope = gradients_[block.side] != nullptr;
    const T* row_weights = shares_[block.side].weights.data() + block.begin;
    double factor = 4.0 / static_cast<double>(scales_.size());
    factor *= block.side == segment.side ? 1.0 / shares_[block.side].pairs
                                         : -1.0 / (shares_[0].sum * shares_[1].sum);
    for (std::int64_t j = segment.begin; j < segment.end; j += kTileColumns) {
      const std::int64_t columns = std::min(kTileColumns, segment.end - j);
      const T* v = pool_.row(segment.side, j);
      const T* weights = shares_[segment.side].weights.data() + j;
      // Columns that a vector has beyond the segment's end must weigh nothing.
      if (columns < kTileColumns && segment.end < pool_.count[segment.side]) {
        std::fill(std::copy_n(weights, columns, masked_), masked_ + kTileColumns, T{0});
        weights = masked_;
      }
      T* tile = tile_.Distances(u, rows, v, columns);
      pool_.kernels.weigh(tile, rows, columns, weights, scales_.data(),
                          static_cast<std::int64_t>(scales_.size()),
                          slope ? Leave::kSlope : Leave::kNothing, row_sums_);
      for (std::int64_t r = 0; r < rows; ++r) {
        *sum += segment.times * static_cast<double>(row_weights[r]) * row_sums_[r];
      }
      if (slope) gradient_->Add(block, v, columns, tile, factor);
    }
  }

  const Pool<T>& pool_;
  const SideWeights<T>* shares_;
  const std::vector<T>& scales_;
  T* const* gradients_;
  Tile<T> tile_;
  std::unique_ptr<BlockGradient<T>> gradient_;
  double row_sums_[kTileRows];
  T masked_[kTileColumns];
};

}  // namespace

bool Runs(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kAuto || isa == Isa::kPortable;
}

template <typename T>
Side Mmd(const Matrix<T>& x, const Matrix<T>& y, const Weights<T>& x_weights,
         const Weights<T>& y_weights, const Options& options, T* value, T* x_gradient,
         T* y_gradient) {
  SideWeights<T> shares[2];
  if (!ReadWeights(x_weights, x.count, options.unbiased, &shares[0])) return Side::kX;
  if (!ReadWeights(y_weights, y.count, options.unbiased, &shares[1])) return Side::kY;
  const Pool<T> pool(x, y, options.isa);
  const std::vector<T> scales = AsType<T>(options.scales);
  T* const gradients[2] = {x_gradient, y_gradient};
  const std::vector<Block> blocks = BlocksOf(pool, true, true);
  std::vector<Sums> sums(blocks.size());
  const double all = static_cast<double>(x.count + y.count);
  const bool slope = x_gradient != nullptr || y_gradient != nullptr;
  Share(Work(pool, all * all, slope), options.threads, [&](std::atomic<std::int64_t>& next) {
    Worker<T> worker(pool, shares, scales, gradients);
    for (std::size_t i; (i = static_cast<std::size_t>(next++)) < blocks.size();) {
      sums[i] = worker.Do(blocks[i]);
    }
  });
  // Means of k - 1: the ones of the three means cancel.
  double within[2] = {0, 0}, between = 0;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    within[blocks[i].side] += sums[i].within;
    between += sums[i].between;
  }
  const double total = within[0] / shares[0].pairs + within[1] / shares[1].pairs -
                       2.0 * between / (shares[0].sum * shares[1].sum);
  *value = static_cast<T>(total / static_cast<double>(scales.size()));
  return Side::kNone;
}

template <typename T>
void KernelMatrix(const Matrix<T>& x, const Matrix<T>& y, const Options& options, T* kernel) {
  const Pool<T> pool(x, y, options.isa);
  const std::vector<T> scales = AsType<T>(options.scales);
  const std::vector<Block> blocks = BlocksOf(pool, true, false);
  const std::vector<T> weights(kTileColumns, T{1});
  const double pairs = static_cast<double>(x.count) * static_cast<double>(y.count);
  Share(Work(pool, pairs, false), options.threads, [&](std::atomic<std::int64_t>& next) {
    Tile<T> tile(pool);
    double ignored[kTileRows];
    for (std::size_t i; (i = static_cast<std::size_t>(next++)) < blocks.size();) {
      const Block& block = blocks[i];
      const std::int64_t rows = block.end - block.begin;
      for (std::int64_t j = 0; j < y.count; j += kTileColumns) {
        const std::int64_t columns = std::min(kTileColumns, y.count - j);
        T* values = tile.Distances(pool.row(0, block.begin), rows, pool.row(1, j), columns);
        pool.kernels.weigh(values, rows, columns, weights.data(), scales.data(),
                           static_cast<std::int64_t>(scales.size()), Leave::kKernel, ignored);
        for (std::int64_t r = 0; r < rows; ++r) {
          std::copy_n(values + r * kTileColumns, columns, kernel + (block.begin + r) * y.count + j);
        }
      }
    }
  });
}

template <typename T>
void KernelMatrixBackward(const Matrix<T>& cotangent, const Matrix<T>& x, const Matrix<T>& y,
                          const Options& options, T* x_gradient, T* y_gradient) {
  const Pool<T> pool(x, y, options.isa);
  const std::vector<T> scales = AsType<T>(options.scales);
  T* const gradients[2] = {x_gradient, y_gradient};
  const std::vector<Block> blocks = BlocksOf(pool, x_gradient != nullptr, y_gradient != nullptr);
  const std::vector<T> weights(kTileColumns, T{1});
  const double factor = 2.0 / static_cast<double>(scales.size());
  const double pairs = static_cast<double>(x.count) * static_cast<double>(y.count);
  Share(Work(pool, 2 * pairs, true), options.threads, [&](std::atomic<std::int64_t>& next) {
    Tile<T> tile(pool);
    BlockGradient<T> gradient(pool);
    double ignored[kTileRows];
    for (std::size_t i; (i = static_cast<std::size_t>(next++)) < blocks.size();) {
      const Block& block = blocks[i];
      const int other = 1 - block.side;
      const std::int64_t rows = block.end - block.begin;
      const std::int64_t row_stride = cotangent.stride[block.side];
      const std::int64_t column_stride = cotangent.stride[other];
      gradient.Clear();
      for (std::int64_t j = 0; j < pool.count[other]; j += kTileColumns) {
        const std::int64_t columns = std::min(kTileColumns, pool.count[other] - j);
        const T* v = pool.row(other, j);
        T* values = tile.Distances(pool.row(block.side, block.begin), rows, v, columns);
        pool.kernels.weigh(values, rows, columns, weights.data(), scales.data(),
                           static_cast<std::int64_t>(scales.size()), Leave::kSlope, ignored);
        for (std::int64_t r = 0; r < rows; ++r) {
          const T* line = cotangent.data + (block.begin + r) * row_stride + j * column_stride;
          T* slopes = values + r * kTileColumns;
          for (std::int64_t c = 0; c < columns; ++c) slopes[c] *= line[c * column_stride];
        }
        gradient.Add(block, v, columns, values, factor);
      }
      gradient.Write(block, nullptr, gradients[block.side]);
    }
  });
}

#define DIFFMIC_INSTANTIATE(T)                                                                   \
  template Side Mmd<T>(const Matrix<T>&, const Matrix<T>&, const Weights<T>&, const Weights<T>&, \
                       const Options&, T*, T*, T*);                                              \
  template void KernelMatrix<T>(const Matrix<T>&, const Matrix<T>&, const Options&, T*);         \
  template void KernelMatrixBackward<T>(const Matrix<T>&, const Matrix<T>&, const Matrix<T>&,    \
                                        const Options&, T*, T*);
DIFFMIC_INSTANTIATE(float)
DIFFMIC_INSTANTIATE(double)
#undef DIFFMIC_INSTANTIATE

}  // namespace diffmic::cpu::mmd
