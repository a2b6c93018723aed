// Any processor: fp32 operands in generic vectors of four lanes.
#include "cpu/encoder_model.h"

namespace seqkernels::cpu::portable {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_portable.h"
#include "cpu/operand_fp32.h"
#include "cpu/left_operand.h"
#include "cpu/encoder_kernel.h"
#include "cpu/request_kernel.h"
#include "cpu/product_lanes.h"
// clang-format on

}  // namespace seqkernels::cpu::portable

namespace seqkernels::cpu {
const EncoderKernelEntry& encoder_portable() {
  using Kernel = portable::EncoderKernel<
      portable::LaneProduct<portable::Fp32Operand<portable::Portable<4>>, 4, 2>>;
  static const EncoderKernelEntry entry = Kernel::entry();
  return entry;
}
}  // namespace seqkernels::cpu
