// AVX-512: 16 values at a time.
#include <immintrin.h>

#include "cpu/resilient_batch_norm_model.h"

namespace seqkernels::cpu::avx512 {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_avx512.h"
#include "cpu/channel_norm.h"
#include "cpu/resilient_batch_norm_kernel.h"
// clang-format on

}  // namespace seqkernels::cpu::avx512

namespace seqkernels::cpu {
const ResilientBatchNormKernelEntry& resilient_batch_norm_avx512() {
  static const ResilientBatchNormKernelEntry entry =
      avx512::ResilientBatchNormKernel<avx512::Avx512>::entry();
  return entry;
}
}  // namespace seqkernels::cpu
