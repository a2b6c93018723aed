// The batch norm's ops on the CPU.
#include "seqkernels/resilient_batch_norm.h"

#include "seqkernels/processor.h"
#include "torch/kept.h"
#include "torch/ops.h"
#include "torch/resilient_batch_norm_call.h"

namespace seqkernels::torch_abi {
namespace {

int64_t packed_bytes(const NormModel& model) {
  return static_cast<int64_t>(packed_channel_norm_bytes(model.channels));
}

Tensor pack(const NormModel& model, const HostWeights& w) {
  Tensor packed = host_bytes(packed_bytes(model));
  const ChannelNorm norm{model.norm, {w.data(0), w.data(1), w.data(2), w.data(3)}};
  pack_channel_norm(model.channels, norm, packed.mutable_data<float>());
  return packed;
}

Tensor run(Tensor x, const NormModel& model, const Tensor& packed) {
  check_packed(kBatchNorm, packed, packed_bytes(model));
  NormTensors t = norm_call(std::move(x), model);
  t.call.constants = packed.data<float>();
  t.call.num_threads = num_threads();
  run_resilient_batch_norm(model.isa, t.call);
  return std::move(t.out);
}

}  // namespace

void pack_resilient_batch_norm(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const HostWeights weights(take_statistics(arguments));
  ResilientBatchNormOptions options;
  arguments.options(options);
  const std::string isa = arguments.text();
  arguments.done();

  NormModel model = model_of(weights, options);
  model.isa = runnable_isa(isa);
  Tensor packed = pack(model, weights);
  return_packed(stack, model, std::move(packed));
}

void resilient_batch_norm_packed(Value* stack, uint64_t, uint64_t) {
  auto [x, model, packed] = take_packed_call<NormModel>(kBatchNorm, stack);
  stack[0] = run(std::move(x), model, packed).release();
}

void resilient_batch_norm(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor();
  const HostWeights weights(take_statistics(arguments));
  ResilientBatchNormOptions options;
  arguments.options(options);
  const std::string backend = arguments.text();
  arguments.done();
  check_backend(kBatchNorm, backend);

  NormModel model = model_of(weights, options);
  model.isa = default_isa();
  stack[0] = run(std::move(x), model, pack(model, weights)).release();
}

}  // namespace seqkernels::torch_abi
