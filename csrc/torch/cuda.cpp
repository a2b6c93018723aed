// The ops on a CUDA device. A launch neither waits nor allocates device memory but the output and,
// for long or wide sequences and for requests, a workspace from torch's allocator, so that a CUDA
// graph can capture it.
#include <cstring>

#include "seqkernels/cuda_encoder.h"
#include "seqkernels/cuda_request_scoring.h"
#include "seqkernels/cuda_resilient_batch_norm.h"
#include "torch/encoder_call.h"
#include "torch/ops.h"
#include "torch/resilient_batch_norm_call.h"

namespace seqkernels::torch_abi {
namespace {

void raise(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

// The tensor's device as the current one, and torch's stream there. In emulation, on tensors in
// host memory, there is neither.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.device_index()) {
    if (tensor.device_type() == torch.aoti_torch_device_type_cpu()) return;
    SEQKERNELS_TORCH(aoti_torch_create_device_guard, index_, &guard_);
    check(cuda_stream_function()(index_, &stream_), "aoti_torch_get_current_cuda_stream");
  }
  ~OnDevice() {
    if (guard_) torch.aoti_torch_delete_device_guard(guard_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  int index() const { return index_; }
  void* stream() const { return stream_; }

 private:
  int32_t index_;
  DeviceGuardHandle guard_ = nullptr;
  void* stream_ = nullptr;
};

OptionalTensor workspace_of(int64_t bytes, const Tensor& like) {
  if (bytes <= 0) return {};
  return Tensor::empty({bytes}, torch.aoti_torch_dtype_uint8(), like.device_type(),
                       like.device_index());
}

void launch(const EncoderTensors& t, const EncoderCall& call, const OnDevice& on) {
  std::string error;
  const EncoderShape& shape = t.model.shape;
  const cuda::EncoderDevice device = cuda::encoder_device(on.index(), &error);
  raise(error);
  const void* packed = t.packed.data<void>();
  if (call.user_index) {
    const cuda::RequestPlan plan = cuda::plan_request_scoring(shape, call, device);
    if (plan.reasons.empty()) {
      const OptionalTensor workspace = workspace_of(plan.workspace_bytes, t.x);
      raise(cuda::launch_request_scoring(shape, plan, call, packed,
                                         workspace ? workspace->mutable_data<void>() : nullptr,
                                         on.stream()));
      return;
    }
  }
  const cuda::EncoderPlan plan = cuda::plan_encoder(shape, call, device);
  if (!plan.reasons.empty()) refuse("encoder", plan.reasons[0]);
  const OptionalTensor workspace = workspace_of(plan.workspace_bytes, t.x);
  raise(cuda::launch_encoder(shape, plan, call, packed,
                             workspace ? workspace->mutable_data<void>() : nullptr, on.stream()));
}

}  // namespace

void pack_encoder_cuda(Value* stack, uint64_t, uint64_t) {
  PackedEncoder made = take_weights(stack, false);
  EncoderModel& model = made.model;
  model.packed_bytes = static_cast<int64_t>(cuda::encoder_packed_bytes(model.shape));
  Tensor packed = host_bytes(model.packed_bytes);
  cuda::pack_encoder(model.shape, parameters_of(made.weights, model.shape),
                     packed.mutable_data<void>());
  return_packed(stack, model, std::move(packed));
}

void encoder_packed_cuda(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const EncoderTensors t = take_tensors(arguments);
  check_on(t.op(), "packed", t.packed, t.x.device_type(), t.x.device_index());
  const OnDevice on(t.x);
  Tensor out = new_output(t);
  EncoderCall call = call_of(t, out);
  if (call.padding == Padding::kStock) {  // only the device knows its mask
    if (call.mask && !call.computes_padding)
      refuse(t.op(), "computes_padding: expected a tensor beside padding 'stock' and a mask");
    call.padding = Padding::kZero;
  }
  if (is_empty(t, out)) {
    out.zero();
  } else {
    launch(t, call, on);
  }
  stack[0] = out.release();
}

// Statistics stay where they are, and are read as they are where they are fp32 and contiguous.
void resilient_batch_norm_cuda(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor();
  std::vector<OptionalTensor> statistics = take_statistics(arguments);
  ResilientBatchNormOptions options;
  arguments.options(options);
  arguments.done();

  const OnDevice on(x);
  const int32_t fp32 = torch.aoti_torch_dtype_float32();
  for (OptionalTensor& t : statistics) {
    if (!t) continue;
    check_on(kBatchNorm, "mean, var, weight, bias", *t, x.device_type(), x.device_index());
    if (t->dtype() != fp32 || !t->is_contiguous())
      t = t->as(fp32, x.device_type(), x.device_index());
  }
  NormTensors t = norm_call(std::move(x), model_of(statistics, options));
  const auto data = [&](size_t i) {
    return statistics[i] ? statistics[i]->data<float>() : nullptr;
  };
  static_cast<NormParameters&>(t.call.norm) = {data(0), data(1), data(2), data(3)};
  if (t.out.numel() > 0) raise(cuda::launch_resilient_batch_norm(t.call, on.stream()));
  stack[0] = t.out.release();
}

}  // namespace seqkernels::torch_abi
