#include "cpu/common/parallel.h"

#if defined(__unix__)
#include <dlfcn.h>
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace diffmic::cpu {
namespace {

// Entry points of libgomp, which the runtimes of Intel and LLVM also export.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*most)();
  int (*rank)();
  int (*size)();
};

// In a forked child the runtime counts on threads that only the parent has.
std::atomic<bool> forked = false;

#if defined(__unix__)

const bool watched = pthread_atfork(nullptr, nullptr, Forked) == 0;

// Whether both are in the same library.
template <typename F, typename G>
bool Together(F f, G g) {
  Dl_info of_f, of_g;
  return dladdr(reinterpret_cast<void*>(f), &of_f) != 0 &&
         dladdr(reinterpret_cast<void*>(g), &of_g) != 0 && of_f.dli_fbase == of_g.dli_fbase;
}

// Null if no runtime is visible to all libraries, as PyTorch's is. Looked up again until found:
// PyTorch may be imported after this module.
const OpenMp* FindOpenMp() {
  static OpenMp entries;
  static std::mutex mutex;
  static bool found = false;
  if (!watched || forked.load(std::memory_order_relaxed)) return nullptr;
  const auto find = [](const char* name, auto* function) {
    *function =
        reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(RTLD_DEFAULT, name));
    return *function != nullptr;
  };
  const std::lock_guard lock(mutex);
  if (!found) {
    found =
        find("GOMP_parallel", &entries.parallel) && find("omp_get_max_threads", &entries.most) &&
        find("omp_get_thread_num", &entries.rank) && find("omp_get_num_threads", &entries.size) &&
        Together(entries.parallel, entries.most) && Together(entries.parallel, entries.rank) &&
        Together(entries.parallel, entries.size);
  }
  return found ? &entries : nullptr;
}

#else

const OpenMp* FindOpenMp() { return nullptr; }

#endif

}  // namespace

void Forked() { forked = true; }

void OnThreads(int threads, void (*body)(void* data, int rank, int size), void* data) {
  if (threads <= 1) return body(data, 0, 1);
  // A pooled thread may have another rounding mode or flush denormals differently: it adopts the
  // caller's floating-point environment for the call.
  std::fenv_t environment;
  std::fegetenv(&environment);
  const OpenMp* runtime = FindOpenMp();
  if (runtime != nullptr && threads <= runtime->most()) {
    const auto call = [&] {
      const int rank = runtime->rank();
      if (rank >= threads) return;
      std::fenv_t own;
      std::fegetenv(&own);
      std::fesetenv(&environment);
      body(data, rank, std::min(threads, runtime->size()));
      std::fesetenv(&own);
    };
    using Call = decltype(call);
    // All threads of PyTorch: libgomp ends threads that a region leaves out, and starts them again
    // for the next region.
    return runtime->parallel([](void* it) { (*static_cast<Call*>(it))(); },
                             const_cast<void*>(static_cast<const void*>(&call)),
                             static_cast<unsigned>(runtime->most()), 0);
  }
  std::vector<std::thread> workers;
  workers.reserve(static_cast<std::size_t>(threads - 1));
  std::atomic<int> size = 0;  // known once all are started
  try {
    for (int rank = 1; rank < threads; ++rank) {
      workers.emplace_back([&, rank] {
        size.wait(0);
        std::fesetenv(&environment);
        body(data, rank, size.load());
      });
    }
  } catch (const std::exception&) {
    // No further thread, or no memory for one: those that have started do the work.
  }
  size.store(static_cast<int>(workers.size()) + 1);
  size.notify_all();
  body(data, 0, size.load());
  for (std::thread& worker : workers) worker.join();
}

}  // namespace diffmic::cpu
