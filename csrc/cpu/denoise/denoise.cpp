// The driver of `denoise`, one step at a time: a block of rows goes through the whole chain before
// the next one. In every step the team of threads evaluates the denoiser, and the last thread to
// arrive at the final barrier advances the chain while the others wait. On each thread:
//
//   Denoise  ->  Evaluation::Sweep  ->  HiddenLayer  ->  Gemm  ->  MicroKernel  ->  MultiplyAdd
#include "cpu/denoise/denoise.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/common/cpu_capabilities.h"
#include "cpu/common/team.h"
#include "cpu/denoise/denoise_chain.h"

namespace diffmic::cpu {

bool Denoise(const DenoiseCall& call, const DenoiseOptions& options) {
  if (call.window > 1) return DenoiseWindows(call, options);
  const StepTable& steps = call.steps;
  const std::int64_t classes = call.weights.classes;
  const std::int64_t blocks =
      call.rows <= kLargestBlock ? 1 : (call.rows + kBlockRows - 1) / kBlockRows;
  Watch watch(options, blocks * steps.count);
  if (call.rows == 0) return true;
  const PreparedModel model(call, options);
  const std::int64_t max_rows = (call.rows + blocks - 1) / blocks;
  Evaluation evaluation(model.view(), options, max_rows, 1);
  const auto size = static_cast<std::size_t>(max_rows * classes);
  std::vector<float> y(size), eps(size), z(size);
  std::vector<const float*> features(static_cast<std::size_t>(max_rows));
  std::vector<const float*> guidance(features.size());
  const std::vector<std::int32_t> slots(features.size(), 0);

  for (std::int64_t block = 0; block < blocks && !watch.stopped(); ++block) {
    const std::int64_t first = block * max_rows;
    const std::int64_t count = std::clamp<std::int64_t>(call.rows - first, 0, max_rows);
    if (count == 0) continue;
    const float* prior = call.prior + first * classes;
    for (std::int64_t row = 0; row < count; ++row) {
      const auto i = static_cast<std::size_t>(row);
      features[i] = call.features + (first + row) * call.features_stride;
      guidance[i] = call.guidance + (first + row) * classes;
    }
    const auto keep = [&](std::int64_t moment) {
      if (call.trajectory == nullptr) return;
      std::copy_n(y.data(), count * classes,
                  call.trajectory + (moment * call.rows + first) * classes);
    };
    Draw(call, 0, first, count, classes, z.data());
    for (std::int64_t j = 0; j < count * classes; ++j) {
      y[static_cast<std::size_t>(j)] = prior[j] + z[static_cast<std::size_t>(j)];
    }
    keep(0);

    bool stop = false;
    Team team;
    team.Run(options.threads, [&](int rank) noexcept {
      for (std::int64_t i = 0; i < steps.count && !stop; ++i) {
        const RowsView rows{count,    features.data(), guidance.data(),
                            y.data(), slots.data(),    steps.timesteps + i,
                            1};
        evaluation.Sweep(team, rank, rows, watch, block * steps.count + i, [&] {
          evaluation.SumShares(count, call.weights.output_bias, eps.data());
          if (steps.sigma()[i] > 0.0f) Draw(call, i + 1, first, count, classes, z.data());
          Move(steps, i, prior, eps.data(), z.data(), count * classes, y.data());
          keep(i + 1);
          if (options.sweeps != nullptr) ++*options.sweeps;
          stop = watch.stopped();
        });
      }
    });
    std::copy_n(y.data(), count * classes, call.out + first * classes);
  }
  watch.Finish();
  return !watch.stopped();
}

namespace {

constexpr IsaEntry<DenoiseKernelTable> kTables[] = {
#if defined(__x86_64__)
    {Isa::kAmx, &amx::kDenoiseKernels},
    {Isa::kAvx512Bf16, &avx512_bf16::kDenoiseKernels},
    {Isa::kAvx512, &avx512::kDenoiseKernels},
    {Isa::kAvx2, &avx2::kDenoiseKernels},
#endif
    {Isa::kPortable, &portable::kDenoiseKernels},
#if defined(__x86_64__)
    {Isa::kAmxEmulated, &amx_emulated::kDenoiseKernels},
#endif
};

}  // namespace

const DenoiseKernels* FindDenoiseKernels(const std::string& name, Precision precision) {
  const DenoiseKernelTable* table = FindKernels(kTables, IsaOf(name));
  if (table == nullptr) return nullptr;
  if (table == &portable::kDenoiseKernels && precision == Precision::kInt8) {
    table = &portable_fused::kDenoiseKernels;
  }
  return *table + static_cast<int>(precision);
}

std::vector<std::string> DenoiseKernelNames() { return IsaNames(kTables); }

}  // namespace diffmic::cpu
