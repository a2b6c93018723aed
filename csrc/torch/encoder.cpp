// The encoder's ops on the CPU.
#include "seqkernels/encoder.h"

#include "seqkernels/processor.h"
#include "torch/encoder_call.h"
#include "torch/ops.h"

namespace seqkernels::torch_abi {

void pack_encoder(Value* stack, uint64_t, uint64_t) {
  PackedEncoder made = take_weights(stack, true);
  EncoderModel& model = made.model;
  model.isa = runnable_isa(made.isa);
  model.packed_bytes = static_cast<int64_t>(encoder_packed_bytes(model.isa, model.shape));
  Tensor packed = host_bytes(model.packed_bytes);
  seqkernels::pack_encoder(model.isa, model.shape, parameters_of(made.weights, model.shape),
                           packed.mutable_data<void>());
  stack[0] = as_bytes(model).release();
  stack[1] = packed.release();
}

namespace {

void run(const EncoderTensors& t, const Tensor& out) {
  if (is_empty(t, out)) {
    out.zero();
    return;
  }
  EncoderCall call = call_of(t, out);
  call.num_threads = num_threads();
  run_encoder(t.model.isa, t.model.shape, t.packed.data<void>(), call);
}

}  // namespace

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

}  // namespace seqkernels::torch_abi
