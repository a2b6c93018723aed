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
  Activation activation = Activation::kNone;
  float negative_slope = 0.0f;
};

// Mean, var, weight and bias; the first two are there.
inline std::vector<OptionalTensor> take_statistics(Arguments& arguments) {
  std::vector<OptionalTensor> taken;
  taken.push_back(arguments.tensor());
  taken.push_back(arguments.tensor());
  taken.push_back(arguments.optional_tensor());
  taken.push_back(arguments.optional_tensor());
  return taken;
}

// Their model, but for its instruction set.
template <class Tensors>
NormModel model_of(const Tensors& statistics, const ResilientBatchNormOptions& options) {
  NormModel model;
  model.channels = statistics[0]->numel();
  for (size_t i = 0; i < 4; ++i) {
    const OptionalTensor& t = statistics[i];
    if (t && (t->dim() != 1 || t->size(0) != model.channels))
      refuse(kBatchNorm, "mean, var, weight, bias: expected one shape [C], got " + t->shape());
  }
  std::vector<double> numbers{options.eps, options.min_var};
  if (options.max_abs) numbers.push_back(*options.max_abs);
  model.norm = norm_shape(kBatchNorm, numbers);
  model.activation = options.activation;
  model.negative_slope = options.negative_slope;
  return model;
}

// A call whose constants or statistics are to be set.
struct NormTensors {
  Tensor x, out;
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

inline NormTensors norm_call(Tensor x, const NormModel& model) {
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
  return {std::move(x), std::move(out), model, call};
}

}  // namespace seqkernels::torch_abi
