#include "cpu/mmd/mmd.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/common/parallel.h"
#include "cpu/mmd/mmd_pool.h"
#include "cpu/mmd/mmd_rounds.h"
#include "cpu/mmd/mmd_tiles.h"

namespace diffmic::cpu::mmd {
namespace {

template <typename T>
std::vector<T> AsType(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}

// The weights of one side, and the divisors of its means.
template <typename T>
struct SideWeights {
  std::vector<T> weights;  // padded with zeros to whole tiles
  double sum = 0;
  double pairs = 0;  // the sum of products of two weights over the estimator's pairs
};

// Weights are scaled by a power of two, exactly, so that the largest is in [1, 2): products of two
// neither overflow nor underflow. False if one is negative or too few are positive.
template <typename T>
bool ReadWeights(const Weights<T>& from, std::int64_t count, bool unbiased, SideWeights<T>* share) {
  share->weights.assign(static_cast<std::size_t>(count + kTileColumns), T{0});
  const auto read = [&](std::int64_t i) { return from.data ? from.data[i * from.stride] : T{1}; };
  T most = 0;
  for (std::int64_t i = 0; i < count; ++i) most = std::max(most, read(i));
  const bool scales = from.data != nullptr && most > 0 && std::isfinite(most);
  const int exponent = scales ? std::ilogb(most) : 0;
  double squares = 0;
  std::int64_t positive = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const T weight = exponent == 0 ? read(i) : std::ldexp(read(i), -exponent);
    if (weight < 0) return false;
    positive += weight != 0;  // NaN counts, and propagates to the result
    share->weights[static_cast<std::size_t>(i)] = weight;
    share->sum += static_cast<double>(weight);
    squares += static_cast<double>(weight) * static_cast<double>(weight);
  }
  share->pairs = share->sum * share->sum - (unbiased ? squares : 0.0);
  return positive >= (unbiased ? 2 : 1);
}

// A block's sums of kernel values with blocks of its own side and of the other.
struct Sums {
  double within = 0, between = 0;
};

// The gradient of one side: the caller's array, and its rounding errors.
template <typename T>
struct SideGradient {
  T* high = nullptr;
  std::unique_ptr<T[]> low;

  SumRows<T> rows(const Block& block, std::int64_t width) const {
    if (high == nullptr) return {nullptr, nullptr, width};
    return {high + block.begin * width, low.get() + block.begin * width, width};
  }
};

// Shared by all threads of `Mmd`.
template <typename T>
struct Task {
  const Pool<T>& pool;
  const SideWeights<T> (&shares)[2];
  const std::vector<T>& scales;
  const SideGradient<T> (&gradients)[2];
};

// Processes a pair of blocks: adds to the value and to the gradients of both.
template <typename T>
void AddPair(const Task<T>& task, const Block& rows, const Block& columns, Tile<T>* tile,
             Sums* sum) {
  const Pool<T>& pool = task.pool;
  const bool upper = &rows == &columns, within = rows.side == columns.side;
  const SumRows<T> to_rows = task.gradients[rows.side].rows(rows, pool.width);
  const SumRows<T> to_columns = task.gradients[columns.side].rows(columns, pool.width);
  const bool gradient = to_rows.high != nullptr || to_columns.high != nullptr;
  T* values = tile->Distances(rows, columns, upper);
  const T* row_weights = task.shares[rows.side].weights.data() + rows.begin;
  // Columns beyond the end of the block must have weight 0.
  T column_weights[kTileColumns] = {};
  std::copy_n(task.shares[columns.side].weights.data() + columns.begin, columns.count(),
              column_weights);
  double row_sums[kTileRows];
  pool.kernels.kernel_sums(values, rows.count(), columns.count(), upper,
                           {row_weights, column_weights, task.scales.data(),
                            static_cast<std::int64_t>(task.scales.size()),
                            gradient ? TileOutput::kCoefficients : TileOutput::kNone},
                           row_sums);
  double total = 0;
  for (std::int64_t r = 0; r < rows.count(); ++r) {
    total += static_cast<double>(row_weights[r]) * row_sums[r];
  }
  // Both orders of every pair. A row paired with itself is at distance 0 and adds nothing.
  (within ? sum->within : sum->between) += within ? 2 * total : total;
  if (!gradient) return;
  double factor = 4.0 / static_cast<double>(task.scales.size());
  factor /= within ? task.shares[rows.side].pairs : -task.shares[0].sum * task.shares[1].sum;
  pool.kernels.gradient(pool.rows(rows), pool.rows(columns), pool.width, values, upper,
                        static_cast<T>(factor), to_rows, to_columns);
}

// Zeroes the accumulators of a gradient.
template <typename T>
void Clear(const SumRows<T>& sums, std::int64_t count) {
  if (sums.high == nullptr) return;
  std::fill_n(sums.high, count * sums.stride, T{0});
  std::fill_n(sums.low, count * sums.stride, T{0});
}

// On one thread: negligible next to the n^2 pairs of the discrepancies.
template <typename T>
T MeanSquaredError(const Matrix<T>& noise, const Matrix<T>& prediction, T* gradient) {
  const double count = static_cast<double>(noise.count) * static_cast<double>(noise.width);
  const T factor = static_cast<T>(2.0 / count);
  double sum = 0;
  for (std::int64_t i = 0; i < noise.count; ++i) {
    const T* of_noise = noise.data + i * noise.stride[0];
    const T* predicted = prediction.data + i * prediction.stride[0];
    for (std::int64_t k = 0; k < noise.width; ++k) {
      const T difference = predicted[k * prediction.stride[1]] - of_noise[k * noise.stride[1]];
      sum += static_cast<double>(difference) * static_cast<double>(difference);
      if (gradient != nullptr) gradient[i * noise.width + k] = factor * difference;
    }
  }
  return static_cast<T>(sum / count);
}

}  // namespace

template <typename T>
Side Mmd(const MmdCall<T>& call, const Options& options) {
  const Matrix<T>&x = call.x, &y = call.y;
  SideWeights<T> shares[2];
  if (!ReadWeights(call.x_weights, x.count, call.unbiased, &shares[0])) return Side::kX;
  if (!ReadWeights(call.y_weights, y.count, call.unbiased, &shares[1])) return Side::kY;
  const Pool<T> pool(x, y, options.isa);
  const std::vector<T> scales = AsType<T>(call.kernel.scales);
  SideGradient<T> gradients[2];
  gradients[0].high = call.x_gradient;
  gradients[1].high = call.y_gradient;
  for (int side = 0; side < 2; ++side) {
    if (gradients[side].high == nullptr) continue;
    gradients[side].low = std::make_unique_for_overwrite<T[]>(
        static_cast<std::size_t>(pool.count[side] * pool.width));
  }
  const std::vector<Block> blocks = BlocksOf(pool);
  const Task<T> task = {pool, shares, scales, gradients};
  std::vector<Sums> sums(blocks.size());
  Rounds rounds(static_cast<std::int64_t>(blocks.size()));
  const double all = static_cast<double>(x.count + y.count);
  const int passes = 1 + (call.x_gradient != nullptr) + (call.y_gradient != nullptr);
  const double work = all * all / 2 * (static_cast<double>(pool.width) * passes + 20);
  Share(work, options.threads, [&](std::atomic<std::int64_t>& next) {
    Tile<T> tile(pool);
    for (std::int64_t i; (i = next++) < rounds.count();) {
      const Rounds::Pair pair = rounds.pair(i);
      const auto first = static_cast<std::size_t>(pair.first);
      rounds.Begin(pair);
      const auto for_each = [&](const auto& body) {
        for (const std::int64_t index : {pair.first, pair.second}) {
          if (index < 0) continue;
          const Block& block = blocks[static_cast<std::size_t>(index)];
          const SumRows<T> rows = gradients[block.side].rows(block, pool.width);
          if (rows.high != nullptr) body(rows, block.count());
        }
      };
      if (pair.round == 0) for_each([&](const auto& rows, auto count) { Clear(rows, count); });
      if (pair.second >= 0) {
        AddPair(task, blocks[first], blocks[static_cast<std::size_t>(pair.second)], &tile,
                &sums[first]);
      }
      if (pair.last) {
        for_each(
            [&](const auto& rows, auto count) { pool.kernels.finish(rows, count, pool.width); });
      }
      rounds.End(pair);
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
  *call.value = static_cast<T>(total / static_cast<double>(scales.size()));
  return Side::kNone;
}

template <typename T>
void NoiseLosses(const NoiseLossesCall<T>& call, const Options& options) {
  const Matrix<T>& noise = call.noise;
  const double width = static_cast<double>(noise.width);
  const Kernel kernel = {{1 / (width * width)}, nullptr};
  const Weights<T> ones = {nullptr, 0};
  for (std::int64_t i = 0; i < call.predictions.count; ++i) {
    const Matrix<T> prediction = call.predictions[i];
    T* const gradient =
        call.gradients == nullptr ? nullptr : call.gradients + i * noise.count * noise.width;
    if (i == 0) {
      call.losses[i] = MeanSquaredError(noise, prediction, gradient);
    } else {
      Mmd<T>({noise, prediction, ones, ones, kernel, false, &call.losses[i], nullptr, gradient},
             options);
    }
  }
}

template <typename T>
void KernelMatrix(const KernelMatrixCall<T>& call, const Options& options) {
  const Matrix<T>&x = call.x, &y = call.y;
  const Pool<T> pool(x, y, options.isa);
  const std::vector<T> scales = AsType<T>(call.kernel.scales);
  const std::vector<Block> blocks = BlocksOf(pool, true, false), others = BlocksOf(pool, false);
  const std::vector<T> ones(kTileColumns, T{1});
  const double work = static_cast<double>(x.count) * static_cast<double>(y.count) *
                      static_cast<double>(pool.width + 20);
  Share(work, options.threads, [&](std::atomic<std::int64_t>& next) {
    Tile<T> tile(pool);
    double ignored[kTileRows];
    for (std::size_t i; (i = static_cast<std::size_t>(next++)) < blocks.size();) {
      const Block& block = blocks[i];
      for (const Block& other : others) {
        T* values = tile.Distances(block, other);
        pool.kernels.kernel_sums(values, block.count(), other.count(), false,
                                 {ones.data(), ones.data(), scales.data(),
                                  static_cast<std::int64_t>(scales.size()), TileOutput::kKernel},
                                 ignored);
        for (std::int64_t r = 0; r < block.count(); ++r) {
          std::copy_n(values + r * kTileColumns, other.count(),
                      call.matrix + (block.begin + r) * y.count + other.begin);
        }
      }
    }
  });
}

template <typename T>
void KernelMatrixBackward(const KernelMatrixBackwardCall<T>& call, const Options& options) {
  const Matrix<T>&cotangent = call.cotangent, &x = call.x, &y = call.y;
  const Pool<T> pool(x, y, options.isa);
  const std::vector<T> scales = AsType<T>(call.kernel.scales);
  T* const gradients[2] = {call.x_gradient, call.y_gradient};
  const std::vector<Block> blocks = BlocksOf(pool);
  const std::vector<T> ones(kTileColumns, T{1});
  const T factor = static_cast<T>(2.0 / static_cast<double>(scales.size()));
  const double work = static_cast<double>(x.count) * static_cast<double>(y.count) *
                      static_cast<double>(4 * pool.width + 40);
  Share(work, options.threads, [&](std::atomic<std::int64_t>& next) {
    Tile<T> tile(pool);
    const auto low =
        std::make_unique_for_overwrite<T[]>(static_cast<std::size_t>(kTileRows * pool.width));
    double ignored[kTileRows];
    for (std::size_t i; (i = static_cast<std::size_t>(next++)) < blocks.size();) {
      const Block& block = blocks[i];
      if (gradients[block.side] == nullptr) continue;
      const std::int64_t row_stride = cotangent.stride[block.side];
      const std::int64_t column_stride = cotangent.stride[1 - block.side];
      const SumRows<T> sums = {gradients[block.side] + block.begin * pool.width, low.get(),
                               pool.width};
      Clear(sums, block.count());
      for (const Block& other : blocks) {
        if (other.side == block.side) continue;
        T* values = tile.Distances(block, other);
        pool.kernels.kernel_sums(
            values, block.count(), other.count(), false,
            {ones.data(), ones.data(), scales.data(), static_cast<std::int64_t>(scales.size()),
             TileOutput::kCoefficients},
            ignored);
        for (std::int64_t r = 0; r < block.count(); ++r) {
          const T* line = cotangent.data + (block.begin + r) * row_stride;
          T* coefficients = values + r * kTileColumns;
          for (std::int64_t c = 0; c < other.count(); ++c) {
            coefficients[c] *= line[(other.begin + c) * column_stride];
          }
        }
        pool.kernels.gradient(pool.rows(block), pool.rows(other), pool.width, values, false, factor,
                              sums, {nullptr, nullptr, 0});
      }
      pool.kernels.finish(sums, block.count(), pool.width);
    }
  });
}

#define DIFFMIC_INSTANTIATE(T)                                               \
  template Side Mmd<T>(const MmdCall<T>&, const Options&);                   \
  template void NoiseLosses<T>(const NoiseLossesCall<T>&, const Options&);   \
  template void KernelMatrix<T>(const KernelMatrixCall<T>&, const Options&); \
  template void KernelMatrixBackward<T>(const KernelMatrixBackwardCall<T>&, const Options&);
DIFFMIC_INSTANTIATE(float)
DIFFMIC_INSTANTIATE(double)
#undef DIFFMIC_INSTANTIATE

}  // namespace diffmic::cpu::mmd
