// The encoder's ops on the CPU.
#include "seqkernels/encoder.h"

#include "seqkernels/processor.h"
#include "torch/encoder_call.h"
#include "torch/kept.h"
#include "torch/ops.h"

namespace seqkernels::torch_abi {
namespace {

// Packs for the model's instruction set.
Tensor pack(EncoderModel& model, const HostWeights& weights) {
  model.packed_bytes = static_cast<int64_t>(encoder_packed_bytes(model.isa, model.shape));
  Tensor packed = host_bytes(model.packed_bytes);
  seqkernels::pack_encoder(model.isa, model.shape, parameters_of(weights, model.shape),
                           packed.mutable_data<void>());
  return packed;
}

void run(const EncoderTensors& t, const Tensor& out) {
  if (is_empty(t, out)) {
    out.zero();
    return;
  }
  EncoderCall call = call_of(t, out);
  call.num_threads = num_threads();
  run_encoder(t.model.isa, t.model.shape, t.packed.data<void>(), call);
}

// A bool mask of what a floating one ignores.
Tensor as_bool(const std::string& op, const Tensor& mask) {
  constexpr float kIgnoredBelow = -9000.0f;
  const Tensor values = mask.as(torch.aoti_torch_dtype_float32(), mask.device_type(), -1);
  Tensor made = Tensor::empty({mask.size(0), mask.size(1)}, torch.aoti_torch_dtype_bool(),
                              mask.device_type(), -1);
  const float* from = values.data<float>();
  bool* to = made.mutable_data<bool>();
  for (int64_t i = 0; i < mask.numel(); ++i) {
    to[i] = from[i] <= kIgnoredBelow;
    if (!to[i] && from[i] != 0.0f)
      refuse(op,
             "key_padding_mask: expected 0 and values below -9000, others are added to the "
             "scores by the definition, which needs Python");
  }
  return made;
}

// The ops on weights as they are.
void run_on_weights(Value* stack, bool is_request) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor();
  OptionalTensor candidate, user_index;
  if (is_request) {
    candidate = arguments.tensor();
    user_index = arguments.tensor();
  } else {
    candidate = arguments.optional_tensor();
  }
  std::vector<OptionalTensor> given = arguments.tensors();
  OptionalTensor mask = arguments.optional_tensor();
  OptionalTensor lengths = arguments.optional_tensor();
  EncoderOptions options;
  arguments.options(options);
  const std::string backend = arguments.text();
  arguments.done();
  const std::string op = is_request ? "request_scoring" : "encoder";
  check_backend(op, backend);

  const HostWeights weights(std::move(given));
  EncoderModel model = model_of(weights, options);
  model.isa = default_isa();
  static KeptWeights<EncoderModel> kept;
  const auto found = kept.find(weights, model, [&](EncoderModel& m) { return pack(m, weights); });
  if (mask && mask->dim() == 2 && mask->dtype() != torch.aoti_torch_dtype_bool())
    mask = as_bool(op, *mask);
  EncoderTensors t{std::move(x),    std::move(candidate),   std::move(user_index),
                   std::move(mask), std::move(lengths),     std::nullopt,
                   found->model,    found->packed.another()};
  prepare(t);
  Tensor out = new_output(t);
  run(t, out);
  stack[0] = out.release();
}

}  // namespace

void pack_encoder(Value* stack, uint64_t, uint64_t) {
  PackedEncoder made = take_weights(stack, true);
  made.model.isa = runnable_isa(made.isa);
  Tensor packed = pack(made.model, made.weights);
  return_packed(stack, made.model, std::move(packed));
}

void encoder_packed(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const EncoderTensors t = take_tensors(arguments);
  Tensor out = new_output(t);
  run(t, out);
  stack[0] = out.release();
}

void encoder_packed_out(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const EncoderTensors t = take_tensors(arguments);
  Tensor out = arguments.tensor();
  check_output(t, out);
  run(t, out);
  stack[0] = out.release();
}

void encoder_workspace_bytes(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor bytes = arguments.tensor();
  const int64_t tokens = static_cast<int64_t>(stack[1]);
  const EncoderModel model = from_bytes<EncoderModel>("encoder", bytes);
  stack[0] = seqkernels::encoder_workspace_bytes(model.isa, model.shape, tokens);
}

void encoder(Value* stack, uint64_t, uint64_t) {
  run_on_weights(stack, false);
}

void request_scoring(Value* stack, uint64_t, uint64_t) {
  run_on_weights(stack, true);
}

}  // namespace seqkernels::torch_abi
