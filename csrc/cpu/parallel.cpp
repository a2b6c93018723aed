#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace seqkernels::cpu {
namespace {

using Body = void (*)(void*, int, int);

// The entry points of the GNU OpenMP runtime's stable binary interface.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;

  OpenMp() {
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    thread_num = reinterpret_cast<decltype(thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    num_threads =
        reinterpret_cast<decltype(num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    if (!parallel || !thread_num || !num_threads) parallel = nullptr;
  }
};

const OpenMp& open_mp() {
  static const OpenMp instance;
  return instance;
}

// Set in every child that is forked once this library is loaded: the parent's pool may have been
// started by others, long before the first call of this library.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_is_watched =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

class Team {
 public:
  Team(Body body, void* context) : body_(body), context_(context) {}

  void run(int rank, int size) noexcept {
    try {
      body_(context_, rank, size);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const Body body_;
  void* const context_;
  std::mutex mutex_;
  std::exception_ptr error_;
};

void run_plain_threads(int num_threads, Team& team) {
  // Bodies start when it is known how many they are: their barriers count on it.
  std::atomic<int> size{0};
  std::vector<std::thread> threads;
  try {
    threads.reserve(static_cast<size_t>(num_threads - 1));
    for (int rank = 1; rank < num_threads; ++rank) {
      threads.emplace_back([&team, &size, rank] {
        size.wait(0);
        team.run(rank, size.load());
      });
    }
  } catch (const std::exception&) {
    // The system starts no more, or has no memory for them: those that run share the work.
  }
  size.store(1 + static_cast<int>(threads.size()));
  size.notify_all();
  team.run(0, size.load());
  for (std::thread& thread : threads) thread.join();
}

struct Workspace {
  void* data = nullptr;
  size_t bytes = 0;
  int small_calls = 0;  // after each other, that needed a fraction of it
  size_t most = 0;      // that one of them needed
  ~Workspace() { std::free(data); }
};

}  // namespace

void run_parallel(int num_threads, Body body, void* context) {
  if (num_threads <= 1) {
    body(context, 0, 1);
    return;
  }
  Team team(body, context);
  const OpenMp& omp = open_mp();
  if (!omp.parallel || forked.load(std::memory_order_relaxed)) {
    run_plain_threads(num_threads, team);
  } else {
    omp.parallel(
        [](void* data) {
          static_cast<Team*>(data)->run(open_mp().thread_num(), open_mp().num_threads());
        },
        &team, static_cast<unsigned>(num_threads), 0);
  }
  team.rethrow();
}

void Barrier::wait(int size) {
  if (size == 1) return;
  const int round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  constexpr int kSpins = 4000;
  for (int spin = 0; round_.load(std::memory_order_acquire) == round; ++spin) {
    if (spin < kSpins) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    } else {
      sched_yield();
    }
  }
}

void* thread_workspace(size_t bytes) {
  constexpr size_t kMuch = size_t{1} << 20;
  constexpr int kCalls = 1024;
  thread_local Workspace workspace;
  size_t wanted = bytes > workspace.bytes ? bytes : 0;
  if (workspace.bytes > kMuch && bytes < workspace.bytes / 4) {
    // One long request must not hold its memory for ever.
    workspace.most = std::max(workspace.most, bytes);
    if (++workspace.small_calls == kCalls) wanted = workspace.most;
  } else {
    workspace.small_calls = 0;
    workspace.most = 0;
  }
  if (wanted > 0) {
    std::free(workspace.data);
    workspace.data = nullptr;
    workspace.bytes = workspace.most = 0;
    workspace.small_calls = 0;
    const size_t rounded = (wanted + 4095) / 4096 * 4096;
    workspace.data = std::aligned_alloc(4096, rounded);
    if (!workspace.data) throw std::bad_alloc();
    workspace.bytes = rounded;
  }
  return workspace.data;
}

void prefer_large_pages([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
  if (bytes < 2 * kLargePage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(block) + bytes) & ~(kLargePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace seqkernels::cpu
