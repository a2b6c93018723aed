// The linear layer's ops on the CPU.
#include "seqkernels/linear.h"

#include "seqkernels/processor.h"
#include "torch/checks.h"
#include "torch/kept.h"
#include "torch/norms.h"
#include "torch/ops.h"

namespace seqkernels::torch_abi {
namespace {

// What stands beside packed weights.
struct LinearModel {
  uint64_t magic = 0x3152494c514553;
  int isa = -1;
  LinearShape shape;
  int64_t packed_bytes = 0;

  bool operator==(const LinearModel&) const = default;
};

// Four tensors of a norm, from number `first` on.
NormParameters norm_of(const HostWeights& weights, size_t first, int64_t channels) {
  for (size_t i = first; i < first + 4; ++i) {
    if (weights[i] && (weights[i]->dim() != 1 || weights[i]->size(0) != channels)) {
      refuse("linear", "weights: expected a norm of " + std::to_string(channels) +
                           " channels, got " + weights[i]->shape());
    }
  }
  return {weights.data(first), weights.data(first + 1), weights.data(first + 2),
          weights.data(first + 3)};
}

// The model of a layer's tensors, but for its instruction set.
LinearModel model_of(const HostWeights& weights, const LinearOptions& options) {
  if (weights.count() != 10 || !weights[0] || weights[0]->dim() != 2)
    refuse("linear", "weights: expected a matrix, a bias and four tensors for each norm");
  LinearModel model;
  LinearShape& shape = model.shape;
  shape.out_features = weights[0]->size(0);
  shape.in_features = weights[0]->size(1);
  shape.input_norm = norm_shape("linear", options.input_norm);
  shape.output_norm = norm_shape("linear", options.output_norm);
  shape.activation = options.activation;
  shape.negative_slope = options.negative_slope;
  shape.precision = options.precision;
  if (weights[1] && (weights[1]->dim() != 1 || weights[1]->size(0) != shape.out_features))
    refuse("linear",
           "weights: expected a bias like the rows of weight, got " + weights[1]->shape());
  return model;
}

// Packs for the model's instruction set.
Tensor pack(LinearModel& model, const HostWeights& weights) {
  const LinearShape& shape = model.shape;
  const LinearParameters parameters{weights.data(0), weights.data(1),
                                    norm_of(weights, 2, shape.in_features),
                                    norm_of(weights, 6, shape.out_features)};
  model.packed_bytes = static_cast<int64_t>(linear_packed_bytes(model.isa, shape));
  Tensor packed = host_bytes(model.packed_bytes);
  seqkernels::pack_linear(model.isa, shape, parameters, packed.mutable_data<void>());
  return packed;
}

Tensor run(Tensor x, const LinearModel& model, const Tensor& packed) {
  check_packed("linear", packed, model.packed_bytes);
  const int64_t dim = x.dim(), in = model.shape.in_features;
  const int64_t out_features = model.shape.out_features;
  if (dim == 0 || x.size(dim - 1) != in) {
    refuse("linear",
           "x: expected last dimension " + std::to_string(in) + " (in_features), got " + x.shape());
  }
  LinearCall call;
  call.is_bf16 = is_bf16("linear", x);
  std::vector<int64_t> sizes(x.sizes(), x.sizes() + dim);
  sizes.back() = out_features;
  call.rows = x.numel() / in;
  // Rows at one distance from each other are read where they are.
  if (!(dim == 2 && (x.stride(1) == 1 || in == 1)) && !x.is_contiguous()) x = x.contiguous();
  call.x_stride = dim == 2 ? x.stride(0) : in;
  Tensor out = Tensor::empty(sizes, x.dtype(), x.device_type(), x.device_index());
  call.x = x.data<void>();
  call.out = out.mutable_data<void>();
  call.out_stride = out_features;
  call.num_threads = num_threads();
  run_linear(model.isa, model.shape, packed.data<void>(), call);
  return out;
}

}  // namespace

void pack_linear(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  std::vector<OptionalTensor> given = arguments.tensors();
  LinearOptions options;
  arguments.options(options);
  const std::string isa = arguments.text();
  arguments.done();

  const HostWeights weights(std::move(given));
  LinearModel model = model_of(weights, options);
  model.isa = runnable_isa(isa);
  Tensor packed = pack(model, weights);
  return_packed(stack, model, std::move(packed));
}

void linear_packed(Value* stack, uint64_t, uint64_t) {
  auto [x, model, packed] = take_packed_call<LinearModel>("linear", stack);
  stack[0] = run(std::move(x), model, packed).release();
}

void linear(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor();
  std::vector<OptionalTensor> given = arguments.tensors();
  LinearOptions options;
  arguments.options(options);
  const std::string backend = arguments.text();
  arguments.done();
  check_backend("linear", backend);

  const HostWeights weights(std::move(given));
  LinearModel model = model_of(weights, options);
  model.isa = default_isa();
  static KeptWeights<LinearModel> kept;
  const auto found = kept.find(weights, model, [&](LinearModel& m) { return pack(m, weights); });
  stack[0] = run(std::move(x), found->model, found->packed).release();
}

}  // namespace seqkernels::torch_abi
