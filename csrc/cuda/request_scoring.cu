// The launcher of request scoring on a CUDA device.
#include "cuda/request_scoring.cuh"

#include <cuda_runtime.h>

namespace seqkernels::cuda {
namespace {

std::string error_of(cudaError_t status) {
  cudaGetLastError();  // it is reported here, and not again to whoever asks next
  return std::string("request_scoring: CUDA: ") + cudaGetErrorString(status);
}

}  // namespace

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
  return launch_each(
      plan, of_call, [&](RequestKernel kind, int grid, RequestParams params) -> std::string {
        const void* kernel = reinterpret_cast<const void*>(request_kernel_of(kind, plan.instance));
        // More than 48 KB have to be asked for.
        cudaError_t status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(plan.shared_bytes));
        if (status != cudaSuccess) return error_of(status);
        void* arguments[] = {&params};
        status = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(grid)),
                                  dim3(static_cast<unsigned>(plan.candidates.threads)), arguments,
                                  static_cast<size_t>(plan.shared_bytes),
                                  static_cast<cudaStream_t>(stream));
        return status == cudaSuccess ? "" : error_of(status);
      });
}

}  // namespace seqkernels::cuda
