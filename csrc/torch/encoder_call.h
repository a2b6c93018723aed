// What the encoder's ops share, whichever device runs them: the model beside packed weights, the
// tensors of a call, and their checks.
#pragma once

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "seqkernels/encoder.h"
#include "torch/checks.h"

namespace seqkernels::torch_abi {

constexpr size_t kPerLayer = 12;

// What stands beside packed weights.
struct EncoderModel {
  uint64_t magic = 0x314e45534b514553;
  int isa = -1;  // of the CPU's kernels
  EncoderShape shape;
  EncoderCallOptions options;
  int64_t packed_bytes = 0;

  bool operator==(const EncoderModel&) const = default;
};

// Shapes are read off the weights; absent ones are null.
inline EncoderShape shape_of(const HostWeights& weights, const EncoderOptions& options) {
  const size_t layers = weights.count() / kPerLayer, extra = weights.count() % kPerLayer;
  if (layers == 0 || (extra != 0 && extra != 2)) {
    refuse("encoder", "weights: expected 12 per layer and 0 or 2 for the final norm, got " +
                          std::to_string(weights.count()));
  }
  if (!weights[0] || weights[0]->dim() != 2 || !weights[4] || weights[4]->dim() != 2)
    refuse("encoder", "weights: expected matrices for in_proj_weight and linear1.weight");
  EncoderShape shape;
  static_cast<EncoderModelOptions&>(shape) = options;
  shape.d_model = static_cast<int>(weights[0]->size(1));
  shape.dim_feedforward = static_cast<int>(weights[4]->size(0));
  shape.num_layers = static_cast<int>(layers);
  shape.has_final_norm = extra == 2;
  if (shape.nhead < 1 || shape.d_model % shape.nhead != 0) {
    refuse("encoder", "nhead: expected a divisor of d_model = " + std::to_string(shape.d_model) +
                          ", got " + std::to_string(shape.nhead));
  }
  const int64_t d = shape.d_model, f = shape.dim_feedforward;
  const std::vector<int64_t> expected[kPerLayer] = {{3 * d, d}, {3 * d}, {d, d}, {d}, {f, d}, {f},
                                                    {d, f},     {d},     {d},    {d}, {d},    {d}};
  for (size_t i = 0; i < weights.count(); ++i) {
    if (!weights[i]) continue;
    const std::vector<int64_t>& sizes =
        i < layers * kPerLayer ? expected[i % kPerLayer] : expected[8];
    const Tensor& w = *weights[i];
    if (std::vector<int64_t>(w.sizes(), w.sizes() + w.dim()) != sizes)
      refuse("encoder", "weights: expected another shape of number " + std::to_string(i) +
                            ", got " + w.shape());
  }
  return shape;
}

inline EncoderParameters parameters_of(const HostWeights& weights, const EncoderShape& shape) {
  EncoderParameters made;
  for (size_t n = 0; n < static_cast<size_t>(shape.num_layers); ++n) {
    const auto at = [&](size_t i) { return weights.data(n * kPerLayer + i); };
    made.layers.push_back(
        {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11)});
  }
  if (shape.has_final_norm) {
    made.final_norm_weight = weights.data(weights.count() - 2);
    made.final_norm_bias = weights.data(weights.count() - 1);
  }
  return made;
}

// The tensors of a call, as the kernel reads them.
struct EncoderTensors {
  Tensor x;
  OptionalTensor candidate, user_index, mask, lengths;
  OptionalTensor computes_padding;  // [1] bool, see EncoderCall
  EncoderModel model;
  Tensor packed;
  const char* op() const { return user_index ? "request_scoring" : "encoder"; }
};

inline void check_tensors(const EncoderTensors& t) {
  const EncoderModel& model = t.model;
  const std::string op = t.op();
  const int64_t d = model.shape.d_model;
  const char* const x_name = t.user_index ? "events" : "x";
  if (t.x.dim() != 3)
    refuse(op, std::string(x_name) + ": expected 3 dimensions [B, L, E], got " + t.x.shape());
  const int32_t device = t.x.device_type(), index = t.x.device_index();
  const int64_t rows = t.x.size(0), length = t.x.size(1), width = t.x.size(2);
  const Fusion fusion = model.options.fusion;
  if ((fusion == Fusion::kNone) == t.candidate.has_value())
    refuse(op, "candidate: expected exactly with fusion 'concat' or 'append'");
  int64_t c = 0;
  if (t.candidate) {
    const Tensor& candidate = *t.candidate;
    check_on(op, "candidate", candidate, device, index);
    if (candidate.dim() != 2)
      refuse(op, "candidate: expected shape [B, C], got " + candidate.shape());
    if (candidate.dtype() != t.x.dtype()) refuse(op, "candidate: expected the dtype of x");
    c = candidate.size(1);
    if (!t.user_index && candidate.size(0) != rows)
      refuse(op, "candidate: expected " + std::to_string(rows) + " rows, got " + candidate.shape());
  }
  const bool append = fusion == Fusion::kAppend;
  if (append ? width != d || c != d : width + c != d) {
    refuse(op, std::string(x_name) +
                   ": expected last dimensions that fit d_model = " + std::to_string(d) + ", got " +
                   std::to_string(width) + " and " + std::to_string(c));
  }
  if (t.user_index) {
    check_on(op, "user_index", *t.user_index, device, index);
    if (t.user_index->dim() != 1 || !t.candidate || t.user_index->size(0) != t.candidate->size(0))
      refuse(op, "user_index: expected shape [N] like candidates, got " + t.user_index->shape());
  }
  if (t.mask && t.lengths)
    refuse(op, "lengths: expected None beside key_padding_mask, got a tensor");
  if (t.mask) {
    check_on(op, "key_padding_mask", *t.mask, device, index);
    if (t.mask->dim() != 2 || t.mask->size(0) != rows || t.mask->size(1) != length)
      refuse(op, "key_padding_mask: expected shape [B, L], got " + t.mask->shape());
    if (t.mask->dtype() != torch.aoti_torch_dtype_bool())
      refuse(op, "key_padding_mask: expected bool, got " + dtype_name(t.mask->dtype()));
  }
  if (t.lengths) {
    check_on(op, "lengths", *t.lengths, device, index);
    if (t.lengths->dim() != 1 || t.lengths->size(0) != rows)
      refuse(op, "lengths: expected shape [B], got " + t.lengths->shape());
  }
}

// Not filled; a full sequence lies in memory in the order of x's dimensions.
inline Tensor new_output(const EncoderTensors& t) {
  const EncoderModel& model = t.model;
  const int64_t d = model.shape.d_model, k = model.options.latest_k;
  const int64_t batch = t.user_index ? t.candidate->size(0) : t.x.size(0);
  const int32_t dtype = t.x.dtype(), device = t.x.device_type(), index = t.x.device_index();
  if (k >= 0)
    return Tensor::empty({batch, (k + (model.options.pool_max() ? 1 : 0)) * d}, dtype, device,
                         index);
  const int64_t tokens = t.x.size(1) + (model.options.fusion == Fusion::kAppend ? 1 : 0);
  const bool transposed = !t.user_index && t.x.stride(0) > 0 && t.x.stride(0) < t.x.stride(1);
  const int64_t w = std::max<int64_t>(d, 1);
  const std::vector<int64_t> strides =
      transposed ? std::vector<int64_t>{w, std::max<int64_t>(batch, 1) * w, 1}
                 : std::vector<int64_t>{std::max<int64_t>(tokens, 1) * w, w, 1};
  return Tensor::empty({batch, tokens, d}, strides, dtype, device, index);
}

inline EncoderCall call_of(const EncoderTensors& t, const Tensor& out) {
  const EncoderModel& model = t.model;
  EncoderCall call;
  static_cast<EncoderCallOptions&>(call) = model.options;
  call.x = t.x.data<void>();
  call.is_bf16 = is_bf16(t.op(), t.x);
  call.batch = out.size(0);
  call.length = t.x.size(1);
  call.stride_b = t.x.stride(0);
  call.stride_l = t.x.stride(1);
  if (t.candidate) {
    call.candidate = t.candidate->data<void>();
    call.candidate_dim = t.candidate->size(1);
    call.candidate_stride = t.candidate->stride(0);
  }
  if (t.mask) {
    call.mask = t.mask->data<uint8_t>();
    call.mask_stride_b = t.mask->stride(0);
    call.mask_stride_l = t.mask->stride(1);
  }
  if (t.lengths) call.lengths = t.lengths->data<int64_t>();
  if (t.user_index) {
    call.user_index = t.user_index->data<int64_t>();
    call.users = t.x.size(0);
  }
  if (t.computes_padding) {
    const Tensor& flag = *t.computes_padding;
    check_on(t.op(), "computes_padding", flag, t.x.device_type(), t.x.device_index());
    const int32_t dtype = flag.dtype();
    const bool is_byte =
        dtype == torch.aoti_torch_dtype_bool() || dtype == torch.aoti_torch_dtype_uint8();
    if (!is_byte || flag.dim() != 1 || flag.size(0) != 1)
      refuse(t.op(), "computes_padding: expected [1] bool or uint8, got " + flag.shape());
    call.computes_padding = t.computes_padding->data<uint8_t>();
  }
  call.out = out.mutable_data<void>();
  call.out_stride_b = out.stride(0);
  call.out_stride_l = call.latest_k < 0 ? out.stride(1) : 0;
  return call;
}

// The model of weights, which are then packed; an instruction set and packed_bytes are to be set.
inline EncoderModel model_of(const HostWeights& weights, const EncoderOptions& options) {
  EncoderModel model;
  model.shape = shape_of(weights, options);
  model.options = options;
  return model;
}

// The arguments of an op that packs.
struct PackedEncoder {
  EncoderModel model;
  std::string isa;
  HostWeights weights;
};

inline PackedEncoder take_weights(Value* stack, bool has_isa) {
  Arguments arguments(stack);
  std::vector<OptionalTensor> given = arguments.tensors();
  EncoderOptions options;
  arguments.options(options);
  const std::string isa = has_isa ? arguments.text() : "";
  arguments.done();
  HostWeights weights(std::move(given));
  EncoderModel model = model_of(weights, options);
  return {model, isa, std::move(weights)};
}

// Checks the tensors of a call, and makes of them what a kernel reads.
inline void prepare(EncoderTensors& t) {
  const std::string op = t.op();
  check_packed(op, t.packed, t.model.packed_bytes);
  check_tensors(t);
  is_bf16(op, t.x);
  t.x = readable(std::move(t.x));
  if (t.candidate) t.candidate = readable(std::move(*t.candidate));
  if (t.lengths) t.lengths = whole_numbers(op, "lengths", std::move(*t.lengths));
  if (t.user_index) t.user_index = whole_numbers(op, "user_index", std::move(*t.user_index));
}

// Takes the arguments of encoder_packed.
inline EncoderTensors take_tensors(Arguments& arguments) {
  Tensor x = arguments.tensor();
  OptionalTensor optional[5];
  for (OptionalTensor& tensor : optional) tensor = arguments.optional_tensor();
  const Tensor model = arguments.tensor();
  EncoderTensors t{std::move(x),
                   std::move(optional[0]),
                   std::move(optional[1]),
                   std::move(optional[2]),
                   std::move(optional[3]),
                   std::move(optional[4]),
                   from_bytes<EncoderModel>("encoder", model),
                   arguments.tensor()};
  prepare(t);
  return t;
}

// Throws unless the caller's memory is like the output.
inline void check_output(const EncoderTensors& t, const Tensor& out) {
  const Tensor like = new_output(t);
  bool same = out.dim() == like.dim() && out.dtype() == like.dtype();
  for (int64_t i = 0; same && i < out.dim(); ++i) same = out.size(i) == like.size(i);
  if (!same)
    refuse(t.op(), "out: expected " + like.shape() + " of the dtype of x, got " + out.shape());
  check_on(t.op(), "out", out, t.x.device_type(), t.x.device_index());
  if (out.numel() > 0 && out.stride(out.dim() - 1) != 1)
    refuse(t.op(), "out: expected a contiguous last dimension");
}

// Whether there is nothing to encode: no sequences, or sequences without events.
inline bool is_empty(const EncoderTensors& t, const Tensor& out) {
  return out.numel() == 0 || (t.x.size(1) == 0 && t.model.options.fusion != Fusion::kAppend);
}

}  // namespace seqkernels::torch_abi
