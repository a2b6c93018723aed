// Launches a CUDA kernel source on the host.
//
//   const Counters counters = launch(kernel<32>, grid, block, shared_bytes, schedule, params);
//
// Throws EmulationError with the first fault. One launch at a time.
#pragma once

#include <cstddef>
#include <string>
#include <tuple>

#include "host_emulation/machine.h"

namespace seqkernels::host_emulation {

template <class Kernel, class... Args>
Counters launch(Kernel kernel, int grid, int block, size_t shared_bytes, Schedule schedule,
                Args... args) {
  const auto refuse = [](const std::string& what) {
    throw EmulationError(Fault::kLaunch, "launch: " + what);
  };
  if (grid < 1) refuse("grid: expected at least 1 block, got " + std::to_string(grid));
  if (block < 32 || block > 1024 || block % 32 != 0) {
    refuse("block: expected whole warps, at most 1024 threads, got " + std::to_string(block));
  }
  if (shared_bytes > SharedMemory::kMostBytes) {
    refuse("shared memory: expected at most " + std::to_string(SharedMemory::kMostBytes) +
           " bytes, got " + std::to_string(shared_bytes));
  }
  const auto thread = [&] { kernel(args...); };
  using Thread = decltype(thread);
  Machine machine(grid, block, shared_bytes, schedule);
  return machine.run([](const void* context) { (*static_cast<const Thread*>(context))(); },
                     &thread);
}

}  // namespace seqkernels::host_emulation
