// What the shared library shows to the Python module: its ops are registered with torch when it is
// loaded.
#pragma once

#include <string>

#include "seqkernels/api.h"

namespace seqkernels {

// Why the ops are not registered, empty where they are.
SEQKERNELS_API const std::string& ops_error();

// Takes back the implementations of the ops on weights as they are, for Python, which knows every
// backend, to register its own.
SEQKERNELS_API void withdraw_ops_on_weights();

}  // namespace seqkernels
