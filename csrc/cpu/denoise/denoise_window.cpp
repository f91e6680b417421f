// The driver of `denoise` for several timesteps at once (docs/algorithm.md, "Windows of steps";
// Shih et al., "Parallel Sampling of Diffusion Models", NeurIPS 2023). A single row is bound by
// reading the weights once per step; here a sweep reads them once for a window of steps:
//
//   1. guess the states of the steps in the window
//   2. evaluate eps at all of them, each at its own timestep: the rows of one sweep
//   3. from the first state, which is exact, walk through the window with these eps
//   4. as long as the walk reaches the state at which eps was evaluated, the next state is exact
//      too: slide the window past them. The other states of the walk are the next guess.
//
// States are compared bitwise, unless the caller allows a tolerance. The evaluation is
// batch-invariant and the walk does the arithmetic of the sequential chain, so the result is
// bitwise that of the sequential chain for any windows, even ones chosen by timing. The first step
// of a window is always exact, so n steps take at most n sweeps, and a window that does not pay off
// shrinks to one step.
//
// The last bits are expensive: a state that differs in one of them is evaluated with other
// roundings. With a tolerance, states that moved by no more than it since the previous sweep count
// as converged. The window is then fixed, so that the result depends on the arguments alone.
//
// Rows of one sweep: the windows of up to kWindowRows chains, one after another.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/common/team.h"
#include "cpu/denoise/denoise.h"
#include "cpu/denoise/denoise_chain.h"

namespace diffmic::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// The most chains of a sweep. With more rows, one step of each keeps the processor busy.
constexpr std::int64_t kWindowRows = 16;

// Initial rows of a sweep: few, since too small a window costs less than too large a one.
constexpr std::int64_t kFirstRows = 4;

// One chain and the current guess of its states.
class Path {
 public:
  Path(const DenoiseCall& call, std::int64_t row)
      : steps_(call.steps),
        tolerance_(call.tolerance),
        row_(row),
        classes_(call.weights.classes),
        prior_(call.prior + row * classes_),
        states_(static_cast<std::size_t>((steps_.count + 1) * classes_)),
        noise_(states_.size()),
        guess_(static_cast<std::size_t>(classes_)) {
    last_eps_.reserve(guess_.size());  // no allocation in the team of threads
    for (std::int64_t moment = 0; moment <= steps_.count; ++moment) {
      if (moment > 0 && !(steps_.sigma()[moment - 1] > 0.0f)) continue;
      Draw(call, moment, row, 1, classes_, noise_.data() + moment * classes_);
    }
    for (std::int64_t c = 0; c < classes_; ++c) at(0)[c] = prior_[c] + noise_[c];
  }

  std::int64_t row() const { return row_; }
  std::int64_t begin() const { return begin_; }
  std::int64_t end() const { return end_; }
  bool done() const { return begin_ == steps_.count; }
  const float* state(std::int64_t i) const { return states_.data() + i * classes_; }

  // Opens the steps [begin, begin + window). States that were in no window before are guessed with
  // the last eps.
  void Open(std::int64_t window) {
    const std::int64_t end = std::min(begin_ + window, steps_.count);
    for (std::int64_t i = std::max(known_, begin_ + 1); i < end; ++i) {
      if (last_eps_.empty()) {
        std::copy_n(state(i - 1), classes_, at(i));
      } else {
        Walk(i - 1, last_eps_.data());
      }
    }
    known_ = std::max(known_, end);
    end_ = end;
  }

  // Walks with eps [end - begin, classes] of the window's states. Returns the steps slid past.
  std::int64_t Take(const float* eps) {
    const std::int64_t first = begin_;
    bool exact = true;
    for (std::int64_t i = begin_; i < end_; ++i) {
      // state(i) is the walk's, guess_ the one at which eps was evaluated.
      if (i > first) exact = exact && Same(state(i), guess_.data());
      if (exact) begin_ = i + 1;
      guess_.assign(state(i + 1), state(i + 1) + classes_);
      Walk(i, eps + (i - first) * classes_);
    }
    last_eps_.assign(eps + (end_ - 1 - first) * classes_, eps + (end_ - first) * classes_);
    known_ = end_ + 1;
    return begin_ - first;
  }

 private:
  float* at(std::int64_t i) { return states_.data() + i * classes_; }

  void Walk(std::int64_t i, const float* eps) {
    std::copy_n(state(i), classes_, at(i + 1));
    Move(steps_, i, prior_, eps, noise_.data() + (i + 1) * classes_, classes_, at(i + 1));
  }

  bool Same(const float* a, const float* b) const {
    if (std::memcmp(a, b, static_cast<std::size_t>(classes_) * sizeof(float)) == 0) return true;
    return tolerance_ > 0.0f && std::equal(a, a + classes_, b, [&](float x, float y) {
             return std::abs(x - y) <= tolerance_;
           });
  }

  const StepTable& steps_;
  float tolerance_;
  std::int64_t row_, classes_;
  const float* prior_;
  std::vector<float> states_, noise_, guess_, last_eps_;
  std::int64_t begin_ = 0;  // states up to this one are exact
  std::int64_t end_ = 0;    // past the last step evaluated
  std::int64_t known_ = 1;  // states below this one are set, exact or guessed
};

// The window with the most steps per second: tries the next larger or smaller power of two for a
// few sweeps, keeps it if that was faster, and tries again at growing intervals.
class WindowSize {
 public:
  WindowSize(std::int64_t first, std::int64_t most) : most_(most) {
    while (2 * size_ <= std::min(first, most)) size_ *= 2;
    best_ = size_;
  }

  std::int64_t get() const { return size_; }

  // The last sweep slid by `slid` steps in `seconds`.
  void Learn(std::int64_t slid, double seconds) {
    slid_ += static_cast<double>(slid);
    seconds_ += seconds;
    if (++sweeps_ < trial_) return;
    const double rate = slid_ / std::max(seconds_, 1e-9);
    slid_ = seconds_ = 0.0;
    sweeps_ = 0;
    if (size_ == best_) {
      best_rate_ = rate;
      if (!CanGo(larger_)) larger_ = !larger_;
      if (CanGo(larger_)) size_ = larger_ ? 2 * size_ : size_ / 2;
      trial_ = kTrial;
      return;
    }
    if (rate > 1.02 * best_rate_) {
      best_ = size_;
      best_rate_ = rate;
      patience_ = kTrial;
    } else {
      size_ = best_;
      larger_ = !larger_;
      patience_ = std::min(2 * patience_, 64);
    }
    trial_ = patience_;
  }

 private:
  static constexpr int kTrial = 3;

  bool CanGo(bool larger) const { return larger ? 2 * size_ <= most_ : size_ > 1; }

  std::int64_t most_, size_ = 1, best_ = 1;
  double slid_ = 0.0, seconds_ = 0.0, best_rate_ = 0.0;
  int sweeps_ = 0, trial_ = kTrial, patience_ = kTrial;
  bool larger_ = true;
};

}  // namespace

bool DenoiseWindows(const DenoiseCall& call, const DenoiseOptions& options) {
  const StepTable& steps = call.steps;
  const std::int64_t classes = call.weights.classes;
  Watch watch(options, call.rows * steps.count);
  if (call.rows == 0) return true;
  const PreparedModel model(call, options);
  const std::int64_t together = std::min(call.rows, kWindowRows);
  const std::int64_t most = std::min({call.window, kBlockRows / together, steps.count});
  const std::int64_t most_rows = together * std::max<std::int64_t>(most, 1);
  Evaluation evaluation(model.view(), options, most_rows, most_rows);
  const auto size = static_cast<std::size_t>(most_rows);
  std::vector<float> y(size * static_cast<std::size_t>(classes)), eps(y.size());
  std::vector<const float*> features(size), guidance(size);
  std::vector<std::int32_t> slots(size);
  std::vector<std::int64_t> timesteps(size);
  for (std::size_t i = 0; i < size; ++i) slots[i] = static_cast<std::int32_t>(i);
  std::int64_t finished = 0;

  for (std::int64_t first = 0; first < call.rows && !watch.stopped(); first += together) {
    std::vector<Path> paths;
    WindowSize window(kFirstRows / together, most);
    const bool fixed = call.tolerance > 0.0f;
    for (std::int64_t row = first; row < std::min(first + together, call.rows); ++row) {
      paths.emplace_back(call, row);
    }
    std::int64_t count = 0;
    const auto gather = [&] {
      count = 0;
      for (Path& path : paths) {
        if (path.done()) continue;
        path.Open(fixed ? most : window.get());
        for (std::int64_t i = path.begin(); i < path.end(); ++i, ++count) {
          const auto row = static_cast<std::size_t>(count);
          std::copy_n(path.state(i), classes, y.data() + count * classes);
          features[row] = call.features + path.row() * call.features_stride;
          guidance[row] = call.guidance + path.row() * classes;
          timesteps[row] = steps.timesteps[i];
        }
      }
    };
    Clock::time_point begin = Clock::now();
    const auto scatter = [&] {
      std::int64_t row = 0;
      std::int64_t slid = 0;
      for (Path& path : paths) {
        if (path.done()) continue;
        const std::int64_t steps_taken = path.end() - path.begin();
        slid += path.Take(eps.data() + row * classes);
        row += steps_taken;
      }
      finished += slid;
      const Clock::time_point now = Clock::now();
      if (!(call.tolerance > 0.0f))
        window.Learn(slid, std::chrono::duration<double>(now - begin).count());
      begin = now;
    };
    gather();
    bool stop = count == 0;
    Team team;
    team.Run(options.threads, [&](int rank) noexcept {
      while (!stop) {
        const RowsView rows{count,    features.data(), guidance.data(),
                            y.data(), slots.data(),    timesteps.data(),
                            count};
        evaluation.Sweep(team, rank, rows, watch, finished, [&] {
          if (!watch.stopped()) {
            evaluation.SumShares(count, call.weights.output_bias, eps.data());
            scatter();
            gather();
          }
          if (options.sweeps != nullptr) ++*options.sweeps;
          stop = watch.stopped() || count == 0;
        });
      }
    });
    for (const Path& path : paths) {
      std::copy_n(path.state(steps.count), classes, call.out + path.row() * classes);
      if (call.trajectory == nullptr) continue;
      for (std::int64_t i = 0; i <= steps.count; ++i) {
        std::copy_n(path.state(i), classes,
                    call.trajectory + (i * call.rows + path.row()) * classes);
      }
    }
  }
  watch.Finish();
  return !watch.stopped();
}

}  // namespace diffmic::cpu
