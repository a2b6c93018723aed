// The ops pack_linear and linear_packed.
#include "seqkernels/linear.h"

#include "seqkernels/processor.h"
#include "torch/checks.h"
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

}  // namespace

// pack_linear(Tensor?[] weights, <options>, str isa) -> (Tensor model, Tensor packed)
void pack_linear(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  std::vector<OptionalTensor> given = arguments.tensors();
  LinearOptions options;
  arguments.options(options);
  const std::string isa = arguments.text();
  arguments.done();

  const HostWeights weights(std::move(given));
  if (weights.count() != 10 || !weights[0] || weights[0]->dim() != 2)
    refuse("linear", "weights: expected a matrix, a bias and four tensors for each norm");
  LinearModel model;
  model.isa = runnable_isa(isa);
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
  const LinearParameters parameters{weights.data(0), weights.data(1),
                                    norm_of(weights, 2, shape.in_features),
                                    norm_of(weights, 6, shape.out_features)};
  model.packed_bytes = static_cast<int64_t>(linear_packed_bytes(model.isa, shape));
  Tensor packed = host_bytes(model.packed_bytes);
  seqkernels::pack_linear(model.isa, shape, parameters, packed.mutable_data<void>());
  stack[0] = as_bytes(model).release();
  stack[1] = packed.release();
}

// linear_packed(Tensor x, Tensor model, Tensor packed) -> Tensor
void linear_packed(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor();
  const Tensor bytes = arguments.tensor();
  const Tensor packed = arguments.tensor();

  const LinearModel model = from_bytes<LinearModel>("linear", bytes);
  check_packed("linear", packed, model.packed_bytes);
  const int64_t dim = x.dim(), in = model.shape.in_features,
                out_features = model.shape.out_features;
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
  stack[0] = out.release();
}

}  // namespace seqkernels::torch_abi
