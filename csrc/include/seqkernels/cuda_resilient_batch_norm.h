// Batch norm with given statistics on a CUDA device: the formula, layouts and names of
// resilient_batch_norm.h, with every pointer in device memory.
#pragma once

#include <string>

#include "seqkernels/resilient_batch_norm.h"

namespace seqkernels::cuda {

// Enqueues one kernel on `stream` (a cudaStream_t of the current device) and returns; allocates
// nothing and waits for nothing, so that a CUDA graph can capture it. `out` shares no memory with
// `x`, which is read through the cache for what no one writes meanwhile. Returns what is wrong, or
// "".
std::string launch_resilient_batch_norm(const ResilientBatchNormCall& call, void* stream);

}  // namespace seqkernels::cuda
