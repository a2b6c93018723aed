// The fused Transformer encoder: parameters and entry points of the native core.
//
// Letters: B sequences, L tokens a sequence, E width of x, C width of the candidate, D = d_model, F
// = dim_feedforward, H heads, T = L (L + 1 with fusion "append") tokens the encoder sees.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "seqkernels/activation.h"

namespace seqkernels {

enum class Fusion : int { kNone = 0, kConcat = 1, kAppend = 2 };
enum class Padding : int { kZero = 0, kCompute = 1, kExclude = 2 };

// What the model fixes.
struct EncoderShape {
  int d_model = 0;
  int nhead = 0;
  int dim_feedforward = 0;
  int num_layers = 0;
  Activation activation = Activation::kRelu;
  float negative_slope = 0.01f;
  bool norm_first = false;
  float layer_norm_eps = 1e-5f;
  bool has_final_norm = false;
  float final_norm_eps = 1e-5f;

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
struct EncoderCall {
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

  Fusion fusion = Fusion::kNone;
  Padding padding = Padding::kZero;
  // [1], or null: where given, padding is kCompute if it is nonzero and else kZero. On a GPU the
  // kernel reads it, so the host does not wait for the device.
  const uint8_t* computes_padding = nullptr;
  bool latest_last = false;
  int64_t latest_k =
      -1;  // -1: the full sequence [B, T, D]; else the summary [B, latest_k * D (+ D)]
  bool pool_max = false;

  void* out = nullptr;
  int64_t out_stride_b = 0;
  int64_t out_stride_l = 0;  // of the full sequence

  int num_threads = 1;
};

// The parameters packed for one instruction set, and the kernel that reads them.
// Errors are std::invalid_argument, before any work.
class Encoder {
 public:
  virtual ~Encoder() = default;
  virtual void forward(const EncoderCall& call) const = 0;
  virtual size_t packed_bytes() const = 0;
  // As forward for calls with user_index. With fusion "concat" and norm last, what the first layer
  // computes of the events alone is computed once for each user, see request_kernel.h.
  virtual void score_request(const EncoderCall& call) const = 0;
  // Bytes one thread needs beyond output and packed weights for sequences of `tokens` tokens (T
  // above).
  virtual size_t workspace_bytes(int64_t tokens) const = 0;
};

// Packs `parameters` for the named instruction set; they are not needed afterwards.
std::unique_ptr<Encoder> make_encoder(const std::string& isa, const EncoderShape& shape,
                                      const EncoderParameters& parameters);

}  // namespace seqkernels
