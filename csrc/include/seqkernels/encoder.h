// The fused Transformer encoder: parameters and entry points of the native core.
//
// Letters: B sequences, L tokens a sequence, E width of x, C width of the candidate, D = d_model, F
// = dim_feedforward, H heads, T = L (L + 1 with fusion "append") tokens the encoder sees.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "seqkernels/options.h"

namespace seqkernels {

// What the model fixes.
struct EncoderShape : EncoderModelOptions {
  int d_model = 0;
  int dim_feedforward = 0;
  int num_layers = 0;
  bool has_final_norm = false;

  bool operator==(const EncoderShape&) const = default;
  int head_dim() const { return d_model / nhead; }
};

// One layer's parameters in torch's layout, fp32 and contiguous; a null pointer is an absent
// parameter.
struct EncoderLayerParameters {
  const float* in_proj_weight = nullptr;   // [3 D, D]
  const float* in_proj_bias = nullptr;     // [3 D]
  const float* out_proj_weight = nullptr;  // [D, D]
  const float* out_proj_bias = nullptr;    // [D]
  const float* linear1_weight = nullptr;   // [F, D]
  const float* linear1_bias = nullptr;     // [F]
  const float* linear2_weight = nullptr;   // [D, F]
  const float* linear2_bias = nullptr;     // [D]
  const float* norm1_weight = nullptr;     // [D]
  const float* norm1_bias = nullptr;       // [D]
  const float* norm2_weight = nullptr;     // [D]
  const float* norm2_bias = nullptr;       // [D]
};

struct EncoderParameters {
  std::vector<EncoderLayerParameters> layers;
  const float* final_norm_weight = nullptr;  // [D]
  const float* final_norm_bias = nullptr;    // [D]
};

// What one call brings. Strides count elements; the last dimension of x, candidate and out is
// contiguous.
struct EncoderCall : EncoderCallOptions {
  const void* x = nullptr;  // [B, L, E] fp32 or bf16
  bool is_bf16 = false;     // of x, candidate and out
  int64_t batch = 0;        // B >= 1
  int64_t length = 0;       // L >= 1
  int64_t stride_b = 0;
  int64_t stride_l = 0;

  // [B], 0 <= user_index[b] < users: sequence b reads row user_index[b] of x, mask and lengths,
  // which then have `users` rows; null: row b.
  const int64_t* user_index = nullptr;
  int64_t users = 0;

  const void* candidate = nullptr;  // [B, C], null without fusion
  int64_t candidate_dim = 0;
  int64_t candidate_stride = 0;

  const uint8_t* mask = nullptr;  // [B, L], nonzero = ignore; at most one of mask and lengths
  int64_t mask_stride_b = 0;
  int64_t mask_stride_l = 0;
  const int64_t* lengths = nullptr;  // [B], 0 <= lengths[b] <= L

  // [1], or null: where given, padding is kCompute if it is nonzero and else kZero. On a GPU the
  // kernel reads it, so the host does not wait for the device.
  const uint8_t* computes_padding = nullptr;

  void* out = nullptr;
  int64_t out_stride_b = 0;
  int64_t out_stride_l = 0;  // of the full sequence

  int num_threads = 1;
};

// `isa` is a set that runs here, see runnable_isa in processor.h. Errors are std::invalid_argument,
// before any work.

// Bytes of the parameters, packed for one instruction set.
size_t encoder_packed_bytes(int isa, const EncoderShape& shape);

// Packs `parameters` into so many bytes, aligned to 64; they are not needed afterwards.
void pack_encoder(int isa, const EncoderShape& shape, const EncoderParameters& parameters,
                  void* packed);

// Runs a call. One with user_index and fusion "concat", norm last, computes what the first layer
// makes of the events alone once for each user, see request_kernel.h.
void run_encoder(int isa, const EncoderShape& shape, const void* packed, const EncoderCall& call);

// Bytes one thread needs beyond output and packed weights for sequences of `tokens` tokens (T
// above).
size_t encoder_workspace_bytes(int isa, const EncoderShape& shape, int64_t tokens);

}  // namespace seqkernels
