// The kernels of `conditioning`, compiled once an instruction set (conditioning_avx2.cpp and its
// sisters). Nothing here calls an inline function of the standard library: the linker keeps one
// copy of such a function, which may be the one that an older processor cannot run.
//
// A chunk's arrays in scratch are [rows, kUnits], compact, whatever the strides outside: those of
// F = 6144 floats are a multiple of a page, so that all rows of x lie in the same few sets of L1.
// The last chunk of F may be short. Its vectors are read and written in part; lanes that are no
// unit hold zeros, gains included, so that nothing of them is ever more than 0.
#include <cstdint>

#include "cpu/common/simd.h"
#include "cpu/conditioning/conditioning_kernel_table.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

using conditioning::Batch;
using conditioning::Call;
using conditioning::Gradients;
using conditioning::kEvalRows;
using conditioning::kUnits;
using conditioning::Layer;
using conditioning::Running;

static_assert(kUnits % (4 * kLanes) == 0);

// Units [unit, unit + count) in vectors of kLanes, kGroup of them side by side in registers. A
// short chunk goes one vector at a time.
template <int kGroup>
struct Chunk {
  static constexpr bool kWhole = kGroup > 1;
  static constexpr std::int64_t kStep = kGroup * kLanes;

  std::int64_t unit, count;

  std::int64_t end() const { return kWhole ? kUnits : (count + kLanes - 1) / kLanes * kLanes; }
  // Units [u, u + kLanes) of the chunk, from or to a row of F.
  Vec Read(const float* row, std::int64_t u) const {
    if (kWhole || count - u >= kLanes) return Load(row + unit + u);
    return LoadPart(row + unit + u, static_cast<int>(count - u));
  }
  void Write(float* row, std::int64_t u, Vec value) const {
    if (kWhole || count - u >= kLanes) return Store(row + unit + u, value);
    StorePart(row + unit + u, value, static_cast<int>(count - u));
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

// Mean and biased variance of `rows` rows of z, in two passes. kGroup sums run side by side: one
// alone would wait for its last addition.
template <int kGroup>
void Moments(const Chunk<kGroup>& chunk, const float* z, std::int64_t rows, double* mean,
             double* variance) {
  const double share = 1.0 / static_cast<double>(rows);
  for (std::int64_t u = 0; u < chunk.end(); u += kGroup * kHalf) {
    WideVec sum[kGroup] = {}, squares[kGroup] = {};
    for (std::int64_t b = 0; b < rows; ++b) {
      for (int i = 0; i < kGroup; ++i) sum[i] += Widen(z + b * kUnits + u + i * kHalf);
    }
    for (int i = 0; i < kGroup; ++i) sum[i] *= share;
    for (std::int64_t b = 0; b < rows; ++b) {
      for (int i = 0; i < kGroup; ++i) {
        const WideVec distance = Widen(z + b * kUnits + u + i * kHalf) - sum[i];
        squares[i] += distance * distance;
      }
    }
    for (int i = 0; i < kGroup; ++i) {
      StoreWide(mean + u + i * kHalf, sum[i]);
      StoreWide(variance + u + i * kHalf, squares[i] * share);
    }
  }
}

// Sums of d and of d (z - mean) over `rows` rows.
template <int kGroup>
void GradientSums(const Chunk<kGroup>& chunk, const float* d, const float* z, const float* mean,
                  std::int64_t rows, double* sum, double* moment) {
  for (std::int64_t u = 0; u < chunk.end(); u += kGroup * kHalf) {
    WideVec middle[kGroup], plain[kGroup] = {}, weighted[kGroup] = {};
    for (int i = 0; i < kGroup; ++i) middle[i] = Widen(mean + u + i * kHalf);
    for (std::int64_t b = 0; b < rows; ++b) {
      for (int i = 0; i < kGroup; ++i) {
        const std::int64_t at = b * kUnits + u + i * kHalf;
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

// n = (z - mean) gain + shift, of one stream.
struct Norm {
  float mean[kUnits], inverse[kUnits], gain[kUnits], shift[kUnits];
};

void Normalise(const Layer& layer, const float* mean, const float* variance, std::int64_t unit,
               std::int64_t count, Norm* norm) {
  for (std::int64_t u = 0; u < count; ++u) {
    norm->mean[u] = mean[u];
    norm->inverse[u] = 1.0f / __builtin_sqrtf(variance[u] + layer.eps);
    norm->gain[u] = norm->inverse[u] * layer.norm_weight[unit + u];
    norm->shift[u] = layer.norm_bias[unit + u];
  }
  for (std::int64_t u = count; u < kUnits; ++u) {
    norm->mean[u] = norm->inverse[u] = norm->gain[u] = norm->shift[u] = 0.0f;
  }
}

// [inputs, kUnits]: the bias, then the columns of W.
void PackWeights(const Call& call, std::int64_t unit, std::int64_t count, float* w) {
  const Layer& layer = call.layer;
  for (std::int64_t u = 0; u < kUnits; ++u) w[u] = u < count ? layer.bias[unit + u] : 0.0f;
  for (std::int64_t c = 1; c < call.inputs; ++c) {
    const float* column =
        layer.weight + unit * layer.weight_stride[0] + (c - 1) * layer.weight_stride[1];
    for (std::int64_t u = 0; u < kUnits; ++u) {
      w[c * kUnits + u] = u < count ? column[u * layer.weight_stride[0]] : 0.0f;
    }
  }
}

// ---- products

// p = W l + bias and z = gamma p of rows [first, first + rows) of a stream; p may be NULL.
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
          sum[i] = Fma(value, Load(w + c * kUnits + u + i * kLanes), sum[i]);
        }
      }
      for (int i = 0; i < kGroup; ++i) {
        const std::int64_t at = u + i * kLanes;
        if (p != nullptr) Store(p + b * kUnits + at, sum[i]);
        Store(z + b * kUnits + at, chunk.Read(call.gamma[first + b], at) * sum[i]);
      }
    }
  }
}

// gradient [inputs, kUnits] += labels^T d over the rows of a stream; d is that of p.
template <int kGroup>
void AddWeightGradient(const Call& call, const Chunk<kGroup>& chunk, const float* labels,
                       const float* d, float* gradient) {
  for (std::int64_t c = 0; c < call.inputs; ++c) {
    for (std::int64_t u = 0; u < chunk.end(); u += chunk.kStep) {
      float* to = gradient + c * kUnits + u;
      Vec sum[kGroup];
      for (int i = 0; i < kGroup; ++i) sum[i] = Load(to + i * kLanes);
      for (std::int64_t b = 0; b < call.batch.rows; ++b) {
        const Vec value = Set(labels[b * call.inputs + c]);
        for (int i = 0; i < kGroup; ++i) {
          sum[i] = Fma(value, Load(d + b * kUnits + u + i * kLanes), sum[i]);
        }
      }
      for (int i = 0; i < kGroup; ++i) Store(to + i * kLanes, sum[i]);
    }
  }
}

// sums [rows, 2 C] += d W of the chunk's units.
template <int kGroup>
void AddLabelGradient(const Call& call, const Chunk<kGroup>& chunk, const float* w, const float* d,
                      float* sums) {
  for (std::int64_t b = 0; b < call.batch.rows; ++b) {
    for (std::int64_t c = 1; c < call.inputs; ++c) {
      Vec sum = Zero();
      for (std::int64_t u = 0; u < chunk.end(); u += kLanes) {
        sum = Fma(Load(d + b * kUnits + u), Load(w + c * kUnits + u), sum);
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
      const Vec n = Fma(Load(z + b * kUnits + u) - Load(norm.mean + u), Load(norm.gain + u),
                        Load(norm.shift + u));
      chunk.Write(to, u, chunk.Read(x, u) * Softplus(n));
    }
  }
}

// The running statistics behind one more stream, rounded to float each time as BatchNorm does.
void Update(const Running& running, const double* mean, const double* variance, std::int64_t rows,
            bool first, std::int64_t unit, std::int64_t count) {
  const double unbiased = static_cast<double>(rows) / static_cast<double>(rows - 1);
  const double old = 1.0 - running.momentum;
  const float* from_mean = first ? running.mean : running.updated_mean;
  const float* from_variance = first ? running.variance : running.updated_variance;
  for (std::int64_t u = 0; u < count; ++u) {
    const double m = old * static_cast<double>(from_mean[unit + u]) + running.momentum * mean[u];
    const double v = old * static_cast<double>(from_variance[unit + u]) +
                     running.momentum * (variance[u] * unbiased);
    running.updated_mean[unit + u] = static_cast<float>(m);
    running.updated_variance[unit + u] = static_cast<float>(v);
  }
}

template <int kGroup>
void ForwardChunk(const Call& call, const Running& running, const Chunk<kGroup>& chunk,
                  float* scratch, float* statistics, float* out) {
  const Batch& batch = call.batch;
  const std::int64_t features = call.layer.features;
  const std::int64_t unit = chunk.unit, count = chunk.count;
  float* w = scratch;
  float* z = scratch + call.inputs * kUnits;
  PackWeights(call, unit, count, w);
  float* means = statistics + unit;
  float* variances = means + StatisticsStreams(batch) * features;
  Norm norm;
  if (!batch.training) {
    for (std::int64_t u = 0; u < count; ++u) {
      means[u] = running.mean[unit + u];
      variances[u] = running.variance[unit + u];
    }
    Normalise(call.layer, means, variances, unit, count, &norm);
  }
  const std::int64_t step = batch.training ? batch.rows : kEvalRows;
  for (std::int64_t s = 0; s < batch.streams; ++s) {
    const float* labels = call.labels + s * batch.rows * call.inputs;
    float* to = out + s * batch.rows * features;
    for (std::int64_t first = 0; first < batch.rows; first += step) {
      const std::int64_t left = batch.rows - first, rows = left < step ? left : step;
      Products<kGroup>(call, chunk, labels, w, first, rows, nullptr, z);
      if (batch.training) {
        double mean[kUnits], variance[kUnits];
        Moments(chunk, z, rows, mean, variance);
        Update(running, mean, variance, rows, s == 0, unit, count);
        for (std::int64_t u = 0; u < count; ++u) {
          means[s * features + u] = static_cast<float>(mean[u]);
          variances[s * features + u] = static_cast<float>(variance[u]);
        }
        Normalise(call.layer, means + s * features, variances + s * features, unit, count, &norm);
      }
      Activate(call, chunk, norm, z, first, rows, to);
    }
  }
}

void Forward(const Call& call, const Running& running, std::int64_t unit, std::int64_t count,
             float* scratch, float* statistics, float* out) {
  if (count == kUnits) {
    ForwardChunk<4>(call, running, {unit, count}, scratch, statistics, out);
  } else {
    ForwardChunk<1>(call, running, {unit, count}, scratch, statistics, out);
  }
}

// ---- backward

// 1 / (1 + exp(-n)), given e = exp(-|n|): 1 or e, by the sign of n, over 1 + e. The product is far
// beyond 1 on its side of 0 as soon as e is not 1. Not-a-number stays so, through e.
inline Vec Sigmoid(Vec n, Vec e) {
  const Vec negative_step = Max(Set(-1.0f), n * Set(-3e38f));
  return Max(Zero() - negative_step, e) / (Set(1.0f) + e);
}

// From grad, that of h1: d = that of n, and, where wanted, x's.
template <int kGroup>
void Descend(const Call& call, const Chunk<kGroup>& chunk, const Norm& norm, const float* grad,
             std::int64_t grad_stride, const float* z, float* d, float* x_gradient, bool first) {
  const Batch& batch = call.batch;
  for (std::int64_t b = 0; b < batch.rows; ++b) {
    const float* x = batch.x + b * batch.x_stride;
    const float* from = grad + b * grad_stride;
    for (std::int64_t u = 0; u < chunk.end(); u += kLanes) {
      const Vec n = Fma(Load(z + b * kUnits + u) - Load(norm.mean + u), Load(norm.gain + u),
                        Load(norm.shift + u));
      const Vec e = ExpOfNegative(NegativeAbs(n));
      const Vec g = chunk.Read(from, u);
      Store(d + b * kUnits + u, g * chunk.Read(x, u) * Sigmoid(n, e));
      if (x_gradient != nullptr) {
        float* to = x_gradient + b * call.layer.features;
        const Vec share = g * (Max(Zero(), n) + Log1p(e));
        chunk.Write(to, u, first ? share : chunk.Read(to, u) + share);
      }
    }
  }
}

// d, the gradient of n, becomes that of p; gamma's is added to its rows. What the batch's own
// statistics give back is constant + slope (z - mean).
template <int kGroup>
void ThroughNorm(const Call& call, const Chunk<kGroup>& chunk, const Norm& norm,
                 const float* constant, const float* slope, const float* p, const float* z,
                 float* d) {
  for (std::int64_t b = 0; b < call.batch.rows; ++b) {
    const float* gamma = call.gamma[b];
    for (std::int64_t u = 0; u < chunk.end(); u += kLanes) {
      const std::int64_t at = b * kUnits + u;
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

// d, the gradient of n, becomes d less what the batch's statistics take from it, where the batch
// has two rows: n is the same of both but for its sign, and the gradient of a row is
//   d - mean(d) - n mean(d n) = (d - mean(d)) eps / (variance + eps).
// As a difference it would be the rounding of terms that are (variance + eps) / eps times as large.
template <int kGroup>
void ThroughStatisticsOfTwo(const Chunk<kGroup>& chunk, const Norm& norm, float eps, float* d) {
  const Vec half = Set(0.5f * eps);
  for (std::int64_t u = 0; u < chunk.end(); u += kLanes) {
    const Vec inverse = Load(norm.inverse + u);
    const Vec part = (Load(d + u) - Load(d + kUnits + u)) * (half * inverse * inverse);
    Store(d + u, part);
    Store(d + kUnits + u, Zero() - part);
  }
}

// The gradients of a chunk's own parameters, summed over the streams.
struct ParameterSums {
  float* weight;  // [inputs, kUnits]
  double norm_weight[kUnits], norm_bias[kUnits];
};

void WriteParameters(const Call& call, const ParameterSums& sums, const Gradients& gradients,
                     std::int64_t unit, std::int64_t count) {
  const std::int64_t width = call.inputs - 1;
  for (std::int64_t u = 0; u < count; ++u) {
    if (gradients.norm_weight != nullptr) {
      gradients.norm_weight[unit + u] = static_cast<float>(sums.norm_weight[u]);
    }
    if (gradients.norm_bias != nullptr) {
      gradients.norm_bias[unit + u] = static_cast<float>(sums.norm_bias[u]);
    }
    if (gradients.bias != nullptr) gradients.bias[unit + u] = sums.weight[u];
    if (gradients.weight == nullptr) continue;
    for (std::int64_t c = 0; c < width; ++c) {
      gradients.weight[(unit + u) * width + c] = sums.weight[(c + 1) * kUnits + u];
    }
  }
}

template <int kGroup>
void BackwardChunk(const Call& call, const float* grad, const std::int64_t (&grad_stride)[2],
                   const float* statistics, const Gradients& gradients, const Chunk<kGroup>& chunk,
                   float* scratch, float* label_sums) {
  const Batch& batch = call.batch;
  const std::int64_t features = call.layer.features, rows = batch.rows;
  const std::int64_t unit = chunk.unit, count = chunk.count;
  const bool weights = gradients.weight != nullptr || gradients.bias != nullptr;
  const bool scaled = weights || label_sums != nullptr || call.gamma_gradient != nullptr;
  const bool two = batch.training && rows == 2;
  const bool norms = gradients.norm_weight != nullptr || gradients.norm_bias != nullptr;

  float* w = scratch;
  float* p = w + 2 * call.inputs * kUnits;
  float* z = p + rows * kUnits;
  float* d = z + rows * kUnits;
  ParameterSums sums{w + call.inputs * kUnits, {}, {}};
  for (std::int64_t i = 0; i < call.inputs * kUnits; ++i) sums.weight[i] = 0.0f;
  PackWeights(call, unit, count, w);
  const float* means = statistics + unit;
  const float* variances = means + StatisticsStreams(batch) * features;
  Norm norm;
  Normalise(call.layer, means, variances, unit, count, &norm);

  for (std::int64_t s = 0; s < batch.streams; ++s) {
    const float* labels = call.labels + s * rows * call.inputs;
    if (batch.training && s > 0) {
      Normalise(call.layer, means + s * features, variances + s * features, unit, count, &norm);
    }
    Products<kGroup>(call, chunk, labels, w, 0, rows, p, z);
    Descend(call, chunk, norm, grad + s * grad_stride[0], grad_stride[1], z, d, gradients.x,
            s == 0);
    float constant[kUnits] = {}, slope[kUnits] = {};
    if (norms || (scaled && batch.training)) {
      double plain[kUnits] = {}, moment[kUnits] = {};
      GradientSums(chunk, d, z, norm.mean, rows, plain, moment);
      const double share = 1.0 / static_cast<double>(rows);
      for (std::int64_t u = 0; u < kUnits; ++u) {
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
    if (two) ThroughStatisticsOfTwo(chunk, norm, call.layer.eps, d);
    ThroughNorm(call, chunk, norm, constant, slope, p, z, d);
    if (weights) AddWeightGradient(call, chunk, labels, d, sums.weight);
    if (label_sums != nullptr) {
      AddLabelGradient(call, chunk, w, d, label_sums + s * rows * (call.inputs - 1));
    }
  }
  WriteParameters(call, sums, gradients, unit, count);
}

void Backward(const Call& call, const float* grad, const std::int64_t (&grad_stride)[2],
              const float* statistics, const Gradients& gradients, std::int64_t unit,
              std::int64_t count, float* scratch, float* label_sums) {
  if (count == kUnits) {
    BackwardChunk<4>(call, grad, grad_stride, statistics, gradients, {unit, count}, scratch,
                     label_sums);
  } else {
    BackwardChunk<1>(call, grad, grad_stride, statistics, gradients, {unit, count}, scratch,
                     label_sums);
  }
}

constexpr conditioning::Kernels kConditioningKernels{DIFFMIC_SIMD_NAME, Forward, Backward};

}  // namespace

}  // namespace diffmic::cpu::DIFFMIC_SIMD
