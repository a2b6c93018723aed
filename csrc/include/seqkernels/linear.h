// A linear layer between two batch norms: parameters and entry points of the native core.
//
//     y = act(norm_out(norm_in(x) W^T + b))
//
// Letters: N rows, K = in_features, F = out_features.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "seqkernels/activation.h"
#include "seqkernels/channel_norm.h"

namespace seqkernels {

// fp32 and contiguous; a null pointer is an absent parameter.
struct LinearParameters {
  int64_t in_features = 0;
  int64_t out_features = 0;
  const float* weight = nullptr;  // [F, K]
  const float* bias = nullptr;    // [F]
  ChannelNorm input_norm;         // of K channels
  ChannelNorm output_norm;        // of F channels
  Activation activation = Activation::kNone;
  float negative_slope = 0.01f;
  bool fp32_operands = false;  // x and weight enter the product as they are, not rounded to bf16
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

// The parameters packed for one instruction set, and the kernel that reads them.
// Errors are std::invalid_argument, before any work.
class Linear {
 public:
  virtual ~Linear() = default;
  virtual void forward(const LinearCall& call) const = 0;
  virtual size_t packed_bytes() const = 0;
  // Bytes one thread needs beyond output and packed weights, whatever the number of rows.
  virtual size_t workspace_bytes() const = 0;
};

// Packs `parameters` for the named instruction set; they are not needed afterwards. With fp32
// operands, where the set multiplies bf16 alone, for the best one below it that multiplies fp32.
std::unique_ptr<Linear> make_linear(const std::string& isa, const LinearParameters& parameters);

}  // namespace seqkernels
