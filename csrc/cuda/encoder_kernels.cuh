// The table of the encoder's kernels, for those who launch them.
#pragma once

#include "cuda/encoder.cuh"
#include "cuda/encoder_pack.h"

namespace seqkernels::cuda {

using EncoderKernel = void (*)(EncoderParams);

// `instance` is an index in encoder_instances().
inline EncoderKernel encoder_kernel_of(int instance) {
#define SEQKERNELS_KERNEL(...) &encoder_kernel<EncoderClass<__VA_ARGS__>>,
  static constexpr EncoderKernel kAll[] = {SEQKERNELS_CUDA_ENCODER_INSTANCES(SEQKERNELS_KERNEL)};
#undef SEQKERNELS_KERNEL
  return kAll[instance];
}

}  // namespace seqkernels::cuda
