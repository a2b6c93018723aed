// The fused encoder on CUDA: what is taken, how parameters are packed, and the launch. Plain C++:
// no CUDA headers, and everything but launch_encoder works on a machine without a device.
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

// A kernel that was compiled: models of at most `model_rows` columns whose heads have at most
// `head_rows`. With `heads` != 0 it takes exactly this shape, norm last, and keeps activations in
// registers; one warp a strip.
struct EncoderInstance {
  int model_rows, head_rows, heads, warps;
  bool exact() const { return heads != 0; }
  bool operator==(const EncoderInstance&) const = default;
};

// All of them, the exact ones first.
const std::vector<EncoderInstance>& encoder_instances();

// How one call runs.
struct EncoderPlan {
  int instance = -1;  // in encoder_instances()
  int grid = 0, threads = 0;
  int64_t shared_bytes = 0;
  int64_t workspace_bytes = 0;       // of global memory, in all; 0: none
  bool keys_in_workspace = false;    // else the activations alone
  std::vector<std::string> reasons;  // why the call is not taken; empty: it is
};

// Why no kernel takes the model; empty: one does.
std::vector<std::string> encoder_unsupported_reasons(const EncoderShape& shape);

// Uses of `call` only what is no device memory, and of pointers their alignment and presence.
EncoderPlan plan_encoder(const EncoderShape& shape, const EncoderCall& call,
                         const EncoderDevice& device);

// The packed parameters for the plan's instance. Exact and other instances of one shape read the
// same bytes.
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
