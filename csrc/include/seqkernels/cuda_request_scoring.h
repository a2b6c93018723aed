// Request scoring on CUDA with the user's part computed once: which calls are taken, and the
// launches. Plain C++: no CUDA headers, and everything but launch_request_scoring works on a
// machine without a device.
//
// A call is one with user_index. What is refused here runs by launch_encoder, which reads the
// user's events for each candidate. Letters as in encoder.h; U users.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "seqkernels/cuda_encoder.h"

namespace seqkernels::cuda {

// How one call runs: two launches for every `users_at_once` users.
struct RequestPlan {
  EncoderPlan candidates;  // as if each were a sequence of its own
  int instance = -1;       // in request_instances()
  int64_t shared_bytes = 0;
  int64_t user_bytes = 0;  // of the workspace
  int64_t users_at_once = 0;
  int64_t workspace_bytes = 0;       // of global memory, in all
  std::vector<std::string> reasons;  // why the call is not taken; empty: it is
};

// The encoder instances whose users' parts can be shared.
const std::vector<EncoderInstance>& request_instances();

// Uses of `call` only what is no device memory, and of pointers their alignment and presence. How
// many candidates there are decides nothing but the grid.
RequestPlan plan_request_scoring(const EncoderShape& shape, const EncoderCall& call,
                                 const EncoderDevice& device);

// As launch_encoder, with the same packed parameters.
std::string launch_request_scoring(const EncoderShape& shape, const RequestPlan& plan,
                                   const EncoderCall& call, const void* packed, void* workspace,
                                   void* stream);

}  // namespace seqkernels::cuda
