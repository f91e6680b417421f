#include "cpu/parallel.h"

#if defined(__unix__)
#include <dlfcn.h>
#include <pthread.h>
#endif

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace diffmic::cpu {
namespace {

// An OpenMP runtime, by the entries of libgomp, which Intel's and LLVM's runtimes have, too.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*rank)();
  int (*size)();
};

#if defined(__unix__)

// Whether this process is a forked child: the runtime believes in threads that only its parent has.
// Watched from the start, since PyTorch may run threads before we do.
std::atomic<bool> forked = false;
const bool watched = pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;

template <typename Function>
bool Find(const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  return *function != nullptr;
}

// Null where the process has none. Looked for anew until it is there: PyTorch may be imported later
// than this module.
const OpenMp* FindOpenMp() {
  static OpenMp entries;
  static std::mutex mutex;
  static bool found = false;
  if (!watched || forked.load(std::memory_order_relaxed)) return nullptr;
  const std::lock_guard lock(mutex);
  if (!found) {
    found = Find("GOMP_parallel", &entries.parallel) && Find("omp_get_thread_num", &entries.rank) &&
            Find("omp_get_num_threads", &entries.size);
  }
  return found ? &entries : nullptr;
}

#else

const OpenMp* FindOpenMp() { return nullptr; }

#endif

}  // namespace

void OnThreads(int threads, void (*body)(void* data, int rank, int size), void* data) {
  if (threads <= 1) return body(data, 0, 1);
  if (const OpenMp* runtime = FindOpenMp()) {
    const auto call = [runtime, body, data] { body(data, runtime->rank(), runtime->size()); };
    using Call = decltype(call);
    return runtime->parallel([](void* it) { (*static_cast<Call*>(it))(); },
                             const_cast<void*>(static_cast<const void*>(&call)),
                             static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> workers;
  workers.reserve(static_cast<std::size_t>(threads - 1));
  std::atomic<int> size = 0;  // known only when all are started
  try {
    for (int rank = 1; rank < threads; ++rank) {
      workers.emplace_back([&size, body, data, rank] {
        size.wait(0);
        body(data, rank, size.load());
      });
    }
  } catch (const std::exception&) {
    // The system gives no further thread, or no memory for one: those there are do the work.
  }
  size.store(static_cast<int>(workers.size()) + 1);
  size.notify_all();
  body(data, 0, size.load());
  for (std::thread& worker : workers) worker.join();
}

}  // namespace diffmic::cpu
