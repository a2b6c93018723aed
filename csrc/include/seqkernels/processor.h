// Instruction sets: which were compiled in, which this processor and operating system can run.
#pragma once

#include <string>
#include <vector>

#include "seqkernels/api.h"

namespace seqkernels {

// Best first. The emulated tile set runs anywhere, is slow, and is meant for tests only.
SEQKERNELS_API const std::vector<std::string>& isa_names();

// Every unmet condition of the named set, empty when it can run. Asks the operating system for the
// tile registers where the set needs them. Throws std::invalid_argument for an unknown name.
SEQKERNELS_API std::vector<std::string> isa_unsupported_reasons(const std::string& name);

// The set's place among isa_names(), by which the ops' entry points know it. Throws
// std::invalid_argument for an unknown name and for a set that cannot run here.
int runnable_isa(const std::string& name);

// The processor's own name for itself, "unknown" where it has none.
SEQKERNELS_API std::string processor_name();

}  // namespace seqkernels
