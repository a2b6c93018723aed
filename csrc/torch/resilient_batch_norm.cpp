// The batch norm's ops on the CPU.
#include "seqkernels/resilient_batch_norm.h"

#include "seqkernels/processor.h"
#include "torch/ops.h"
#include "torch/resilient_batch_norm_call.h"

namespace seqkernels::torch_abi {

void pack_resilient_batch_norm(Value* stack, uint64_t, uint64_t) {
  PackedNorm made = take_norm(stack, true);
  made.model.isa = runnable_isa(made.isa);
  Tensor packed = host_bytes(packed_norm_bytes(made.model.channels));
  const HostWeights& w = made.weights;
  const ChannelNorm norm{made.model.norm, {w.data(0), w.data(1), w.data(2), w.data(3)}};
  pack_channel_norm(made.model.channels, norm, packed.mutable_data<float>());
  stack[0] = as_bytes(made.model).release();
  stack[1] = packed.release();
}

void resilient_batch_norm_packed(Value* stack, uint64_t, uint64_t) {
  NormTensors t = take_norm_call(stack);
  t.call.constants = t.packed.data<float>();
  t.call.num_threads = num_threads();
  run_resilient_batch_norm(t.model.isa, t.call);
  stack[0] = t.out.release();
}

}  // namespace seqkernels::torch_abi
