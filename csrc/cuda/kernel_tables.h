// Which kernel runs a launch that was planned. The headers of the kernels define these, and one
// source compiles each: the launcher of a device, or a file of host_emulation.
#pragma once

#include "cuda/request_scoring_plan.h"
#include "cuda/resilient_batch_norm_plan.h"
#include "cuda/split_plan.h"

namespace seqkernels::cuda {

using EncoderKernel = void (*)(EncoderParams);
EncoderKernel encoder_kernel_of(int instance);  // an index in encoder_instances()

using SplitKernel = void (*)(SplitParams);
SplitKernel split_kernel_of(const SplitPlan& plan, SplitStep step);

using RequestKernelFunction = void (*)(RequestParams);
// `instance` in the order of request_instances().
RequestKernelFunction request_kernel_of(RequestKernel kernel, int instance);

using ResilientBatchNormKernel = void (*)(const ResilientBatchNormParams);
ResilientBatchNormKernel resilient_batch_norm_kernel_of(const ResilientBatchNormPlan& plan);

}  // namespace seqkernels::cuda
