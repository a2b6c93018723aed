// Calls as Python describes them; the same for every device.
#include <cmath>
#include <limits>
#include <stdexcept>

#include "bindings/bindings.h"

namespace seqkernels {
namespace {

EncoderLayerParameters layer_of(const std::vector<uintptr_t>& p) {
  if (p.size() != 12) {
    throw std::invalid_argument("encoder: layers: expected 12 pointers a layer, got " +
                                std::to_string(p.size()));
  }
  const auto at = [&](size_t i) { return pointer<float>(p[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11)};
}

// A bound must not grow, nor vanish, when it becomes fp32.
float bound_of(double value) {
  const float nearest = static_cast<float>(value);
  return nearest > value ? std::nextafter(nearest, 0.0f) : nearest;
}
float floor_of(double value) {
  const float nearest = static_cast<float>(value);
  return value > 0 && nearest == 0 ? std::numeric_limits<float>::denorm_min() : nearest;
}

}  // namespace

EncoderCall encoder_call(uintptr_t x, bool is_bf16, int64_t batch, int64_t length, int64_t stride_b,
                         int64_t stride_l, uintptr_t candidate, int64_t candidate_dim,
                         int64_t candidate_stride, uintptr_t mask, int64_t mask_stride_b,
                         int64_t mask_stride_l, uintptr_t lengths, int fusion, int padding,
                         bool latest_last, int64_t latest_k, bool pool_max, uintptr_t out,
                         int64_t out_stride_b, int64_t out_stride_l, uintptr_t user_index,
                         int64_t users, uintptr_t computes_padding) {
  EncoderCall call;
  call.x = pointer<void>(x);
  call.is_bf16 = is_bf16;
  call.batch = batch;
  call.length = length;
  call.stride_b = stride_b;
  call.stride_l = stride_l;
  call.candidate = pointer<void>(candidate);
  call.candidate_dim = candidate_dim;
  call.candidate_stride = candidate_stride;
  call.mask = pointer<uint8_t>(mask);
  call.mask_stride_b = mask_stride_b;
  call.mask_stride_l = mask_stride_l;
  call.lengths = pointer<int64_t>(lengths);
  call.fusion = enumerator<Fusion>("fusion", fusion, 3);
  call.padding = enumerator<Padding>("padding", padding, 3);
  call.latest_last = latest_last;
  call.latest_k = latest_k;
  call.pool_max = pool_max;
  call.out = reinterpret_cast<void*>(out);
  call.out_stride_b = out_stride_b;
  call.out_stride_l = out_stride_l;
  call.user_index = pointer<int64_t>(user_index);
  call.users = users;
  call.computes_padding = pointer<uint8_t>(computes_padding);
  return call;
}

EncoderParameters encoder_parameters(const std::vector<std::vector<uintptr_t>>& layers,
                                     const std::vector<uintptr_t>& final_norm) {
  if (!final_norm.empty() && final_norm.size() != 2) {
    throw std::invalid_argument("encoder: final_norm: expected no or 2 pointers, got " +
                                std::to_string(final_norm.size()));
  }
  EncoderParameters parameters;
  for (const auto& layer : layers) parameters.layers.push_back(layer_of(layer));
  if (!final_norm.empty()) {
    parameters.final_norm_weight = pointer<float>(final_norm[0]);
    parameters.final_norm_bias = pointer<float>(final_norm[1]);
  }
  return parameters;
}

ResilientBatchNormCall batch_norm_call(uintptr_t x, bool is_bf16, bool channels_last, int64_t outer,
                                       int64_t inner, int64_t channels, int64_t x_stride_outer,
                                       int64_t x_stride_row, uintptr_t mean, uintptr_t var,
                                       uintptr_t weight, uintptr_t bias, double eps, double min_var,
                                       double max_abs, const std::string& activation,
                                       float negative_slope, uintptr_t out,
                                       int64_t out_stride_outer, int64_t out_stride_row) {
  ResilientBatchNormCall call;
  call.x = pointer<void>(x);
  call.is_bf16 = is_bf16;
  call.channels_last = channels_last;
  call.outer = outer;
  call.inner = inner;
  call.channels = channels;
  call.x_stride_outer = x_stride_outer;
  call.x_stride_row = x_stride_row;
  call.norm = {pointer<float>(mean), pointer<float>(var),     pointer<float>(weight),
               pointer<float>(bias), static_cast<float>(eps), floor_of(min_var),
               bound_of(max_abs)};
  call.activation = activation_of("resilient_batch_norm", activation);
  call.negative_slope = negative_slope;
  call.out = reinterpret_cast<void*>(out);
  call.out_stride_outer = out_stride_outer;
  call.out_stride_row = out_stride_row;
  return call;
}

}  // namespace seqkernels
