// Any processor: fp32 operands in generic vectors of four lanes.
#include "cpu/linear_model.h"

namespace seqkernels::cpu::portable {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_portable.h"
#include "cpu/operand_fp32.h"
#include "cpu/channel_norm.h"
#include "cpu/left_operand.h"
#include "cpu/product_rows.h"
#include "cpu/linear_kernel.h"
// clang-format on

}  // namespace seqkernels::cpu::portable

namespace seqkernels::cpu {
const LinearKernelEntry& linear_portable() {
  using namespace portable;
  using Kernel = LinearKernel<RowProduct<Fp32Operand<Portable<4>>, 4, 2>>;
  static const LinearKernelEntry entry = Kernel::entry();
  return entry;
}
}  // namespace seqkernels::cpu
