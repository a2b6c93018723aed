// AVX512-BF16: vdpbf16ps multiplies pairs of bf16 and adds them to fp32.
#include <immintrin.h>

#include "cpu/linear_model.h"

namespace seqkernels::cpu::avx512_bf16 {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_avx512.h"
#include "cpu/operand_bf16_avx512.h"
#include "cpu/channel_norm.h"
#include "cpu/left_operand.h"
#include "cpu/product_rows.h"
#include "cpu/linear_kernel.h"
// clang-format on

}  // namespace seqkernels::cpu::avx512_bf16

namespace seqkernels::cpu {
const LinearKernelEntry& linear_avx512_bf16() {
  using namespace avx512_bf16;
  using Kernel = LinearKernel<RowProduct<Bf16Avx512, 8, 3>>;
  static const LinearKernelEntry entry = Kernel::entry();
  return entry;
}
}  // namespace seqkernels::cpu
