// Batch norm with given statistics, within bounds (channel_norm.h has the formula), and an
// activation, as one pass over memory.
//
// Letters: N rows, C channels, L positions.
#pragma once

#include <cstdint>
#include <string>

#include "seqkernels/activation.h"
#include "seqkernels/channel_norm.h"

namespace seqkernels {

namespace cpu {
struct ResilientBatchNormKernelEntry;
}

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
  Activation activation = Activation::kNone;
  float negative_slope = 0.01f;

  void* out = nullptr;
  int64_t out_stride_outer = 0;
  int64_t out_stride_row = 0;

  int num_threads = 1;
};

// The kernel of one instruction set. Errors are std::invalid_argument, before any work.
class ResilientBatchNorm {
 public:
  explicit ResilientBatchNorm(const std::string& isa);
  void forward(const ResilientBatchNormCall& call) const;

 private:
  const cpu::ResilientBatchNormKernelEntry& kernel_;
};

}  // namespace seqkernels
