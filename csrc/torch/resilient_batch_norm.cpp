// The batch norm's ops on the CPU.
#include "seqkernels/resilient_batch_norm.h"

#include "seqkernels/processor.h"
#include "torch/kept.h"
#include "torch/ops.h"
#include "torch/resilient_batch_norm_call.h"

namespace seqkernels::torch_abi {
namespace {

Tensor pack(const NormModel& model, const HostWeights& w) {
  Tensor packed = host_bytes(packed_norm_bytes(model.channels));
  const ChannelNorm norm{model.norm, {w.data(0), w.data(1), w.data(2), w.data(3)}};
  pack_channel_norm(model.channels, norm, packed.mutable_data<float>());
  return packed;
}

Tensor run(NormTensors t) {
  t.call.constants = t.packed.data<float>();
  t.call.num_threads = num_threads();
  run_resilient_batch_norm(t.model.isa, t.call);
  return std::move(t.out);
}

}  // namespace

void pack_resilient_batch_norm(Value* stack, uint64_t, uint64_t) {
  PackedNorm made = take_norm(stack, true);
  made.model.isa = runnable_isa(made.isa);
  Tensor packed = pack(made.model, made.weights);
  stack[0] = as_bytes(made.model).release();
  stack[1] = packed.release();
}

void resilient_batch_norm_packed(Value* stack, uint64_t, uint64_t) {
  stack[0] = run(take_norm_call(stack)).release();
}

void resilient_batch_norm(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor();
  const HostWeights weights = take_statistics(arguments);
  ResilientBatchNormOptions options;
  arguments.options(options);
  const std::string backend = arguments.text();
  arguments.done();
  check_backend(kBatchNorm, backend);

  NormModel model = model_of(weights, options);
  model.isa = default_isa();
  stack[0] = run(norm_call(std::move(x), model, pack(model, weights))).release();
}

}  // namespace seqkernels::torch_abi
