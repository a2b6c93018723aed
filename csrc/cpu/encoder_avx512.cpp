// AVX-512 without bf16 products: fp32 operands, weights widened when packed.
#include <immintrin.h>

#include "cpu/encoder_model.h"

namespace seqkernels::cpu::avx512 {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_avx512.h"
#include "cpu/operand_fp32.h"
#include "cpu/left_operand.h"
#include "cpu/encoder_kernel.h"
#include "cpu/request_kernel.h"
#include "cpu/product_lanes.h"
// clang-format on

}  // namespace seqkernels::cpu::avx512

namespace seqkernels::cpu {
const EncoderKernelEntry& encoder_avx512() {
  using Kernel =
      avx512::EncoderKernel<avx512::LaneProduct<avx512::Fp32Operand<avx512::Avx512>, 8, 3>>;
  static const EncoderKernelEntry entry = Kernel::entry();
  return entry;
}
}  // namespace seqkernels::cpu
