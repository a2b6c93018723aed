// The table of the encoder's kernels, which one source compiles.
#pragma once

#include "cuda/encoder.cuh"
#include "cuda/encoder_pack.h"
#include "cuda/kernel_tables.h"

namespace seqkernels::cuda {

EncoderKernel encoder_kernel_of(int instance) {
#define SEQKERNELS_KERNEL(...) &encoder_kernel<EncoderClass<__VA_ARGS__>>,
  static constexpr EncoderKernel kAll[] = {SEQKERNELS_CUDA_ENCODER_INSTANCES(SEQKERNELS_KERNEL)};
#undef SEQKERNELS_KERNEL
  return kAll[instance];
}

}  // namespace seqkernels::cuda
