// How a batch norm is laid over the threads of a device; plain C++.
//
// Letters: C channels, R rows, W values of a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>

#include "seqkernels/resilient_batch_norm.h"

namespace seqkernels::cuda {

// Rows lie in `outer` blocks of `inner`; strides count values. Value i of a row belongs to channel
// (i / repeat) % channels; with one channel a row, row r of a block belongs to channel r.
struct ResilientBatchNormParams {
  const void* x;  // [outer, inner, W] fp32 or bf16
  void* out;      // likewise
  int64_t outer, inner, width;
  int64_t last_width;  // of the very last row, at most `width`
  int64_t x_stride_outer, x_stride_row;
  int64_t out_stride_outer, out_stride_row;

  const float* mean;         // [C]
  const float* var;          // [C]
  const float* weight;       // [C] or null: 1
  const float* bias;         // [C] or null: 0
  int32_t channels, repeat;  // not with one channel a row
  bool aligned_channels;     // those of a thread's values are neighbours, at an aligned place

  // `beside` threads share a row; a thread goes from row to row by `step_row` of them, which are
  // `step_outer` blocks and `step_inner` rows.
  int32_t beside;
  int64_t step_row, step_outer, step_inner;

  float eps, min_var, max_abs;
  Activation activation;
  float negative_slope;
};

struct ResilientBatchNormPlan {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerMultiprocessor = 4;

  ResilientBatchNormParams params;
  // The kernel.
  bool is_bf16, vectorized, bounded, one_per_row;
  int grid;
};

// What is wrong with a call, or "".
inline std::string check_resilient_batch_norm(const ResilientBatchNormCall& call) {
  const std::string op = "resilient_batch_norm: ";
  if (call.channels < 1 || call.channels > 0x7fffffff)
    return op + "channels: expected 1 to 2147483647, got " + std::to_string(call.channels);
  if (call.outer < 0 || call.inner < 0) {
    return op + "outer, inner: expected sizes, got " + std::to_string(call.outer) + " and " +
           std::to_string(call.inner);
  }
  if (!call.norm.mean || !call.norm.var) return op + "mean, var: expected both, got a null pointer";
  const ChannelNorm& n = call.norm;
  if (!(n.eps >= 0) || !(n.min_var >= 0) || !(n.max_abs >= 0))
    return op + "eps, min_var, max_abs: expected numbers that are not negative";
  if (static_cast<int>(call.activation) < 0 || static_cast<int>(call.activation) > 4) {
    return op + "activation: expected 0 to 4, got " +
           std::to_string(static_cast<int>(call.activation));
  }
  if (call.outer > 0 && call.inner > 0 && (!call.x || !call.out))
    return op + "x, out: expected both, got a null pointer";
  if (call.outer > 0 && call.inner > 0 && call.x == call.out)
    return op + "out: expected memory apart from x, got x itself";
  return "";
}

// Of a call that is right and not empty, for a device of this many multiprocessors. Results do not
// depend on the plan.
inline ResilientBatchNormPlan plan_resilient_batch_norm(const ResilientBatchNormCall& call,
                                                        int multiprocessors) {
  constexpr int64_t kMostBeside = 0x7fffffff;  // values of a row of several channels
  ResilientBatchNormPlan plan{};
  plan.is_bf16 = call.is_bf16;
  plan.bounded = call.norm.bounded();
  const int64_t values = call.is_bf16 ? 8 : 4;  // in 16 bytes

  ResilientBatchNormParams& p = plan.params;
  p.x = call.x;
  p.out = call.out;
  p.outer = call.outer;
  p.inner = call.inner;
  p.width = call.channels;
  p.x_stride_outer = call.x_stride_outer;
  p.x_stride_row = call.x_stride_row;
  p.out_stride_outer = call.out_stride_outer;
  p.out_stride_row = call.out_stride_row;
  p.mean = call.norm.mean;
  p.var = call.norm.var;
  p.weight = call.norm.weight;
  p.bias = call.norm.bias;
  p.channels = static_cast<int32_t>(call.channels);
  p.repeat = 1;
  p.eps = call.norm.eps;
  p.min_var = call.norm.min_var;
  p.max_abs = call.norm.max_abs;
  p.activation = call.activation;
  p.negative_slope = call.negative_slope;

  if (!call.channels_last) {
    // Rows of positions; where they have no gaps, all channels of one n are a row.
    const bool packed = call.x_stride_row == call.inner && call.out_stride_row == call.inner;
    if (packed && call.inner <= kMostBeside / call.channels) {
      p.outer = 1;
      p.inner = call.outer;
      p.width = call.channels * call.inner;
      p.x_stride_row = call.x_stride_outer;
      p.out_stride_row = call.out_stride_outer;
      p.repeat = static_cast<int32_t>(call.inner);
    } else {
      plan.one_per_row = true;
      p.inner = call.channels;
      p.width = call.inner;
    }
  } else if (p.outer > 1 && p.x_stride_outer == p.inner * p.x_stride_row &&
             p.out_stride_outer == p.inner * p.out_stride_row) {
    p.inner *= p.outer;
    p.outer = 1;
  }
  if (p.outer == 1) p.x_stride_outer = p.out_stride_outer = 0;
  if (p.outer == 1 && p.inner == 1) p.x_stride_row = p.out_stride_row = 0;
  p.last_width = p.width;

  const auto aligned = [&] {
    const int64_t strides =
        p.x_stride_row | p.out_stride_row | p.x_stride_outer | p.out_stride_outer;
    const uintptr_t starts = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.out);
    return starts % 16 == 0 && strides % values == 0;
  };
  // Rows without gaps that do not end on 16 bytes: the fewest that do together make one.
  const int64_t together = values / std::gcd(p.width, values);
  if (!aligned() && !plan.one_per_row && p.outer == 1 && p.x_stride_row == p.width &&
      p.out_stride_row == p.width && p.width <= kMostBeside / together) {
    const int64_t rest = p.inner % together * p.width;
    p.width *= together;
    p.inner = (p.inner + together - 1) / together;
    p.last_width = rest > 0 ? rest : p.width;
    p.x_stride_row = p.out_stride_row = p.width;
  }
  plan.vectorized = aligned();
  const uintptr_t arrays =
      reinterpret_cast<uintptr_t>(p.mean) | reinterpret_cast<uintptr_t>(p.var) |
      reinterpret_cast<uintptr_t>(p.weight) | reinterpret_cast<uintptr_t>(p.bias);
  p.aligned_channels = plan.vectorized && !plan.one_per_row && p.repeat == 1 &&
                       call.channels % values == 0 && arrays % 16 == 0;

  // Enough threads to fill the device, each with as many rows as that leaves.
  const int64_t pieces = plan.vectorized ? (p.width + values - 1) / values : p.width;
  const int64_t most_blocks =
      int64_t{ResilientBatchNormPlan::kBlocksPerMultiprocessor} * multiprocessors;
  constexpr int64_t kThreads = ResilientBatchNormPlan::kThreads;
  const int64_t rows = p.outer * p.inner;
  const int64_t wanted = pieces > most_blocks * kThreads / rows  // without overflow
                             ? most_blocks
                             : (pieces * rows + kThreads - 1) / kThreads;
  plan.grid = static_cast<int>(std::clamp<int64_t>(wanted, 1, most_blocks));
  const int64_t threads = plan.grid * kThreads;
  p.beside = static_cast<int32_t>(std::min(pieces, threads));
  p.step_row = threads / p.beside;
  p.step_outer = p.step_row / p.inner;
  p.step_inner = p.step_row % p.inner;
  return plan;
}

}  // namespace seqkernels::cuda
