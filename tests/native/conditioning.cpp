// `conditioning` in training and evaluation mode, with full and partial chunks, each gradient
// separately and all gradients; results are compared with a scalar implementation in double.
#include "cpu/conditioning/conditioning.h"

#include "support.h"

namespace {

namespace kernel = diffmic::cpu::conditioning;

struct Size {
  std::int64_t streams, rows, features, classes;
};

// Arguments with kGap elements between rows, and labels with the classes outermost.
struct Case {
  static constexpr std::int64_t kGap = 3, kTimesteps = 5;

  Case(const Size& s, bool training, bool one_timestep)
      : size(s),
        x((s.rows - 1) * (s.features + kGap) + s.features, -1, 1),
        y(s.streams * s.rows * s.classes, -1, 1),
        guidance(s.streams * s.rows * s.classes, 0, 1),
        grad((s.streams * s.rows - 1) * (s.features + kGap) + s.features, -1, 1),
        weight(s.features * 2 * s.classes, -0.5, 0.5),
        bias(s.features, -0.5, 0.5),
        gamma((kTimesteps - 1) * (s.features + kGap) + s.features, 0, 1),
        norm_weight(s.features, 0.5, 1.5),
        norm_bias(s.features, -0.5, 0.5),
        running_mean(s.features, -0.5, 0.5),
        running_variance(s.features, 0.5, 1.5) {
    const std::int64_t stride = s.features + kGap, labels = s.streams * s.rows;
    for (std::int64_t b = 0; b < (one_timestep ? 1 : s.rows); ++b) {
      timesteps.push_back(b * 3 % kTimesteps);
    }
    layer = {{weight.get(),
              {1, s.features},
              bias.get(),
              gamma.get(),
              kTimesteps,
              stride,
              norm_weight.get(),
              norm_bias.get(),
              running_mean.get(),
              running_variance.get(),
              1e-5},
             s.features,
             s.classes};
    batch = {s.streams,
             s.rows,
             x.get(),
             stride,
             {y.get(), {s.rows, 1, labels}},
             {guidance.get(), {s.rows, 1, labels}},
             timesteps.data(),
             one_timestep ? 0 : 1,
             training};
  }

  Size size;
  Numbers x, y, guidance, grad, weight, bias, gamma, norm_weight, norm_bias, running_mean,
      running_variance;
  std::vector<std::int64_t> timesteps;
  kernel::Layer layer{};
  kernel::Batch batch{};
};

// Bit i of `wanted` requests gradient i.
std::vector<float> Run(const Case& c, const kernel::Options& options, unsigned wanted) {
  const Size& s = c.size;
  const std::int64_t streams = StatisticsStreams(c.batch), f = s.features;
  const std::int64_t rows = s.streams * s.rows;
  const Numbers statistics(2 * streams * f, 0, 0), out(rows * f, 0, 0);
  const Numbers mean(f, 0, 0), variance(f, 0, 0);
  const bool training = c.batch.training;
  const kernel::Running running{c.running_mean.get(), c.running_variance.get(),
                                training ? mean.get() : nullptr,
                                training ? variance.get() : nullptr, 0.1};
  kernel::Forward({c.layer, c.batch, {}, running, statistics.get(), out.get()}, options);

  const std::int64_t counts[] = {
      s.rows * f, rows * s.classes, rows * s.classes, f * 2 * s.classes, f, Case::kTimesteps * f, f,
      f};
  std::vector<Numbers> gradients;
  float* to[8];
  for (unsigned i = 0; i < 8; ++i) {
    gradients.emplace_back((wanted >> i & 1) != 0 ? counts[i] : 0, 0, 0);
    to[i] = (wanted >> i & 1) != 0 ? gradients.back().get() : nullptr;
  }
  const std::int64_t stride = f + Case::kGap;
  kernel::Backward({c.layer,
                    c.batch,
                    c.grad.get(),
                    {s.rows * stride, stride},
                    statistics.get(),
                    {to[0], to[1], to[2], to[3], to[4], to[5], to[6], to[7]}},
                   options);
  std::vector<float> all = out.copy();
  for (const Numbers* part : {&statistics, &mean, &variance}) {
    const std::vector<float> values = part->copy();
    all.insert(all.end(), values.begin(), values.end());
  }
  for (const Numbers& part : gradients) {
    const std::vector<float> values = part.copy();
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

// Noisy labels from drawn noise, and from the same noise as an argument, against the plain call
// with these labels.
void CheckNoised(const Case& c, const kernel::Options& options) {
  const Size& s = c.size;
  const std::int64_t f = s.features, rows = s.streams * s.rows;
  const Numbers y_0(s.rows * s.classes, 0, 1), a(Case::kTimesteps, 0, 1), d(Case::kTimesteps, 0, 1);
  const Numbers drawn(s.rows * s.classes, 0, 0);
  std::vector<std::int64_t> samples(static_cast<std::size_t>(s.rows), 7);
  const kernel::Running running{c.running_mean.get(), c.running_variance.get(), nullptr, nullptr,
                                0.1};
  std::vector<std::vector<float>> found;
  for (const bool given : {false, true}) {
    const Numbers y(rows * s.classes, 0, 0), statistics(2 * f, 0, 0);
    const Numbers out(rows * f, 0, 0), plain(rows * f, 0, 0);
    diffmic::Noising noising{};
    noising.y_0 = y_0.get();
    noising.y_0_stride[0] = 1;
    noising.y_0_stride[1] = s.rows;
    noising.sqrt_alpha_bar = a.get();
    noising.sqrt_one_minus_alpha_bar = d.get();
    noising.timesteps = Case::kTimesteps;
    noising.seed = 5;
    noising.samples = samples.data();
    noising.given = given ? drawn.get() : nullptr;
    noising.drawn = given ? nullptr : drawn.get();
    noising.y = y.get();
    kernel::Batch batch = c.batch;
    batch.y = {y.get(), {s.rows * s.classes, s.classes, 1}};
    kernel::Forward({c.layer, batch, noising, running, statistics.get(), out.get()}, options);
    kernel::Forward({c.layer, batch, {}, running, statistics.get(), plain.get()}, options);
    if (out.copy() != plain.copy())
      Fail("conditioning: the noisy labels written are not those used");
    found.push_back(y.copy());
  }
  if (found[0] != found[1]) Fail("conditioning: the noise drawn is not that written");
}

// Forward of output channel f and branch s, by definition.
std::vector<double> Define(const Case& c, std::int64_t s, std::int64_t f) {
  const Size& size = c.size;
  std::vector<double> z;
  double mean = 0, variance = 0;
  for (std::int64_t b = 0; b < size.rows; ++b) {
    double p = static_cast<double>(c.bias.get()[f]);
    for (std::int64_t j = 0; j < 2 * size.classes; ++j) {
      const std::int64_t k = j % size.classes, stride = size.streams * size.rows;
      const float* labels = j < size.classes ? c.y.get() : c.guidance.get();
      p += static_cast<double>(labels[s * size.rows + b + k * stride]) *
           static_cast<double>(c.weight.get()[j * size.features + f]);
    }
    const std::int64_t t = c.timesteps[static_cast<std::size_t>(b * c.batch.timestep_stride)];
    z.push_back(p * static_cast<double>(c.gamma.get()[t * c.layer.gamma_stride + f]));
    mean += z.back() / static_cast<double>(size.rows);
  }
  for (const double value : z) {
    variance += (value - mean) * (value - mean) / static_cast<double>(size.rows);
  }
  if (!c.batch.training) {
    mean = static_cast<double>(c.running_mean.get()[f]);
    variance = static_cast<double>(c.running_variance.get()[f]);
  }
  std::vector<double> out;
  for (std::int64_t b = 0; b < size.rows; ++b) {
    const double n = (z[static_cast<std::size_t>(b)] - mean) / std::sqrt(variance + 1e-5) *
                         static_cast<double>(c.norm_weight.get()[f]) +
                     static_cast<double>(c.norm_bias.get()[f]);
    out.push_back(static_cast<double>(c.x.get()[b * c.batch.x_stride + f]) *
                  std::log1p(std::exp(n)));
  }
  return out;
}

void CheckValues(const Case& c, const kernel::Options& options) {
  const Size& size = c.size;
  const std::vector<float> found = Run(c, options, 0);
  for (std::int64_t s = 0; s < size.streams; ++s) {
    for (std::int64_t f = 0; f < size.features; ++f) {
      const std::vector<double> expected = Define(c, s, f);
      for (std::int64_t b = 0; b < size.rows; ++b) {
        const auto at = static_cast<std::size_t>((s * size.rows + b) * size.features + f);
        const double value = expected[static_cast<std::size_t>(b)];
        if (std::abs(static_cast<double>(found[at]) - value) > 1e-4 * (1 + std::abs(value))) {
          Fail("conditioning: the values differ from their definition");
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Request request(argc, argv, kernel::KernelNames());
  std::vector<Size> sizes{{1, 2, 1, 1}, {2, 33, 129, 3}, {3, 7, 64, 2}};
  if (!request.quick()) sizes.insert(sizes.end(), {{3, 20, 2500, 5}, {1, 5, 2100, 7}});
  for (const std::string& name : request.sets()) {
    const kernel::Kernels* kernels = kernel::FindKernels(name);
    for (const bool training : {false, true}) {
      for (const Size& size : sizes) {
        const Case c(size, training, size.streams == 2);
        Trace<float> trace("conditioning, " + name);
        for (const int threads : {1, 2, 4}) {
          trace.Compare(Run(c, {kernels, threads}, 0xFF), threads);
        }
      }
      const Case c({2, 3, 71, 2}, training, false);
      CheckValues(c, {kernels, 1});
      CheckValues(Case({3, 35, 130, 4}, training, true), {kernels, 1});
      for (unsigned wanted : {0x00u, 0x01u, 0x02u, 0x04u, 0x08u, 0x10u, 0x20u, 0x40u, 0x80u}) {
        Run(c, {kernels, 2}, wanted);
      }
    }
    CheckNoised(Case({3, 35, 130, 7}, false, false), {kernels, 2});
    const Case empty({2, 1, 71, 2}, false, false);
    kernel::Batch none = empty.batch;
    none.rows = 0;
    const Numbers statistics(2 * 71, 0, 0);
    const kernel::Running running{empty.running_mean.get(), empty.running_variance.get(), nullptr,
                                  nullptr, 0.1};
    kernel::Forward({empty.layer, none, {}, running, statistics.get(), nullptr}, {kernels, 2});
  }
  request.CheckNames("conditioning",
                     [](const std::string& name) { return kernel::FindKernels(name) != nullptr; });
  request.Finish("conditioning");
}
