// What the bindings of the ops share: one function for each adds its classes to the module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "seqkernels/activation.h"
#include "seqkernels/encoder.h"
#include "seqkernels/resilient_batch_norm.h"

namespace seqkernels {

template <class T>
const T* pointer(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

// `op` names the caller in the error.
inline Activation activation_of(const std::string& op, const std::string& name) {
  static const std::map<std::string, Activation> known = {{"none", Activation::kNone},
                                                          {"relu", Activation::kRelu},
                                                          {"gelu", Activation::kGelu},
                                                          {"gelu_tanh", Activation::kGeluTanh},
                                                          {"leaky_relu", Activation::kLeakyRelu}};
  const auto found = known.find(name);
  if (found == known.end()) {
    throw std::invalid_argument(
        op + ": activation: expected none, relu, gelu, gelu_tanh or leaky_relu, got '" + name +
        "'");
  }
  return found->second;
}

// Of an enumeration with `count` values.
template <class T>
T enumerator(const char* name, int value, int count) {
  if (value < 0 || value >= count) {
    throw std::invalid_argument(std::string("encoder: ") + name + ": expected 0 .. " +
                                std::to_string(count - 1) + ", got " + std::to_string(value));
  }
  return static_cast<T>(value);
}

// What Python knows of a call: backends/native_arguments.py lists the same in the same order. What
// only one device's calls have is the caller's.
EncoderCall encoder_call(uintptr_t x, bool is_bf16, int64_t batch, int64_t length, int64_t stride_b,
                         int64_t stride_l, uintptr_t candidate, int64_t candidate_dim,
                         int64_t candidate_stride, uintptr_t mask, int64_t mask_stride_b,
                         int64_t mask_stride_l, uintptr_t lengths, int fusion, int padding,
                         bool latest_last, int64_t latest_k, bool pool_max, uintptr_t out,
                         int64_t out_stride_b, int64_t out_stride_l, uintptr_t user_index,
                         int64_t users, uintptr_t computes_padding);
ResilientBatchNormCall batch_norm_call(uintptr_t x, bool is_bf16, bool channels_last, int64_t outer,
                                       int64_t inner, int64_t channels, int64_t x_stride_outer,
                                       int64_t x_stride_row, uintptr_t mean, uintptr_t var,
                                       uintptr_t weight, uintptr_t bias, double eps, double min_var,
                                       double max_abs, const std::string& activation,
                                       float negative_slope, uintptr_t out,
                                       int64_t out_stride_outer, int64_t out_stride_row);
// Pointers in the order of EncoderLayerParameters, twelve a layer; those of the final norm, or
// none.
EncoderParameters encoder_parameters(const std::vector<std::vector<uintptr_t>>& layers,
                                     const std::vector<uintptr_t>& final_norm);

void bind_content_hash(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void bind_encoder(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_resilient_batch_norm(pybind11::module_& m);

}  // namespace seqkernels
