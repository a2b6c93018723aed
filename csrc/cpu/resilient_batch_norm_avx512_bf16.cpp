// AVX512-BF16: 16 values at a time, rounded to bf16 by one instruction.
#include <immintrin.h>

#include "cpu/resilient_batch_norm_model.h"

namespace seqkernels::cpu::avx512_bf16 {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_avx512.h"
#include "cpu/operand_bf16_avx512.h"
#include "cpu/channel_norm.h"
#include "cpu/resilient_batch_norm_kernel.h"
// clang-format on

}  // namespace seqkernels::cpu::avx512_bf16

namespace seqkernels::cpu {
const ResilientBatchNormKernelEntry& resilient_batch_norm_avx512_bf16() {
  static const ResilientBatchNormKernelEntry entry =
      avx512_bf16::ResilientBatchNormKernel<avx512_bf16::Bf16Avx512>::entry();
  return entry;
}
}  // namespace seqkernels::cpu
