// What the entry point and the kernels of `resilient_batch_norm` share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/channel_norm_pack.h"
#include "seqkernels/options.h"

namespace seqkernels::cpu {

// Rows of `width` contiguous values.
struct ResilientBatchNormTask {
  const void* x;  // fp32 or bf16
  void* out;
  int64_t rows;
  int64_t width;
  int64_t x_stride;  // elements between rows
  int64_t out_stride;
  bool is_bf16;

  // kBounded or kExact. Constants lie beside the values of a row, [width], or one serves a row,
  // [rows].
  PackedChannelNorm norm;
  bool one_per_row;
  Activation activation;
  float negative_slope;
};

struct ResilientBatchNormKernelEntry {
  void (*run)(const ResilientBatchNormTask& task);
};

// The AMX sets have nothing to add here.
const ResilientBatchNormKernelEntry& resilient_batch_norm_avx512_bf16();
const ResilientBatchNormKernelEntry& resilient_batch_norm_avx512();
const ResilientBatchNormKernelEntry& resilient_batch_norm_avx2();
const ResilientBatchNormKernelEntry& resilient_batch_norm_portable();

}  // namespace seqkernels::cpu
