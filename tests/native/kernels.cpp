// `denoise`, `rois` and the noise.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "cpu/common/noise.h"
#include "cpu/denoise/denoise.h"
#include "cpu/rois/rois.h"
#include "support.h"

namespace {

using diffmic::DenoiseCall;
using diffmic::DenoiserWeights;
using diffmic::Precision;
using diffmic::StepTable;
using diffmic::cpu::DenoiseOptions;

struct Model {
  Model(std::int64_t features, std::int64_t classes, std::int64_t timesteps) {
    const auto make = [&](std::int64_t count, float low, float high) {
      memory.emplace_back(count, low, high);
      return memory.back().get();
    };
    weights.features = features;
    weights.classes = classes;
    for (int i = 0; i < 3; ++i) {
      const std::int64_t width = i == 0 ? 2 * classes : features;
      const float scale = 1.0f / std::sqrt(static_cast<float>(width));
      weights.layers[i] = {make(features * width, -scale, scale),
                           {width, 1},
                           make(features, -0.1f, 0.1f),
                           make(timesteps * features, 0.0f, 1.0f),
                           timesteps,
                           features,
                           make(features, 0.5f, 1.5f),
                           make(features, -0.1f, 0.1f),
                           make(features, -0.1f, 0.1f),
                           make(features, 0.5f, 1.5f),
                           1e-5};
    }
    weights.output_weight = make(classes * features, -0.1f, 0.1f);
    weights.output_stride = features;
    weights.output_bias = make(classes, -0.1f, 0.1f);
  }

  std::vector<Numbers> memory;
  DenoiserWeights weights{};
};

void CheckDenoise(const std::string& set, Precision precision, std::int64_t rows,
                  std::int64_t features, std::int64_t classes,
                  const std::vector<int>& thread_counts) {
  constexpr std::int64_t kSteps = 7;
  const Model model(features, classes, kSteps + 1);
  std::vector<std::int64_t> timesteps, images, samples;
  for (std::int64_t i = 0; i < kSteps; ++i) timesteps.push_back(kSteps - 1 - i);
  for (std::int64_t row = 0; row < rows; ++row) {
    images.push_back(row * 1'000'003);
    samples.push_back(row % 3);
  }
  std::vector<float> coefficients;
  for (const auto& [low, high] : std::initializer_list<std::pair<float, float>>{{0.6f, 0.95f},
                                                                                {0.3f, 0.7f},
                                                                                {0.1f, 0.3f},
                                                                                {0.4f, 0.7f},
                                                                                {0.0f, 0.2f},
                                                                                {0.0f, 0.1f},
                                                                                {0.01f, 0.1f}}) {
    const std::vector<float> column = Numbers(kSteps, low, high).copy();
    coefficients.insert(coefficients.end(), column.begin(), column.end());
  }
  const StepTable steps{kSteps, timesteps.data(), coefficients.data(), kSteps};
  const Numbers x(rows * features, -1.0f, 1.0f), prior(rows * classes, 0.0f, 1.0f),
      guidance(rows * classes, 0.0f, 1.0f);
  diffmic::cpu::WeightCache cache;
  const auto run = [&](const std::string& with, std::int64_t window, int threads) {
    const Numbers out(rows * classes, 0.0f, 0.0f);
    const Numbers states((kSteps + 1) * rows * classes, 0.0f, 0.0f);
    DenoiseCall call{};
    call.weights = model.weights;
    call.steps = steps;
    call.rows = rows;
    call.features = x.get();
    call.features_stride = features;
    call.prior = prior.get();
    call.guidance = guidance.get();
    call.seed = 5;
    call.image_ids = images.data();
    call.sample_ids = samples.data();
    call.out = out.get();
    call.trajectory = states.get();
    call.precision = precision;
    call.window = window;
    DenoiseOptions options;
    options.kernels = diffmic::cpu::FindDenoiseKernels(with, precision);
    options.threads = threads;
    options.cache = threads == 2 ? nullptr : &cache;
    options.watch = [](std::int64_t, std::int64_t) { return true; };
    if (!Denoise(call, options)) Fail("denoise stopped without a request");
    return out.copy();
  };
  const std::vector<float> first = run(set, 1, 1);
  Request::Record(first);
  for (const std::int64_t window : {1, 5}) {
    for (const int threads : thread_counts) {
      const std::vector<float> found = run(set, window, threads);
      if (std::memcmp(first.data(), found.data(), first.size() * sizeof(float)) != 0) {
        Fail("denoise: " + set + " with " + std::to_string(threads) + " threads and a window of " +
             std::to_string(window) + " differs");
      }
    }
  }
  // int8 sums are exact. Otherwise instruction sets sum in different orders, and a rounding of an
  // activation may differ.
  const float allowed = precision == Precision::kFloat32    ? 1e-4f
                        : precision == Precision::kBFloat16 ? 1e-2f
                                                            : 0.0f;
  const std::vector<float> portable = run("portable", 1, 1);
  for (std::size_t i = 0; i < first.size(); ++i) {
    const float difference = std::abs(first[i] - portable[i]);
    if (!(difference <= allowed * (1.0f + std::abs(portable[i])))) {
      Fail("denoise: " + set + " is " + std::to_string(difference) + " from portable");
    }
  }
}

// The int8 compensation at the largest number of features, where it exceeds int32.
void CheckPacking(const std::string& set) {
  constexpr std::int64_t kFeatures = diffmic::cpu::kMostInt8Features;
  const auto* kernels = diffmic::cpu::FindDenoiseKernels(set, Precision::kInt8);
  const std::vector<float> ones(kFeatures, 1.0f);
  std::vector<std::byte> chunk(static_cast<std::size_t>(kernels->chunk_bytes(kFeatures)));
  float scale = 0.0f;
  kernels->pack_chunk(ones.data(), kFeatures, 1, kFeatures, chunk.data(), &scale);
  if (scale != 1.0f / 127.0f) Fail("denoise: " + set + " packs a wrong scale");
}

void CheckStop() {
  const Model model(64, 3, 3);
  const std::vector<std::int64_t> timesteps{1, 0}, keys(400, 0);
  const Numbers coefficients(7 * 2, 0.5f, 0.6f), x(400 * 64, -1.0f, 1.0f),
      labels(400 * 3, 0.0f, 1.0f);
  const Numbers out(400 * 3, 0.0f, 0.0f);
  DenoiseCall call{};
  call.weights = model.weights;
  call.steps = {2, timesteps.data(), coefficients.get(), 2};
  call.rows = 400;
  call.features = x.get();
  call.features_stride = 64;
  call.prior = call.guidance = labels.get();
  call.seed = 1;
  call.image_ids = call.sample_ids = keys.data();
  call.out = out.get();
  call.window = 1;
  DenoiseOptions options;
  options.kernels = diffmic::cpu::FindDenoiseKernels("auto", Precision::kFloat32);
  options.threads = 3;
  int asked = 0;
  options.watch = [&asked](std::int64_t done, std::int64_t total) {
    ++asked;
    return done < total;
  };
  if (Denoise(call, options)) Fail("denoise continued after a stop");
  if (asked == 0) Fail("denoise did not call watch");
}

void CheckRois() {
  constexpr std::int64_t kBatch = 5, kClasses = 3, kSide = 9, kCount = 4;
  const Numbers saliency(kBatch * kClasses * 7 * 6, -1.0f, 1.0f);
  const Numbers images(kBatch * 2 * kSide * kSide, 0.0f, 1.0f);
  std::vector<float> first;
  for (const int threads : {1, 3}) {
    std::vector<std::int64_t> cells(kBatch * kCount * 2), origins(cells.size());
    const diffmic::rois::Maps maps{saliency.get(),           kBatch, kClasses, 7, 6,
                                   {kClasses * 42, 42, 6, 1}};
    const auto type = diffmic::rois::Type::kFloat32;
    if (diffmic::cpu::ChooseWindows({maps, type, {3, 2}, kCount, cells.data()}, threads) >= 0) {
      Fail("rois reports finite saliency as not finite");
    }
    diffmic::cpu::CellsToPixels(cells.data(), kBatch * kCount, {7, 6}, {kSide, kSide},
                                origins.data());
    const diffmic::rois::Maps pixels{
        images.get(), kBatch, 2, kSide, kSide, {2 * kSide * kSide, kSide * kSide, kSide, 1}};
    const Numbers crops(kBatch * kCount * 2 * 5 * 6, 0.0f, 0.0f);
    const diffmic::rois::Cut cut{{origins.data(), {kCount * 2, 2, 1}}, kCount, {5, 6}, 1};
    diffmic::cpu::CutCrops({pixels, type, cut, crops.get()}, threads);
    const std::vector<float> found(crops.get(), crops.get() + kBatch * kCount * 60);
    if (first.empty()) first = found;
    if (found != first) Fail("rois: the result depends on the number of threads");
  }
}

void CheckNoise() {
  const std::vector<std::int64_t> images(1'100, 3), samples(1'100, 1), timesteps{0, 9};
  std::vector<float> first;
  for (const int threads : {1, 4}) {
    const Numbers out(2 * 1'100 * 7, 0.0f, 0.0f);
    diffmic::cpu::PhiloxNormal(1, {images.data(), 1'100, 1}, {samples.data(), 1'100, 1},
                               {timesteps.data(), 2, 1}, 7, out.get(), threads);
    const std::vector<float> found(out.get(), out.get() + 2 * 1'100 * 7);
    if (first.empty()) first = found;
    if (found != first) Fail("noise: the result depends on the number of threads");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Request request(argc, argv, diffmic::cpu::DenoiseKernelNames());
  struct Size {
    std::int64_t rows, features, classes;
  };
  std::vector<Size> sizes{{1, 1030, 2}, {5, 71, 3}, {13, 129, 2}, {40, 97, 2}};
  if (!request.quick()) {
    sizes.insert(sizes.end(), {{1, 1, 1}, {1, 71, 5}, {7, 33, 3}, {66, 37, 2}});
    sizes.insert(sizes.end(), {{195, 40, 4}, {8, 1030, 3}});
  }
  const std::vector<int> threads = request.quick() ? std::vector{1, 2} : std::vector{1, 2, 4};
  for (const std::string& set : request.sets()) {
    CheckPacking(set);
    for (const Precision precision :
         {Precision::kFloat32, Precision::kBFloat16, Precision::kInt8}) {
      for (const Size& size : sizes) {
        CheckDenoise(set, precision, size.rows, size.features, size.classes, threads);
      }
    }
  }
  request.CheckNames("denoise", [](const std::string& name) {
    return diffmic::cpu::FindDenoiseKernels(name, Precision::kInt8) != nullptr;
  });
  CheckStop();
  CheckRois();
  CheckNoise();
  request.Finish("kernels");
}
