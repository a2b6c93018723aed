// What the encoder kernel is given, and the layout of the packed parameters.
//
// Every matrix is cut into tiles of 16 rows and 16 columns of bf16, 512 bytes, 16 a lane: lane 4 g
// + t holds the pairs (g, 2t), (g, 2t + 8), (g + 8, 2t), (g + 8, 2t + 8), which are two right
// fragments of mma.m16n8k16 for the transposed tile. Vectors are fp32: 16 columns are 4 times {2t,
// 2t + 1, 2t + 8, 2t + 9}.
//
// The columns of the model are permuted so that the eight of a lane in two tiles are neighbours in
// memory, 16 bytes of bf16: packed tiles 2j and 2j + 1 of lane t hold columns 32j + 8t + 0 .. 7.
#pragma once

#include <cstdint>

#include "seqkernels/encoder.h"

namespace seqkernels::cuda {

constexpr int kTile = 16;
constexpr int kTileVectors = 32;      // of 16 bytes in a tile
constexpr int kHiddenChunk = 32;      // columns of the hidden layer a fused kernel computes at once
constexpr int kPositionsOffset = 16;  // bytes of shared memory before the list of tokens

constexpr int64_t round_up_to(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The column of the model that stands at `packed`.
constexpr int model_column(int packed) {
  const int tile = packed / kTile, r = packed % kTile;
  return 32 * (tile / 2) + 8 * (r % 8 / 2) + 4 * (tile % 2) + 2 * (r / 8) + r % 2;
}

// Offsets in units of 16 bytes; those of a layer from the layer's start. A matrix is stored in
// groups of tile rows, [group][tile column][tile row in the group]: the order in which it is read.
struct EncoderLayout {
  int model_rows = 0, head_rows = 0, heads = 0, concat_rows = 0, hidden_rows = 0;  // padded
  int query = 0, key = 0, value = 0;  // [concat, model], groups of a head
  int out = 0;                        // [model, concat], groups of model_group
  int linear1 = 0;                    // [hidden, model], groups of hidden_group
  int linear2 = 0;                    // [model, hidden], groups of model_group
  int query_bias = 0;                 // [concat]
  int out_bias = 0;                   // [model], with W_o b_v: the rows of P sum to 1
  int out_bias_alone = 0;             // [model], for sequences without a key
  int linear1_bias = 0, linear2_bias = 0;
  int norm1_weight = 0, norm1_bias = 0, norm2_weight = 0, norm2_bias = 0;
  int layer = 0;                         // size of a layer
  int final_weight = 0, final_bias = 0;  // from the start of all
  int total = 0;
  int model_group = 0, hidden_group = 0;  // rows

  constexpr EncoderLayout() = default;
  constexpr EncoderLayout(int model, int head, int nhead, int feedforward, int num_layers,
                          int rows_of_model, int rows_of_hidden)
      : model_rows(model),
        head_rows(head),
        heads(nhead),
        concat_rows(nhead * head),
        hidden_rows(static_cast<int>(round_up_to(feedforward, rows_of_hidden))),
        model_group(rows_of_model),
        hidden_group(rows_of_hidden) {
    int at = 0;
    const auto take = [&](int vectors) {
      const int offset = at;
      at += vectors;
      return offset;
    };
    const auto matrix = [&](int rows, int columns) {
      return take(rows / kTile * (columns / kTile) * kTileVectors);
    };
    const auto vector = [&](int n) { return take(n / 4); };
    query = matrix(concat_rows, model_rows);
    key = matrix(concat_rows, model_rows);
    value = matrix(concat_rows, model_rows);
    out = matrix(model_rows, concat_rows);
    linear1 = matrix(hidden_rows, model_rows);
    linear2 = matrix(model_rows, hidden_rows);
    query_bias = vector(concat_rows);
    out_bias = vector(model_rows);
    out_bias_alone = vector(model_rows);
    linear1_bias = vector(hidden_rows);
    linear2_bias = vector(model_rows);
    norm1_weight = vector(model_rows);
    norm1_bias = vector(model_rows);
    norm2_weight = vector(model_rows);
    norm2_bias = vector(model_rows);
    layer = at;
    at = layer * num_layers;
    final_weight = vector(model_rows);
    final_bias = vector(model_rows);
    total = at;
  }
};

struct EncoderParams {
  const unsigned char* packed;
  EncoderLayout layout;

  int d_model, num_layers;
  Activation activation;
  float negative_slope, layer_norm_eps, final_norm_eps;
  float inverse_d;    // 1 / d_model
  float score_scale;  // log2(e) / sqrt(head_dim)
  bool norm_first, has_final_norm;

  const void* x;
  const void* candidate;
  const uint8_t* mask;
  const int64_t* lengths;
  const int64_t* user_index;
  void* out;
  int64_t batch, users;
  int64_t stride_b, stride_l, candidate_stride, mask_stride_b, mask_stride_l;
  int64_t out_stride_b, out_stride_l;
  int length, tokens, event_dim;
  int latest_k;
  Fusion fusion;
  Padding padding;
  const uint8_t* computes_padding;  // [1], or null; decides instead of `padding`
  bool is_bf16, latest_last, pool_max;
  int warps;                         // of a block
  bool vector_input, vector_output;  // rows can be read and written 16 bytes at a time

  // Where keys, values and activations lie: offsets in units of 16 bytes in shared memory or in the
  // block's part of the workspace.
  int strips;                      // of 16 tokens
  int keys, values, x_rest, pool;  // pool: [warp][model rows] fp32, in shared memory
  bool keys_in_workspace, x_in_workspace;
  unsigned char* workspace;
  int64_t workspace_stride;  // bytes a block
};

}  // namespace seqkernels::cuda
