// The launches of the split encoder on a CUDA device.
#include "cuda/launch.cuh"
#include "cuda/split_kernels.cuh"

namespace seqkernels::cuda {

std::string launch_split_encoder(const SplitPlan& plan, const std::vector<SplitLaunch>& launches,
                                 void* stream) {
  for (const SplitLaunch& l : launches) {
    const std::string error = launch_kernel("encoder", split_kernel_of(plan, l.step), l.grid,
                                            l.threads, l.shared_bytes, stream, l.params);
    if (!error.empty()) return error;
  }
  return "";
}

}  // namespace seqkernels::cuda
