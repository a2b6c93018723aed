// The encoder on CUDA: what is taken, how parameters are packed, and the launch. Plain C++: no CUDA
// headers, and everything but launch_encoder works on a machine without a device.
//
// It has two forms. The fused one, for d_model up to 128, is one launch. The split one, for wider
// models, is one launch for the tokens and two a layer: attention, and the rows behind it.
//
// Letters as in encoder.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "seqkernels/encoder.h"

namespace seqkernels::cuda {

// What a launch has to know of the device.
struct EncoderDevice {
  int64_t shared_bytes = 0;  // that a block may ask for
  int multiprocessors = 1;
};

// A fused kernel that was compiled: models of at most `model_rows` columns whose heads have at most
// `head_rows`. With `heads` != 0 it takes exactly this shape, norm last, and keeps activations in
// registers; one warp a strip.
struct EncoderInstance {
  int model_rows, head_rows, heads, warps;
  bool exact() const { return heads != 0; }
  bool operator==(const EncoderInstance&) const = default;
};

// All of them, the exact ones first.
const std::vector<EncoderInstance>& encoder_instances();

// Kernels of the split form. A pair of them, for tokens and for the rows behind attention, takes
// models of at most `model_rows` columns: each warp owns `column_tiles` tiles of 16 and multiplies
// `strips` strips of 16 tokens at once.
struct SplitInstance {
  int column_tiles, strips;
  int model_rows() const;
  bool operator==(const SplitInstance&) const = default;
};
const std::vector<SplitInstance>& split_instances();
// Attention takes heads of at most so many columns.
const std::vector<int>& split_attention_instances();

// How a call runs in the split form.
struct SplitPlan {
  int instance = -1;      // in split_instances()
  int attention = -1;     // in split_attention_instances()
  int64_t sequences = 0;  // at once: the workspace holds so many, and launches repeat
  int group = 0;          // strips that a block takes at once, at most
  int blocks = 0;         // that share a sequence's strips
  int warps = 0, attention_warps = 0;
  int64_t tokens_bytes = 0, attention_bytes = 0, tail_bytes = 0;  // of shared memory
};

// How one call runs.
struct EncoderPlan {
  int instance = -1;  // in encoder_instances(); -1: the split form
  int grid = 0, threads = 0;
  int64_t shared_bytes = 0;
  SplitPlan split;
  int64_t workspace_bytes = 0;       // of global memory, in all; 0: none
  bool keys_in_workspace = false;    // else the activations alone
  std::vector<std::string> reasons;  // why the call is not taken; empty: it is
};

// Why no kernel takes the model; empty: one does.
std::vector<std::string> encoder_unsupported_reasons(const EncoderShape& shape);

// Uses of `call` only what is no device memory, and of pointers their alignment and presence.
EncoderPlan plan_encoder(const EncoderShape& shape, const EncoderCall& call,
                         const EncoderDevice& device);

// The packed parameters. Exact and other fused instances of one shape read the same bytes.
size_t encoder_packed_bytes(const EncoderShape& shape);
void pack_encoder(const EncoderShape& shape, const EncoderParameters& parameters, void* packed);

// The device's limits, or an error in `error`.
EncoderDevice encoder_device(int ordinal, std::string* error);

// Runs `call` on `stream` (a cudaStream_t), with all of its pointers, `packed` and `workspace` (at
// least plan.workspace_bytes, aligned to 16) on the current device. Neither waits nor allocates.
// Lengths and user indices are clamped to their range. Returns the error, empty if there is none.
std::string launch_encoder(const EncoderShape& shape, const EncoderPlan& plan,
                           const EncoderCall& call, const void* packed, void* workspace,
                           void* stream);

}  // namespace seqkernels::cuda
