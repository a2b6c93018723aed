// The ops of the library, as torch calls them: their schemas are in seqkernels/options.py.
#pragma once

#include "torch/stable_abi.h"

namespace seqkernels::torch_abi {

using Op = void(Value* stack, uint64_t num_inputs, uint64_t num_outputs);

Op pack_encoder, encoder_packed, encoder_packed_out, encoder_workspace_bytes;
Op pack_linear, linear_packed;
Op pack_resilient_batch_norm, resilient_batch_norm_packed;

// The ops on weights as they are, for processes without Python: they pack for themselves.
Op encoder, request_scoring, linear, resilient_batch_norm;

// On a CUDA device. A packed encoder lies in host memory, to be moved there.
Op pack_encoder_cuda, encoder_packed_cuda, resilient_batch_norm_cuda;

}  // namespace seqkernels::torch_abi
