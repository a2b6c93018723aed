// What the batch norm's ops share, whichever device runs them.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "seqkernels/resilient_batch_norm.h"
#include "torch/checks.h"
#include "torch/norms.h"

namespace seqkernels::torch_abi {

constexpr const char* kBatchNorm = "resilient_batch_norm";

// What stands beside packed constants.
struct NormModel {
  uint64_t magic = 0x314d524f4e514553;
  int isa = -1;  // of the CPU's kernels
  int64_t channels = 0;
  NormShape norm;
  bool has_weight = false, has_bias = false;
  Activation activation = Activation::kNone;
  float negative_slope = 0.0f;
};

// The model of mean, var, weight and bias, but for its instruction set.
inline NormModel model_of(const HostWeights& weights, const ResilientBatchNormOptions& options) {
  NormModel model;
  model.channels = weights[0]->numel();
  for (size_t i = 0; i < weights.count(); ++i) {
    const OptionalTensor& w = weights[i];
    if (w && (w->dim() != 1 || w->size(0) != model.channels))
      refuse(kBatchNorm, "mean, var, weight, bias: expected one shape [C], got " + w->shape());
  }
  std::vector<double> numbers{options.eps, options.min_var};
  if (options.max_abs) numbers.push_back(*options.max_abs);
  model.norm = norm_shape(kBatchNorm, numbers);
  model.has_weight = weights[2].has_value();
  model.has_bias = weights[3].has_value();
  model.activation = options.activation;
  model.negative_slope = options.negative_slope;
  return model;
}

// Takes mean, var, weight and bias.
inline HostWeights take_statistics(Arguments& arguments) {
  std::vector<OptionalTensor> given;
  given.push_back(arguments.tensor());
  given.push_back(arguments.tensor());
  given.push_back(arguments.optional_tensor());
  given.push_back(arguments.optional_tensor());
  return HostWeights(std::move(given));
}

// The arguments of an op that packs.
struct PackedNorm {
  NormModel model;
  std::string isa;
  HostWeights weights;
};

inline PackedNorm take_norm(Value* stack, bool has_isa) {
  Arguments arguments(stack);
  HostWeights weights = take_statistics(arguments);
  ResilientBatchNormOptions options;
  arguments.options(options);
  const std::string isa = has_isa ? arguments.text() : "";
  arguments.done();
  const NormModel model = model_of(weights, options);
  return {model, isa, std::move(weights)};
}

inline int64_t packed_norm_bytes(int64_t channels) {
  return 4 * channels * static_cast<int64_t>(sizeof(float));
}

// A call of resilient_batch_norm_packed, whose constants are to be set.
struct NormTensors {
  Tensor x, packed, out;
  NormModel model;
  ResilientBatchNormCall call;
};

// How [N, C] or [N, C, L] lies in memory. Dimensions -1: there is none.
struct NormRows {
  bool channels_last;
  int64_t outer, inner, outer_dim, row_dim;
};

inline NormRows norm_rows(const Tensor& x) {
  if (x.dim() == 2) return {true, 1, x.size(0), -1, 0};
  const bool channels_last = 0 < x.stride(1) && x.stride(1) < x.stride(2);
  return {channels_last, x.size(0), x.size(2), 0, channels_last ? 2 : 1};
}

inline NormTensors norm_call(Tensor x, const NormModel& model, Tensor packed) {
  check_packed(kBatchNorm, packed, packed_norm_bytes(model.channels));
  check_on(kBatchNorm, "packed", packed, x.device_type(), x.device_index());
  if ((x.dim() != 2 && x.dim() != 3) || x.size(1) != model.channels) {
    refuse(kBatchNorm, "x: expected [N, C] or [N, C, L] with C = " +
                           std::to_string(model.channels) + ", got " + x.shape());
  }
  ResilientBatchNormCall call;
  call.is_bf16 = is_bf16(kBatchNorm, x);
  NormRows rows = norm_rows(x);
  if (x.stride(x.dim() == 3 && !rows.channels_last ? 2 : 1) != 1) {
    // Channels stay last where they were.
    x = x.dim() == 3 && rows.channels_last ? x.contiguous_transposed() : x.contiguous();
    rows = norm_rows(x);
  }
  const std::vector<int64_t> sizes(x.sizes(), x.sizes() + x.dim());
  std::vector<int64_t> strides{sizes[1], 1};
  if (x.dim() == 3 && rows.channels_last) strides = {sizes[1] * sizes[2], 1, sizes[1]};
  if (x.dim() == 3 && !rows.channels_last) strides = {sizes[1] * sizes[2], sizes[2], 1};
  Tensor out = Tensor::empty(sizes, strides, x.dtype(), x.device_type(), x.device_index());

  call.x = x.data<void>();
  call.out = out.mutable_data<void>();
  call.channels_last = rows.channels_last;
  call.outer = rows.outer;
  call.inner = rows.inner;
  call.channels = model.channels;
  call.x_stride_outer = rows.outer_dim < 0 ? 0 : x.stride(rows.outer_dim);
  call.x_stride_row = x.stride(rows.row_dim);
  call.out_stride_outer = rows.outer_dim < 0 ? 0 : strides[static_cast<size_t>(rows.outer_dim)];
  call.out_stride_row = strides[static_cast<size_t>(rows.row_dim)];
  static_cast<NormShape&>(call.norm) = model.norm;
  call.activation = model.activation;
  call.negative_slope = model.negative_slope;
  return {std::move(x), std::move(packed), std::move(out), model, call};
}

// Takes the arguments of resilient_batch_norm_packed.
inline NormTensors take_norm_call(Value* stack) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor();
  const Tensor bytes = arguments.tensor();
  Tensor packed = arguments.tensor();
  const NormModel model = from_bytes<NormModel>(kBatchNorm, bytes);
  return norm_call(std::move(x), model, std::move(packed));
}

}  // namespace seqkernels::torch_abi
