// The launcher of `resilient_batch_norm` on a CUDA device.
#include "seqkernels/cuda_resilient_batch_norm.h"

#include <cuda_runtime.h>

#include "cuda/resilient_batch_norm.cuh"

namespace seqkernels::cuda {
namespace {

std::string error_of(cudaError_t status) {
  cudaGetLastError();  // it is reported here, and not again to whoever asks next
  return std::string("resilient_batch_norm: CUDA: ") + cudaGetErrorString(status);
}

}  // namespace

std::string launch_resilient_batch_norm(const ResilientBatchNormCall& call, void* stream) {
  const std::string wrong = check_resilient_batch_norm(call);
  if (!wrong.empty()) return wrong;
  if (call.outer == 0 || call.inner == 0) return "";
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return error_of(status);
  ResilientBatchNormPlan plan = plan_resilient_batch_norm(call, multiprocessors);
  void* arguments[] = {&plan.params};
  status = cudaLaunchKernel(reinterpret_cast<const void*>(resilient_batch_norm_kernel_of(plan)),
                            dim3(static_cast<unsigned>(plan.grid)),
                            dim3(ResilientBatchNormPlan::kThreads), arguments, 0,
                            static_cast<cudaStream_t>(stream));
  return status == cudaSuccess ? "" : error_of(status);
}

}  // namespace seqkernels::cuda
