// The launcher of the encoder on a CUDA device.
#include <cuda_runtime.h>

#include "cuda/encoder_kernels.cuh"

namespace seqkernels::cuda {
namespace {

std::string error_of(cudaError_t status) {
  cudaGetLastError();  // it is reported here, and not again to whoever asks next
  return std::string("encoder: CUDA: ") + cudaGetErrorString(status);
}

}  // namespace

EncoderDevice encoder_device(int ordinal, std::string* error) {
  EncoderDevice device;
  int shared = 0;
  cudaError_t status =
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  if (status == cudaSuccess) {
    status =
        cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
  }
  device.shared_bytes = shared;
  *error = status == cudaSuccess ? "" : error_of(status);
  return device;
}

std::string launch_encoder(const EncoderShape& shape, const EncoderPlan& plan,
                           const EncoderCall& call, const void* packed, void* workspace,
                           void* stream) {
  if (!plan.reasons.empty()) return "encoder: cuda: " + plan.reasons[0];
  if (call.batch == 0) return "";
  if (plan.workspace_bytes > 0 && !workspace) {
    return "encoder: cuda: workspace: expected " + std::to_string(plan.workspace_bytes) +
           " bytes, got none";
  }
  EncoderParams params = encoder_params(shape, plan, call, packed, workspace);
  const void* kernel = reinterpret_cast<const void*>(encoder_kernel_of(plan.instance));
  // More than 48 KB have to be asked for.
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(plan.shared_bytes));
  if (status != cudaSuccess) return error_of(status);
  void* arguments[] = {&params};
  status = cudaLaunchKernel(
      kernel, dim3(static_cast<unsigned>(plan.grid)), dim3(static_cast<unsigned>(plan.threads)),
      arguments, static_cast<size_t>(plan.shared_bytes), static_cast<cudaStream_t>(stream));
  return status == cudaSuccess ? "" : error_of(status);
}

}  // namespace seqkernels::cuda
