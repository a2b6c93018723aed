// The launcher of request scoring on a CUDA device.
#include "cuda/request_scoring.cuh"

#include "cuda/launch.cuh"

namespace seqkernels::cuda {

std::string launch_request_scoring(const EncoderShape& shape, const RequestPlan& plan,
                                   const EncoderCall& call, const void* packed, void* workspace,
                                   void* stream) {
  if (!plan.reasons.empty()) return "request_scoring: cuda: " + plan.reasons[0];
  if (call.batch == 0) return "";
  if (!workspace) {
    return "request_scoring: cuda: workspace: expected " + std::to_string(plan.workspace_bytes) +
           " bytes, got none";
  }
  const RequestParams of_call = request_params(shape, plan, call, packed, workspace);
  return launch_each(plan, of_call, [&](RequestKernel kind, int grid, const RequestParams& params) {
    return launch_kernel("request_scoring", request_kernel_of(kind, plan.instance), grid,
                         plan.candidates.threads, plan.shared_bytes, stream, params);
  });
}

}  // namespace seqkernels::cuda
