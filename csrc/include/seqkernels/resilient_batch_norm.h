// Batch norm with given statistics, within bounds (channel_norm.h has the formula), and an
// activation, as one pass over memory.
//
// Letters: N rows, C channels, L positions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "seqkernels/channel_norm.h"
#include "seqkernels/options.h"

namespace seqkernels {

// Strides count elements. A row is contiguous: one value of each channel, or with `channels_last`
// false one channel at each position.
//
//   [N, C]: outer = 1, inner = N, channels_last
//
//   [N, C, L] with channels last: outer = N, inner = L, channels_last; (n, c, l) is in row (n, l)
//
//   [N, C, L] otherwise: outer = N, inner = L; (n, c, l) is in row (n, c)
struct ResilientBatchNormCall {
  const void* x = nullptr;  // fp32 or bf16
  bool is_bf16 = false;     // of x and out
  bool channels_last = true;
  int64_t outer = 1;
  int64_t inner = 0;
  int64_t channels = 0;
  int64_t x_stride_outer = 0;
  int64_t x_stride_row = 0;

  ChannelNorm norm;  // [C]
  // What pack_channel_norm made of `norm`, whose arrays are then not read; null: made for the call.
  const float* constants = nullptr;
  Activation activation = Activation::kNone;
  float negative_slope = 0.01f;

  void* out = nullptr;
  int64_t out_stride_outer = 0;
  int64_t out_stride_row = 0;

  int num_threads = 1;
};

// Bytes of a norm's constants, and the constants: the CPU's kernels alone read them.
size_t packed_channel_norm_bytes(int64_t channels);
void pack_channel_norm(int64_t channels, const ChannelNorm& norm, void* packed);

// On the kernel of a set that runs here, see runnable_isa in processor.h. Errors are
// std::invalid_argument, before any work.
void run_resilient_batch_norm(int isa, const ResilientBatchNormCall& call);

}  // namespace seqkernels
