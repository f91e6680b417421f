// The kernels of `conditioning`, compiled once per instruction set (conditioning_avx2.cpp and the
// like): forward and backward pass of a chunk of kChannels output channels, with vectors across
// channels. conditioning.h describes the work, its division and its bounds. No inline function of
// the standard library may be called here: the linker keeps one copy of such a function, possibly
// one that an older processor cannot run.
//
// Layout: a chunk's arrays in the workspace are [rows, kChannels], compact, whatever the strides
// outside: at F = 6144 those are a multiple of a page, so that all rows of x compete for the same
// few sets of L1. The last chunk of F may be short: its vectors are loaded and stored in part, and
// lanes without a channel hold zeros, gains included, so that they contribute nothing.
#include <cstdint>

#include "cpu/common/simd.h"
#include "cpu/conditioning/conditioning_kernel_table.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

using conditioning::Batch;
using conditioning::Call;
using conditioning::Gradients;
using conditioning::kChannels;
using conditioning::kEvalRows;
using conditioning::Layer;
using conditioning::Running;

static_assert(kChannels % (4 * kLanes) == 0);

// Channels [channel, channel + count), in groups of kGroup vectors; a short chunk goes one vector
// at a time.
template <int kGroup>
struct Chunk {
  static constexpr bool kWhole = kGroup > 1;
  static constexpr std::int64_t kStep = kGroup * kLanes;

  std::int64_t channel, count;

  std::int64_t end() const { return kWhole ? kChannels : (count + kLanes - 1) / kLanes * kLanes; }
  // Channels [u, u + kLanes) of the chunk, from or to a row [F].
  Vec Read(const float* row, std::int64_t u) const {
    if (kWhole || count - u >= kLanes) return Load(row + channel + u);
    return LoadPart(row + channel + u, static_cast<int>(count - u));
  }
  void Write(float* row, std::int64_t u, Vec value) const {
    if (kWhole || count - u >= kLanes) return Store(row + channel + u, value);
    StorePart(row + channel + u, value, static_cast<int>(count - u));
  }
};

// ---- sums over rows, in double

typedef float HalfVec __attribute__((vector_size(2 * kLanes)));
typedef double WideVec __attribute__((vector_size(4 * kLanes)));
constexpr std::int64_t kHalf = kLanes / 2;

inline WideVec Widen(const float* p) {
  HalfVec half;
  __builtin_memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, WideVec);
}

inline void StoreWide(double* p, WideVec value) { __builtin_memcpy(p, &value, sizeof value); }

// Mean and biased variance of `rows` rows of z, in two passes. kGroup independent accumulators hide
// the latency of the additions.
template <int kGroup>
void Moments(const Chunk<kGroup>& chunk, const float* z, std::int64_t rows, double* mean,
             double* variance) {
  const double share = 1.0 / static_cast<double>(rows);
  for (std::int64_t u = 0; u < chunk.end(); u += kGroup * kHalf) {
    WideVec sum[kGroup] = {}, squares[kGroup] = {};
    for (std::int64_t b = 0; b < rows; ++b) {
      for (int i = 0; i < kGroup; ++i) sum[i] += Widen(z + b * kChannels + u + i * kHalf);
    }
    for (int i = 0; i < kGroup; ++i) sum[i] *= share;
    for (std::int64_t b = 0; b < rows; ++b) {
      for (int i = 0; i < kGroup; ++i) {
        const WideVec distance = Widen(z + b * kChannels + u + i * kHalf) - sum[i];
        squares[i] += distance * distance;
      }
    }
    for (int i = 0; i < kGroup; ++i) {
      StoreWide(mean + u + i * kHalf, sum[i]);
      StoreWide(variance + u + i * kHalf, squares[i] * share);
    }
  }
}

// The sums of d and of d (z - mean) over `rows` rows.
template <int kGroup>
void GradientSums(const Chunk<kGroup>& chunk, const float* d, const float* z, const float* mean,
                  std::int64_t rows, double* sum, double* moment) {
  for (std::int64_t u = 0; u < chunk.end(); u += kGroup * kHalf) {
    WideVec middle[kGroup], plain[kGroup] = {}, weighted[kGroup] = {};
    for (int i = 0; i < kGroup; ++i) middle[i] = Widen(mean + u + i * kHalf);
    for (std::int64_t b = 0; b < rows; ++b) {
      for (int i = 0; i < kGroup; ++i) {
        const std::int64_t at = b * kChannels + u + i * kHalf;
        const WideVec value = Widen(d + at);
        plain[i] += value;
        weighted[i] += value * (Widen(z + at) - middle[i]);
      }
    }
    for (int i = 0; i < kGroup; ++i) {
      StoreWide(sum + u + i * kHalf, plain[i]);
      StoreWide(moment + u + i * kHalf, weighted[i]);
    }
  }
}

// ---- a chunk's parameters

// n = (z - mean) gain + shift, for one branch.
struct Norm {
  float mean[kChannels], inverse[kChannels], gain[kChannels], shift[kChannels];
};

void Normalise(const Layer& layer, const float* mean, const float* variance, std::int64_t channel,
               std::int64_t count, Norm* norm) {
  for (std::int64_t u = 0; u < count; ++u) {
    norm->mean[u] = mean[u];
    norm->inverse[u] = 1.0f / __builtin_sqrtf(variance[u] + static_cast<float>(layer.eps));
    norm->gain[u] = norm->inverse[u] * layer.norm_weight[channel + u];
    norm->shift[u] = layer.norm_bias[channel + u];
  }
  for (std::int64_t u = count; u < kChannels; ++u) {
    norm->mean[u] = norm->inverse[u] = norm->gain[u] = norm->shift[u] = 0.0f;
  }
}

// [inputs, kChannels]: the bias, then the columns of W.
void PackWeights(const Call& call, std::int64_t channel, std::int64_t count, float* w) {
  const Layer& layer = call.layer;
  for (std::int64_t u = 0; u < kChannels; ++u) w[u] = u < count ? layer.bias[channel + u] : 0.0f;
  for (std::int64_t c = 1; c < call.inputs; ++c) {
    const float* column =
        layer.weight + channel * layer.weight_stride[0] + (c - 1) * layer.weight_stride[1];
    for (std::int64_t u = 0; u < kChannels; ++u) {
      w[c * kChannels + u] = u < count ? column[u * layer.weight_stride[0]] : 0.0f;
    }
  }
}

// ---- matrix products

// p = W l + bias and z = gamma p for rows [first, first + rows) of a branch; p may be null.
template <int kGroup>
void Products(const Call& call, const Chunk<kGroup>& chunk, const float* labels, const float* w,
              std::int64_t first, std::int64_t rows, float* p, float* z) {
  for (std::int64_t u = 0; u < chunk.end(); u += chunk.kStep) {
    for (std::int64_t b = 0; b < rows; ++b) {
      const float* label = labels + (first + b) * call.inputs;
      Vec sum[kGroup];
      for (int i = 0; i < kGroup; ++i) sum[i] = Load(w + u + i * kLanes);
      for (std::int64_t c = 1; c < call.inputs; ++c) {
        const Vec value = Set(label[c]);
        for (int i = 0; i < kGroup; ++i) {
          sum[i] = Fma(value, Load(w + c * kChannels + u + i * kLanes), sum[i]);
        }
      }
      for (int i = 0; i < kGroup; ++i) {
        const std::int64_t at = u + i * kLanes;
        if (p != nullptr) Store(p + b * kChannels + at, sum[i]);
        Store(z + b * kChannels + at, chunk.Read(call.gamma[first + b], at) * sum[i]);
      }
    }
  }
}

// gradient [inputs, kChannels] += labels^T d over the rows of a branch; d is the gradient of p.
template <int kGroup>
void AddWeightGradient(const Call& call, const Chunk<kGroup>& chunk, const float* labels,
                       const float* d, float* gradient) {
  for (std::int64_t c = 0; c < call.inputs; ++c) {
    for (std::int64_t u = 0; u < chunk.end(); u += chunk.kStep) {
      float* to = gradient + c * kChannels + u;
      Vec sum[kGroup];
      for (int i = 0; i < kGroup; ++i) sum[i] = Load(to + i * kLanes);
      for (std::int64_t b = 0; b < call.batch.rows; ++b) {
        const Vec value = Set(labels[b * call.inputs + c]);
        for (int i = 0; i < kGroup; ++i) {
          sum[i] = Fma(value, Load(d + b * kChannels + u + i * kLanes), sum[i]);
        }
      }
      for (int i = 0; i < kGroup; ++i) Store(to + i * kLanes, sum[i]);
    }
  }
}

// sums [rows, 2 C] += d W for the channels of the chunk.
template <int kGroup>
void AddLabelGradient(const Call& call, const Chunk<kGroup>& chunk, const float* w, const float* d,
                      float* sums) {
  for (std::int64_t b = 0; b < call.batch.rows; ++b) {
    for (std::int64_t c = 1; c < call.inputs; ++c) {
      Vec sum = Zero();
      for (std::int64_t u = 0; u < chunk.end(); u += kLanes) {
        sum = Fma(Load(d + b * kChannels + u), Load(w + c * kChannels + u), sum);
      }
      sums[b * (call.inputs - 1) + c - 1] += Sum(sum);
    }
  }
}

// ---- forward

template <int kGroup>
void Activate(const Call& call, const Chunk<kGroup>& chunk, const Norm& norm, const float* z,
              std::int64_t first, std::int64_t rows, float* out) {
  const Batch& batch = call.batch;
  for (std::int64_t b = 0; b < rows; ++b) {
    const float* x = batch.x + (first + b) * batch.x_stride;
    float* to = out + (first + b) * call.layer.features;
    for (std::int64_t u = 0; u < chunk.end(); u += kLanes) {
      const Vec n = Fma(Load(z + b * kChannels + u) - Load(norm.mean + u), Load(norm.gain + u),
                        Load(norm.shift + u));
      chunk.Write(to, u, chunk.Read(x, u) * Softplus(n));
    }
  }
}

// Updates the running statistics with those of one branch, rounded to float32 as BatchNorm does.
void UpdateRunning(const Running& running, const double* mean, const double* variance,
                   std::int64_t rows, bool first, std::int64_t channel, std::int64_t count) {
  const double unbiased = static_cast<double>(rows) / static_cast<double>(rows - 1);
  const double old = 1.0 - running.momentum;
  const float* from_mean = first ? running.mean : running.updated_mean;
  const float* from_variance = first ? running.variance : running.updated_variance;
  for (std::int64_t u = 0; u < count; ++u) {
    const double m = old * static_cast<double>(from_mean[channel + u]) + running.momentum * mean[u];
    const double v = old * static_cast<double>(from_variance[channel + u]) +
                     running.momentum * (variance[u] * unbiased);
    running.updated_mean[channel + u] = static_cast<float>(m);
    running.updated_variance[channel + u] = static_cast<float>(v);
  }
}

template <int kGroup>
void ForwardChunk(const Call& call, const Running& running, const Chunk<kGroup>& chunk,
                  float* workspace, float* statistics, float* out) {
  const Batch& batch = call.batch;
  const std::int64_t features = call.layer.features;
  const std::int64_t channel = chunk.channel, count = chunk.count;
  float* w = workspace;
  float* z = workspace + call.inputs * kChannels;
  PackWeights(call, channel, count, w);
  float* means = statistics + channel;
  float* variances = means + StatisticsStreams(batch) * features;
  Norm norm;
  if (!batch.training) {
    for (std::int64_t u = 0; u < count; ++u) {
      means[u] = running.mean[channel + u];
      variances[u] = running.variance[channel + u];
    }
    Normalise(call.layer, means, variances, channel, count, &norm);
  }
  const std::int64_t step = batch.training ? batch.rows : kEvalRows;
  for (std::int64_t s = 0; s < batch.streams; ++s) {
    const float* labels = call.labels + s * batch.rows * call.inputs;
    float* to = out + s * batch.rows * features;
    for (std::int64_t first = 0; first < batch.rows; first += step) {
      const std::int64_t left = batch.rows - first, rows = left < step ? left : step;
      Products<kGroup>(call, chunk, labels, w, first, rows, nullptr, z);
      if (batch.training) {
        double mean[kChannels], variance[kChannels];
        Moments(chunk, z, rows, mean, variance);
        UpdateRunning(running, mean, variance, rows, s == 0, channel, count);
        for (std::int64_t u = 0; u < count; ++u) {
          means[s * features + u] = static_cast<float>(mean[u]);
          variances[s * features + u] = static_cast<float>(variance[u]);
        }
        Normalise(call.layer, means + s * features, variances + s * features, channel, count,
                  &norm);
      }
      Activate(call, chunk, norm, z, first, rows, to);
    }
  }
}

void Forward(const Call& call, const Running& running, std::int64_t channel, std::int64_t count,
             float* workspace, float* statistics, float* out) {
  if (count == kChannels) {
    ForwardChunk<4>(call, running, {channel, count}, workspace, statistics, out);
  } else {
    ForwardChunk<1>(call, running, {channel, count}, workspace, statistics, out);
  }
}

// ---- backward

// 1 / (1 + exp(-n)), given e = exp(-|n|): 1 or e, by the sign of n, over 1 + e. The step function
// is clamped to -1 as soon as e differs from 1. NaN propagates through e.
inline Vec Sigmoid(Vec n, Vec e) {
  const Vec negative_step = Max(Set(-1.0f), n * Set(-3e38f));
  return Max(Zero() - negative_step, e) / (Set(1.0f) + e);
}

// From grad, the gradient of h1: d, the gradient of n, and, where wanted, that of x.
template <int kGroup>
void BackwardActivation(const Call& call, const Chunk<kGroup>& chunk, const Norm& norm,
                        const float* grad, std::int64_t grad_stride, const float* z, float* d,
                        float* x_gradient, bool first) {
  const Batch& batch = call.batch;
  for (std::int64_t b = 0; b < batch.rows; ++b) {
    const float* x = batch.x + b * batch.x_stride;
    const float* from = grad + b * grad_stride;
    for (std::int64_t u = 0; u < chunk.end(); u += kLanes) {
      const Vec n = Fma(Load(z + b * kChannels + u) - Load(norm.mean + u), Load(norm.gain + u),
                        Load(norm.shift + u));
      const Vec e = ExpOfNegative(NegativeAbs(n));
      const Vec g = chunk.Read(from, u);
      Store(d + b * kChannels + u, g * chunk.Read(x, u) * Sigmoid(n, e));
      if (x_gradient != nullptr) {
        float* to = x_gradient + b * call.layer.features;
        const Vec share = g * (Max(Zero(), n) + Log1p(e));
        chunk.Write(to, u, first ? share : chunk.Read(to, u) + share);
      }
    }
  }
}

// Turns d, the gradient of n, into that of p, and adds the gradient of gamma to its rows. The
// statistics of the batch contribute constant + slope (z - mean).
template <int kGroup>
void BackwardNorm(const Call& call, const Chunk<kGroup>& chunk, const Norm& norm,
                  const float* constant, const float* slope, const float* p, const float* z,
                  float* d) {
  for (std::int64_t b = 0; b < call.batch.rows; ++b) {
    const float* gamma = call.gamma[b];
    for (std::int64_t u = 0; u < chunk.end(); u += kLanes) {
      const std::int64_t at = b * kChannels + u;
      Vec dz = Load(d + at) * Load(norm.gain + u);
      if (call.batch.training) {
        dz = dz - Fma(Load(z + at) - Load(norm.mean + u), Load(slope + u), Load(constant + u));
      }
      if (call.gamma_gradient != nullptr) {
        float* to = call.gamma_gradient[b];
        chunk.Write(to, u, Fma(dz, Load(p + at), chunk.Read(to, u)));
      }
      Store(d + at, chunk.Read(gamma, u) * dz);
    }
  }
}

// The contribution of the batch's statistics to d, the gradient of n, for a batch of two rows.
// Their n differ in sign alone, so the gradient of a row is
//   d - mean(d) - n mean(d n) = (d - mean(d)) eps / (variance + eps).
// The left-hand side would cancel terms that are (variance + eps) / eps times as large.
template <int kGroup>
void BackwardStatisticsOfTwo(const Chunk<kGroup>& chunk, const Norm& norm, float eps, float* d) {
  const Vec half = Set(0.5f * eps);
  for (std::int64_t u = 0; u < chunk.end(); u += kLanes) {
    const Vec inverse = Load(norm.inverse + u);
    const Vec part = (Load(d + u) - Load(d + kChannels + u)) * (half * inverse * inverse);
    Store(d + u, part);
    Store(d + kChannels + u, Zero() - part);
  }
}

// The gradients of a chunk's parameters, summed over the branches.
struct ParameterSums {
  float* weight;  // [inputs, kChannels]
  double norm_weight[kChannels], norm_bias[kChannels];
};

void WriteParameters(const Call& call, const ParameterSums& sums, const Gradients& gradients,
                     std::int64_t channel, std::int64_t count) {
  const std::int64_t width = call.inputs - 1;
  for (std::int64_t u = 0; u < count; ++u) {
    if (gradients.norm_weight != nullptr) {
      gradients.norm_weight[channel + u] = static_cast<float>(sums.norm_weight[u]);
    }
    if (gradients.norm_bias != nullptr) {
      gradients.norm_bias[channel + u] = static_cast<float>(sums.norm_bias[u]);
    }
    if (gradients.bias != nullptr) gradients.bias[channel + u] = sums.weight[u];
    if (gradients.weight == nullptr) continue;
    for (std::int64_t c = 0; c < width; ++c) {
      gradients.weight[(channel + u) * width + c] = sums.weight[(c + 1) * kChannels + u];
    }
  }
}

template <int kGroup>
void BackwardChunk(const Call& call, const float* grad, const std::int64_t (&grad_stride)[2],
                   const float* statistics, const Gradients& gradients, const Chunk<kGroup>& chunk,
                   float* workspace, float* label_sums) {
  const Batch& batch = call.batch;
  const std::int64_t features = call.layer.features, rows = batch.rows;
  const std::int64_t channel = chunk.channel, count = chunk.count;
  const bool weights = gradients.weight != nullptr || gradients.bias != nullptr;
  const bool scaled = weights || label_sums != nullptr || call.gamma_gradient != nullptr;
  const bool two = batch.training && rows == 2;
  const bool norms = gradients.norm_weight != nullptr || gradients.norm_bias != nullptr;

  float* w = workspace;
  float* p = w + 2 * call.inputs * kChannels;
  float* z = p + rows * kChannels;
  float* d = z + rows * kChannels;
  ParameterSums sums{w + call.inputs * kChannels, {}, {}};
  for (std::int64_t i = 0; i < call.inputs * kChannels; ++i) sums.weight[i] = 0.0f;
  PackWeights(call, channel, count, w);
  const float* means = statistics + channel;
  const float* variances = means + StatisticsStreams(batch) * features;
  Norm norm;
  Normalise(call.layer, means, variances, channel, count, &norm);

  for (std::int64_t s = 0; s < batch.streams; ++s) {
    const float* labels = call.labels + s * rows * call.inputs;
    if (batch.training && s > 0) {
      Normalise(call.layer, means + s * features, variances + s * features, channel, count, &norm);
    }
    Products<kGroup>(call, chunk, labels, w, 0, rows, p, z);
    BackwardActivation(call, chunk, norm, grad + s * grad_stride[0], grad_stride[1], z, d,
                       gradients.x, s == 0);
    float constant[kChannels] = {}, slope[kChannels] = {};
    if (norms || (scaled && batch.training)) {
      double plain[kChannels] = {}, moment[kChannels] = {};
      GradientSums(chunk, d, z, norm.mean, rows, plain, moment);
      const double share = 1.0 / static_cast<double>(rows);
      for (std::int64_t u = 0; u < kChannels; ++u) {
        const double inverse = static_cast<double>(norm.inverse[u]);
        const double gain = static_cast<double>(norm.gain[u]) * share;
        sums.norm_weight[u] += moment[u] * inverse;
        sums.norm_bias[u] += plain[u];
        if (two) continue;
        constant[u] = static_cast<float>(gain * plain[u]);
        slope[u] = static_cast<float>(gain * (moment[u] * inverse * inverse));
      }
    }
    if (!scaled) continue;
    if (two) BackwardStatisticsOfTwo(chunk, norm, static_cast<float>(call.layer.eps), d);
    BackwardNorm(call, chunk, norm, constant, slope, p, z, d);
    if (weights) AddWeightGradient(call, chunk, labels, d, sums.weight);
    if (label_sums != nullptr) {
      AddLabelGradient(call, chunk, w, d, label_sums + s * rows * (call.inputs - 1));
    }
  }
  WriteParameters(call, sums, gradients, channel, count);
}

void Backward(const Call& call, const float* grad, const std::int64_t (&grad_stride)[2],
              const float* statistics, const Gradients& gradients, std::int64_t channel,
              std::int64_t count, float* workspace, float* label_sums) {
  if (count == kChannels) {
    BackwardChunk<4>(call, grad, grad_stride, statistics, gradients, {channel, count}, workspace,
                     label_sums);
  } else {
    BackwardChunk<1>(call, grad, grad_stride, statistics, gradients, {channel, count}, workspace,
                     label_sums);
  }
}

}  // namespace

constinit const conditioning::Kernels kConditioningKernels{Forward, Backward};

}  // namespace diffmic::cpu::DIFFMIC_SIMD
