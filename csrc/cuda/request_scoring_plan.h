// What the kernels of request scoring are given, and in which order they are launched. Needs no
// CUDA.
#pragma once

#include <algorithm>
#include <string>

#include "cuda/encoder_params.h"
#include "seqkernels/cuda_request_scoring.h"

// The kernels that are compiled, as in encoder_pack.h: X(model rows, head rows, heads, most warps).
#define SEQKERNELS_CUDA_REQUEST_INSTANCES(X) \
  X(96, 48, 2, 16)                           \
  X(64, 32, 0, 8)                            \
  X(96, 48, 0, 8)                            \
  X(128, 32, 0, 8)                           \
  X(128, 64, 0, 8)

namespace seqkernels::cuda {

struct RequestParams {
  EncoderParams encoder;
  int64_t first_user, end_user;  // of this launch
  unsigned char* workspace;      // [end_user - first_user] parts of user_bytes
  int64_t user_bytes;

  // In a user's part, in units of 16 bytes; tiles lie in lane order.
  int exponentials;  // [head][strip][strip of keys] left fragments: E
  int keys;          // [head][strip of keys][tile] left fragments
  int values;        // [head][strip of keys][tile][2] fp32, zero where no key is

  // In a candidate's shared memory, in units of 16 bytes.
  int parts;    // [2][concat row] fp32: its part of every query, scaled, and of every value
  int scores;   // [head][strip][key] fp32: of that query and the user's keys
  int tops;     // [head][strip] fp32: the largest of them
  int weights;  // [head][strip] right fragments of one column: w, 8 bytes for each t
  int slot;     // the user's part
  int misfits;  // [warp]: whether a row's sum left its range
};

RequestParams request_params(const EncoderShape& shape, const RequestPlan& plan,
                             const EncoderCall& call, const void* packed, void* workspace);

// The parameters of the users' launch: no candidate, zeros in its columns.
inline RequestParams params_of_users(RequestParams r) {
  r.encoder.d_model = r.encoder.event_dim;
  r.encoder.user_index = nullptr;
  r.encoder.candidate = nullptr;
  return r;
}

enum class RequestKernel { kUsers, kCandidates };

// Calls launch(kernel, grid, params) for each launch, until one returns an error.
template <class Launch>
std::string launch_each(const RequestPlan& plan, RequestParams params, Launch launch) {
  const int64_t users = params.encoder.users;
  for (int64_t first = 0; first < users; first += plan.users_at_once) {
    params.first_user = first;
    params.end_user = std::min(first + plan.users_at_once, users);
    const int64_t blocks = (params.end_user - first) * params.encoder.layout.heads;
    std::string error =
        launch(RequestKernel::kUsers, static_cast<int>(blocks), params_of_users(params));
    if (error.empty()) error = launch(RequestKernel::kCandidates, plan.candidates.grid, params);
    if (!error.empty()) return error;
  }
  return "";
}

}  // namespace seqkernels::cuda
