// A linear layer between two batch norms: parameters and entry points of the native core.
//
//     y = act(norm_out(norm_in(x) W^T + b))
//
// Letters: N rows, K = in_features, F = out_features.
#pragma once

#include <cstddef>
#include <cstdint>

#include "seqkernels/channel_norm.h"
#include "seqkernels/options.h"

namespace seqkernels {

// What the layer fixes.
struct LinearShape {
  int64_t in_features = 0;
  int64_t out_features = 0;
  NormShape input_norm;   // of K channels
  NormShape output_norm;  // of F channels
  Activation activation = Activation::kNone;
  float negative_slope = 0.01f;
  Precision precision = Precision::kBf16;

  bool operator==(const LinearShape&) const = default;
};

// fp32 and contiguous; a null pointer is an absent parameter.
struct LinearParameters {
  const float* weight = nullptr;  // [F, K]
  const float* bias = nullptr;    // [F]
  NormParameters input_norm;
  NormParameters output_norm;
};

// What one call brings. Strides count elements; rows of x and out are contiguous.
struct LinearCall {
  const void* x = nullptr;  // [N, K] fp32 or bf16
  void* out = nullptr;      // [N, F] of the same type
  bool is_bf16 = false;     // of x and out
  int64_t rows = 0;         // N >= 0
  int64_t x_stride = 0;
  int64_t out_stride = 0;
  int num_threads = 1;
};

// `isa` is a set that runs here, see runnable_isa in processor.h; with precision "fp32", where the
// set multiplies bf16 alone, the best one below it that multiplies fp32 runs. Errors are
// std::invalid_argument, before any work.

// Bytes of the parameters, packed for one instruction set.
size_t linear_packed_bytes(int isa, const LinearShape& shape);

// Packs `parameters` into so many bytes, aligned to 64; they are not needed afterwards.
void pack_linear(int isa, const LinearShape& shape, const LinearParameters& parameters,
                 void* packed);

void run_linear(int isa, const LinearShape& shape, const void* packed, const LinearCall& call);

// Bytes one thread needs beyond output and packed weights, whatever the number of rows.
size_t linear_workspace_bytes(int isa, const LinearShape& shape);

}  // namespace seqkernels
