// The instruction sets compiled in.
#pragma once

#include "cpu/encoder_model.h"
#include "cpu/linear_model.h"
#include "cpu/resilient_batch_norm_model.h"

namespace seqkernels::cpu {

// The kernel of a set, by its place in isa_names().
const EncoderKernelEntry& encoder_kernel(int isa);
const LinearKernelEntry& linear_kernel(int isa, Precision precision);
const ResilientBatchNormKernelEntry& resilient_batch_norm_kernel(int isa);

}  // namespace seqkernels::cpu
