// AVX512-BF16: vdpbf16ps multiplies pairs of bf16 and adds them to fp32.
#include <immintrin.h>

#include "cpu/encoder_model.h"

namespace seqkernels::cpu::avx512_bf16 {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_avx512.h"
#include "cpu/operand_bf16_avx512.h"
#include "cpu/left_operand.h"
#include "cpu/encoder_kernel.h"
#include "cpu/request_kernel.h"
#include "cpu/product_lanes.h"
// clang-format on

}  // namespace seqkernels::cpu::avx512_bf16

namespace seqkernels::cpu {
const EncoderKernelEntry& encoder_avx512_bf16() {
  using Kernel =
      avx512_bf16::EncoderKernel<avx512_bf16::LaneProduct<avx512_bf16::Bf16Avx512, 8, 3>>;
  static const EncoderKernelEntry entry = Kernel::entry();
  return entry;
}
}  // namespace seqkernels::cpu
