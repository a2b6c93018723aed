// Any processor: four values at a time in generic vectors.
#include "cpu/resilient_batch_norm_model.h"

namespace seqkernels::cpu::portable {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_portable.h"
#include "cpu/channel_norm.h"
#include "cpu/resilient_batch_norm_kernel.h"
// clang-format on

}  // namespace seqkernels::cpu::portable

namespace seqkernels::cpu {
const ResilientBatchNormKernelEntry& resilient_batch_norm_portable() {
  static const ResilientBatchNormKernelEntry entry =
      portable::ResilientBatchNormKernel<portable::Portable<4>>::entry();
  return entry;
}
}  // namespace seqkernels::cpu
