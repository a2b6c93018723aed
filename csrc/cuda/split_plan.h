// The host's side of the split encoder: which kernels take a shape, plans, and what launches are
// given. Needs no CUDA.
#pragma once

#include "cuda/split_params.h"
#include "seqkernels/cuda_encoder.h"

// The kernels that are compiled. X(tiles of columns a warp, strips at once), by ascending model
// rows.
#define SEQKERNELS_CUDA_SPLIT_INSTANCES(X) \
  X(2, 7)                                  \
  X(4, 4)                                  \
  X(8, 2)
// X(head rows)
#define SEQKERNELS_CUDA_SPLIT_ATTENTION_INSTANCES(X) \
  X(16)                                              \
  X(32)                                              \
  X(48)                                              \
  X(64)                                              \
  X(96)                                              \
  X(128)

namespace seqkernels::cuda {

// With more, their padded columns would not fit into the shared memory of every device.
int split_most_heads(const EncoderShape& shape);

// Of a shape that is taken.
EncoderLayout split_layout(const EncoderShape& shape);

// Completes a plan without reasons.
void plan_split(const EncoderShape& shape, const EncoderCall& call, const EncoderDevice& device,
                EncoderPlan& plan);

// All launches of a call, in their order.
enum class SplitStep { kTokens, kAttention, kTail };
struct SplitLaunch {
  SplitStep step;
  int grid, threads;
  int64_t shared_bytes;
  SplitParams params;
};
std::vector<SplitLaunch> split_launches(const EncoderShape& shape, const EncoderPlan& plan,
                                        const EncoderCall& call, const void* packed,
                                        void* workspace);

// Runs them; returns the first error.
std::string launch_split_encoder(const SplitPlan& plan, const std::vector<SplitLaunch>& launches,
                                 void* stream);

}  // namespace seqkernels::cuda
