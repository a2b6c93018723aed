// The instruction sets compiled in.
#pragma once

#include <string>

#include "cpu/encoder_model.h"
#include "cpu/linear_model.h"
#include "cpu/resilient_batch_norm_model.h"

namespace seqkernels::cpu {

// The kernel of a set; throws std::invalid_argument for an unknown name and for a set that cannot
// run here.
const EncoderKernelEntry& encoder_kernel(const std::string& isa);
const LinearKernelEntry& linear_kernel(const std::string& isa, bool fp32_operands);
const ResilientBatchNormKernelEntry& resilient_batch_norm_kernel(const std::string& isa);

}  // namespace seqkernels::cpu
