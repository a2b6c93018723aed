// How the launchers on the host run, and what they saw last.
#pragma once

#include "host_emulation/counters.h"
#include "host_emulation/machine.h"
#include "seqkernels/cuda_encoder.h"

namespace seqkernels::host_emulation {

struct LaunchSettings {
  Schedule schedule;
  cuda::EncoderDevice device{227 * 1024, 4};  // an H100's shared memory, few multiprocessors
  int64_t launches = 0;

  // Of the last launch.
  Counters counters;
  int grid = 0, threads = 0;
  int64_t shared_bytes = 0;
};

LaunchSettings& launch_settings();

}  // namespace seqkernels::host_emulation
