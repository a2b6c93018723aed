// The table of the split encoder's kernels, which one source compiles.
#pragma once

#include "cuda/kernel_tables.h"
#include "cuda/split_attention.cuh"
#include "cuda/split_tail.cuh"

namespace seqkernels::cuda {

SplitKernel split_kernel_of(const SplitPlan& plan, SplitStep step) {
#define SEQKERNELS_KERNEL(...) &split_tokens_kernel<SplitClass<__VA_ARGS__>>,
  static constexpr SplitKernel kTokens[] = {SEQKERNELS_CUDA_SPLIT_INSTANCES(SEQKERNELS_KERNEL)};
#undef SEQKERNELS_KERNEL
#define SEQKERNELS_KERNEL(...) &split_tail_kernel<SplitClass<__VA_ARGS__>>,
  static constexpr SplitKernel kTail[] = {SEQKERNELS_CUDA_SPLIT_INSTANCES(SEQKERNELS_KERNEL)};
#undef SEQKERNELS_KERNEL
#define SEQKERNELS_KERNEL(rows) &split_attention_kernel<SplitAttentionClass<rows>>,
  static constexpr SplitKernel kAttention[] = {
      SEQKERNELS_CUDA_SPLIT_ATTENTION_INSTANCES(SEQKERNELS_KERNEL)};
#undef SEQKERNELS_KERNEL
  switch (step) {
    case SplitStep::kTokens:
      return kTokens[plan.instance];
    case SplitStep::kAttention:
      return kAttention[plan.attention];
    case SplitStep::kTail:
      return kTail[plan.instance];
  }
  return nullptr;
}

}  // namespace seqkernels::cuda
