// Threads for the native core.
//
// In a process that runs torch, the threads are those of torch's own OpenMP runtime, found among
// the loaded libraries: a second pool would fight with it for the cores, since its idle threads
// spin for milliseconds. Where there is none, and in a child forked after this library was loaded
// (an OpenMP pool does not survive a fork), each call starts and joins plain threads.
#pragma once

#include <atomic>
#include <cstddef>

namespace seqkernels::cpu {

// Calls body(context, rank, size) once on each of `size` threads, 1 <= size <= num_threads, the
// caller being one of them, and returns when all are done. Where the system starts fewer threads,
// `size` is what there is. What a body throws is thrown here once all are done, the first of it
// where several do; a body that others wait for at a barrier has to reach it all the same.
void run_parallel(int num_threads, void (*body)(void* context, int rank, int size), void* context);

// All threads of a team wait here for each other. Spins, then yields: waits are short, and cores
// may be shared.
class Barrier {
 public:
  void wait(int size);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<int> round_{0};
};

// This thread's scratch memory: at least `bytes`, 64-byte aligned, kept between calls, given back
// where a thousand calls after each other need but a fraction of it, and freed with the thread.
// Contents are those of the last call. Throws std::bad_alloc.
void* thread_workspace(size_t bytes);

// Asks the system to back a large block that is about to be written with large pages, where it does
// so on request: a fresh block is otherwise faulted in 4 KB at a time, which takes longer than
// writing it. Only a hint; the block's contents do not matter.
void prefer_large_pages(void* block, size_t bytes);

}  // namespace seqkernels::cpu
