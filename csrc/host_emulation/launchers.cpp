// The launchers of cuda_encoder.h, cuda_request_scoring.h and cuda_resilient_batch_norm.h on the
// host: all memory is the host's, streams mean nothing, and a fault that the emulation notices is
// the error.
#include "host_emulation/launchers.h"

#include "cuda/encoder_pack.h"
#include "cuda/kernel_tables.h"
#include "host_emulation/launch.h"
#include "seqkernels/cuda_encoder.h"
#include "seqkernels/cuda_resilient_batch_norm.h"

namespace seqkernels {
namespace host_emulation {

LaunchSettings& launch_settings() {
  static LaunchSettings settings;
  return settings;
}

namespace {

template <class Kernel, class... Args>
std::string run(Kernel kernel, int grid, int threads, int64_t shared_bytes, const Args&... args) {
  LaunchSettings& s = launch_settings();
  try {
    s.counters =
        launch(kernel, grid, threads, static_cast<size_t>(shared_bytes), s.schedule, args...);
    ++s.launches;
    s.grid = grid;
    s.threads = threads;
    s.shared_bytes = shared_bytes;
  } catch (const EmulationError& error) {
    return error.what();
  }
  return "";
}

}  // namespace
}  // namespace host_emulation

namespace cuda {

EncoderDevice encoder_device(int, std::string*) {
  return host_emulation::launch_settings().device;
}

std::string launch_encoder(const EncoderShape& shape, const EncoderPlan& plan,
                           const EncoderCall& call, const void* packed, void* workspace, void*) {
  if (!plan.reasons.empty()) return "encoder: cuda: " + plan.reasons[0];
  if (plan.instance < 0) {
    return launch_split_encoder(plan.split, split_launches(shape, plan, call, packed, workspace),
                                nullptr);
  }
  return host_emulation::run(encoder_kernel_of(plan.instance), plan.grid, plan.threads,
                             plan.shared_bytes,
                             encoder_params(shape, plan, call, packed, workspace));
}

std::string launch_request_scoring(const EncoderShape& shape, const RequestPlan& plan,
                                   const EncoderCall& call, const void* packed, void* workspace,
                                   void*) {
  if (!plan.reasons.empty()) return "request_scoring: cuda: " + plan.reasons[0];
  if (call.batch == 0) return "";
  return launch_each(plan, request_params(shape, plan, call, packed, workspace),
                     [&](RequestKernel kind, int grid, const RequestParams& params) {
                       return host_emulation::run(request_kernel_of(kind, plan.instance), grid,
                                                  plan.candidates.threads, plan.shared_bytes,
                                                  params);
                     });
}

std::string launch_split_encoder(const SplitPlan& plan, const std::vector<SplitLaunch>& launches,
                                 void*) {
  for (const SplitLaunch& l : launches) {
    const std::string error = host_emulation::run(split_kernel_of(plan, l.step), l.grid, l.threads,
                                                  l.shared_bytes, l.params);
    if (!error.empty()) return error;
  }
  return "";
}

std::string launch_resilient_batch_norm(const ResilientBatchNormCall& call, void*) {
  const std::string wrong = check_resilient_batch_norm(call);
  if (!wrong.empty()) return wrong;
  if (call.outer == 0 || call.inner == 0) return "";
  const ResilientBatchNormPlan plan =
      plan_resilient_batch_norm(call, host_emulation::launch_settings().device.multiprocessors);
  return host_emulation::run(resilient_batch_norm_kernel_of(plan), plan.grid,
                             ResilientBatchNormPlan::kThreads, 0, plan.params);
}

}  // namespace cuda
}  // namespace seqkernels
