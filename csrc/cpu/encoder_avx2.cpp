// AVX2 with FMA: fp32 operands, weights widened when packed.
#include <immintrin.h>

#include "cpu/encoder_model.h"

namespace seqkernels::cpu::avx2 {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_avx2.h"
#include "cpu/operand_fp32.h"
#include "cpu/left_operand.h"
#include "cpu/encoder_kernel.h"
#include "cpu/request_kernel.h"
#include "cpu/product_lanes.h"
// clang-format on

}  // namespace seqkernels::cpu::avx2

namespace seqkernels::cpu {
const EncoderKernelEntry& encoder_avx2() {
  using Kernel = avx2::EncoderKernel<avx2::LaneProduct<avx2::Fp32Operand<avx2::Avx2>, 4, 3>>;
  static const EncoderKernelEntry entry = Kernel::entry();
  return entry;
}
}  // namespace seqkernels::cpu
