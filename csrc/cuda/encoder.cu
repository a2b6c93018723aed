// The launcher of the encoder on a CUDA device.
#include "cuda/encoder_kernels.cuh"
#include "cuda/launch.cuh"
#include "cuda/split_plan.h"

namespace seqkernels::cuda {

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
  *error = error_of("encoder", status);
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
  if (plan.instance < 0) {
    return launch_split_encoder(plan.split, split_launches(shape, plan, call, packed, workspace),
                                stream);
  }
  return launch_kernel("encoder", encoder_kernel_of(plan.instance), plan.grid, plan.threads,
                       plan.shared_bytes, stream,
                       encoder_params(shape, plan, call, packed, workspace));
}

}  // namespace seqkernels::cuda
