// AVX2 with FMA: fp32 operands, weights widened when packed.
#include <immintrin.h>

#include "cpu/linear_model.h"

namespace seqkernels::cpu::avx2 {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_avx2.h"
#include "cpu/operand_fp32.h"
#include "cpu/channel_norm.h"
#include "cpu/left_operand.h"
#include "cpu/product_rows.h"
#include "cpu/linear_kernel.h"
// clang-format on

}  // namespace seqkernels::cpu::avx2

namespace seqkernels::cpu {
const LinearKernelEntry& linear_avx2() {
  using namespace avx2;
  using Kernel = LinearKernel<RowProduct<Fp32Operand<Avx2>, 4, 3>>;
  static const LinearKernelEntry entry = Kernel::entry();
  return entry;
}
}  // namespace seqkernels::cpu
