// What the shared library shows to the Python module: its ops are registered with torch when it is
// loaded.
#pragma once

#include <string>

#include "seqkernels/api.h"

namespace seqkernels {

// Why the ops are not registered, empty where they are.
SEQKERNELS_API const std::string& ops_error();

}  // namespace seqkernels
