// AVX-512: fp32 operands, weights widened when packed.
#include <immintrin.h>

#include "cpu/linear_model.h"

namespace seqkernels::cpu::avx512 {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_avx512.h"
#include "cpu/operand_fp32.h"
#include "cpu/channel_norm.h"
#include "cpu/left_operand.h"
#include "cpu/product_rows.h"
#include "cpu/linear_kernel.h"
// clang-format on

}  // namespace seqkernels::cpu::avx512

namespace seqkernels::cpu {
const LinearKernelEntry& linear_avx512() {
  using namespace avx512;
  using Kernel = LinearKernel<RowProduct<Fp32Operand<Avx512>, 8, 3>>;
  static const LinearKernelEntry entry = Kernel::entry();
  return entry;
}
}  // namespace seqkernels::cpu
