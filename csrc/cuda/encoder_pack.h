// The host's side of the CUDA encoder: which kernel takes a shape, packed parameters, and what a
// launch is given. Needs no CUDA.
#pragma once

#include "cuda/encoder_params.h"
#include "seqkernels/cuda_encoder.h"

// The fused kernels that are compiled: X(model rows, head rows, heads, most warps). One with heads
// takes exactly this shape. The head rows of a model size ascend.
#define SEQKERNELS_CUDA_ENCODER_EXACT(X) X(96, 48, 2, 16)
#define SEQKERNELS_CUDA_ENCODER_GENERAL(X) \
  X(32, 16, 0, 8)                          \
  X(32, 32, 0, 8)                          \
  X(64, 16, 0, 8)                          \
  X(64, 32, 0, 8)                          \
  X(64, 64, 0, 8)                          \
  X(96, 16, 0, 8)                          \
  X(96, 32, 0, 8)                          \
  X(96, 48, 0, 8)                          \
  X(96, 96, 0, 8)                          \
  X(128, 16, 0, 8)                         \
  X(128, 32, 0, 8)                         \
  X(128, 64, 0, 8)                         \
  X(128, 128, 0, 8)
#define SEQKERNELS_CUDA_ENCODER_INSTANCES(X) \
  SEQKERNELS_CUDA_ENCODER_EXACT(X)           \
  SEQKERNELS_CUDA_ENCODER_GENERAL(X)

namespace seqkernels::cuda {

inline int64_t tokens_of(const EncoderCall& call) {
  return call.length + (call.fusion == Fusion::kAppend ? 1 : 0);
}

// Of a shape that is taken, in either form.
EncoderLayout encoder_layout(const EncoderShape& shape);

// What shape and call say, whatever the plan: all but memory and warps.
EncoderParams encoder_call_params(const EncoderShape& shape, const EncoderCall& call,
                                  const EncoderLayout& layout, const void* packed);

// `plan` is one that takes the call in the fused form.
EncoderParams encoder_params(const EncoderShape& shape, const EncoderPlan& plan,
                             const EncoderCall& call, const void* packed, void* workspace);

}  // namespace seqkernels::cuda
