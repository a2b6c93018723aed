// Instruction sets: which were compiled in, which this processor and operating system can run.
#pragma once

#include <string>
#include <vector>

namespace seqkernels {

// Best first. The emulated tile set runs anywhere, is slow, and is meant for tests only.
const std::vector<std::string>& isa_names();

// Every unmet condition of the named set, empty when it can run. Asks the operating system for the
// tile registers where the set needs them. Throws std::invalid_argument for an unknown name.
std::vector<std::string> isa_unsupported_reasons(const std::string& name);

// The processor's own name for itself, "unknown" where it has none.
std::string processor_name();

}  // namespace seqkernels
