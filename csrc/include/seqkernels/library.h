// What the shared library shows to the Python module: its ops are registered with torch when it is
// loaded.
#pragma once

#include <cstdint>
#include <string>

#include "seqkernels/api.h"

namespace seqkernels {

// Why the ops are not registered, empty where they are.
SEQKERNELS_API const std::string& ops_error();

// Takes back the implementations of the ops on weights as they are, for Python, which knows every
// backend, to register its own.
SEQKERNELS_API void withdraw_ops_on_weights();

// What of a tensor `tensor.data = ...` changes. Sizes and strides are the tensor's own.
struct TensorFacts {
  const void* data = nullptr;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int32_t dtype = 0;
};

// Of the tensor that torch's handle stands for.
SEQKERNELS_API TensorFacts facts_of(void* handle);

}  // namespace seqkernels
