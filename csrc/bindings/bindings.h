// What the bindings of the ops share: one function for each adds its classes to the module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "seqkernels/activation.h"

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

void bind_encoder(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_resilient_batch_norm(pybind11::module_& m);

}  // namespace seqkernels
