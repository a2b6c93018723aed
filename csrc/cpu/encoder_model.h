// The packed model and the contract between the dispatcher (encoder.cpp) and the kernels (one
// source an instruction set).
//
// An *operand* is a matrix [rows, K] that enters a product. Its K dimension is cut into steps of
// `pair` elements that share 32 bits: two bf16 (low half first), or one fp32. It is stored as
// strips of `width` rows:
//     [row / width][step][row % width]   32-bit words
// so a whole row of words is a vector operand (one lane a row) and a single word is a broadcast
// operand. Tile kernels store their left operands as [row / 16][step / 16][row % 16][step % 16]:
// one 1 KB tile after another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "seqkernels/encoder.h"

namespace seqkernels::cpu {

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// How a kernel wants its operands.
struct OperandLayout {
  int lanes;         // tokens in a vector
  int pair;          // elements of K in a 32-bit word: 2 (bf16) or 1 (fp32)
  int row_align;     // rows of a left operand are padded with zeros to this multiple
  int step_align;    // steps are padded with zeros to this multiple
  bool tiles;        // left operands as 1 KB tiles
  int weight_width;  // width of packed left operands
};

// One layer packed. Rows beyond the real ones and steps beyond the real ones are zero; absent
// biases are zeros, absent norm weights ones. `head_rows` is head_dim rounded up to row_align; a
// head's rows are padded one by one.
struct PackedLayer {
  const uint32_t* query;  // left operand [H * head_rows, D]
  const uint32_t* key;    // left operand [H * head_rows, D]
  const uint32_t*
      value;  // right operand of width `lanes` [H * head_rows, D]; with tiles a left operand
  const uint32_t* out;        // left operand [D, H * head_rows]
  const uint32_t* linear1;    // left operand [F, D]
  const uint32_t* linear2;    // left operand [D, F]
  const float* query_bias;    // [H * head_rows]; the key's bias shifts all scores of a row alike:
                              // softmax drops it
  const float* value_bias;    // [H * head_rows]
  const float* out_bias;      // [D]
  const float* linear1_bias;  // [F]
  const float* linear2_bias;  // [D]
  const float* norm1_weight;  // [D]
  const float* norm1_bias;    // [D]
  const float* norm2_weight;  // [D]
  const float* norm2_bias;    // [D]
};

struct PackedModel {
  EncoderShape shape;
  int head_rows = 0;     // head_dim, padded
  int model_rows = 0;    // D, padded
  int concat_rows = 0;   // H * head_rows, padded: the heads' outputs side by side
  int hidden_rows = 0;   // F, padded
  int head_steps = 0;    // steps of a head, padded
  int model_steps = 0;   // steps of D, padded
  int concat_steps = 0;  // steps of concat_rows, padded
  int hidden_steps = 0;  // steps of F, padded
  std::vector<PackedLayer> layers;
  const float* final_norm_weight = nullptr;  // [D] or null: no final norm
  const float* final_norm_bias = nullptr;    // [D]
};

// One sequence with the tokens that matter. A Transformer encoder without positions does not care
// for the order of its tokens, so masks reduce to this list: the valid tokens (the keys) come
// first, then the padded ones if they are to be computed.
struct SequenceTask {
  const EncoderCall* call;
  int64_t index;            // of the sequence in the batch: the row of candidate and out
  int64_t user;             // the row of x, mask and lengths
  int num_tokens;           // length of `position`
  int num_keys;             // the first num_keys tokens are the valid ones
  int num_queries_last;     // tokens whose output leaves the last layer: a prefix of `position`
  const int32_t* position;  // [num_tokens] in 0 .. T - 1
  int64_t window_begin;     // of the summary: its slot j holds position window_begin + j
};

// What a kernel source exports.
struct EncoderKernelEntry {
  OperandLayout layout;
  // Bytes of the part that a team shares and of each thread's own part, for sequences of at most
  // `tokens` tokens.
  size_t (*shared_bytes)(const PackedModel& model, int64_t tokens);
  size_t (*private_bytes)(const PackedModel& model, int64_t tokens);
  // Runs thread `rank` of the `size` that share the sequence. Writes the rows of tokens in
  // `position` to the output (full sequence) or to their slots in the window, and the maximum over
  // the computed tokens that the pool counts to pooled [size][D] fp32, this thread's row (untouched
  // without tokens).
  void (*run)(const PackedModel& model, const SequenceTask& task, void* shared, void* own,
              float* pooled, Barrier* barrier, int rank, int size);
  // Request scoring (request_kernel.h). Bytes of a user's part, for sequences of at most `tokens`
  // tokens.
  size_t (*user_bytes)(const PackedModel& model, int64_t tokens);
  // Computes the part of `task`'s user that all candidates share. `shared` and `own` are as for
  // `run`.
  void (*prepare_user)(const PackedModel& model, const SequenceTask& task, void* shared, void* own,
                       void* user);
  // As `run` by one thread, with the user's part of the same tokens. False: the exponents of this
  // candidate do not fit together, nothing of the result is to be used; `run` is right.
  bool (*run_candidate)(const PackedModel& model, const SequenceTask& task, void* shared, void* own,
                        void* user, float* pooled);
  // Called by each thread before its first and after its last `run` of a call.
  void (*enter)();
  void (*leave)();
};

// As the functions without `cpu::`, on this kernel, which must be able to run here.
size_t encoder_packed_bytes(const EncoderKernelEntry& kernel, const EncoderShape& shape);
void pack_encoder(const EncoderKernelEntry& kernel, const EncoderShape& shape,
                  const EncoderParameters& parameters, void* packed);
void run_encoder(const EncoderKernelEntry& kernel, const EncoderShape& shape, const void* packed,
                 const EncoderCall& call);

const EncoderKernelEntry& encoder_portable();
const EncoderKernelEntry& encoder_amx_emulated();
const EncoderKernelEntry& encoder_avx2();
const EncoderKernelEntry& encoder_avx512();
const EncoderKernelEntry& encoder_avx512_bf16();
const EncoderKernelEntry& encoder_amx_bf16();

}  // namespace seqkernels::cpu
