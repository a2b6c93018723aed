#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
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

std::atomic<bool> forked{false};

const OpenMp& open_mp() {
  static const OpenMp instance;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  (void)registered;
  return instance;
}

struct Team {
  Body body;
  void* context;
};

void run_plain_threads(int num_threads, Body body, void* context) {
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(num_threads - 1));
  for (int rank = 1; rank < num_threads; ++rank)
    threads.emplace_back(body, context, rank, num_threads);
  body(context, 0, num_threads);
  for (std::thread& thread : threads) thread.join();
}

struct Workspace {
  void* data = nullptr;
  size_t bytes = 0;
  ~Workspace() { std::free(data); }
};

}  // namespace

void run_parallel(int num_threads, Body body, void* context) {
  if (num_threads <= 1) {
    body(context, 0, 1);
    return;
  }
  const OpenMp& omp = open_mp();
  if (!omp.parallel || forked.load(std::memory_order_relaxed)) {
    run_plain_threads(num_threads, body, context);
    return;
  }
  Team team{body, context};
  omp.parallel(
      [](void* data) {
        const Team& t = *static_cast<Team*>(data);
        t.body(t.context, open_mp().thread_num(), open_mp().num_threads());
      },
      &team, static_cast<unsigned>(num_threads), 0);
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
  thread_local Workspace workspace;
  if (workspace.bytes < bytes) {
    std::free(workspace.data);
    workspace.data = nullptr;
    workspace.bytes = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
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
