// AVX2: 8 values at a time.
#include <immintrin.h>

#include "cpu/resilient_batch_norm_model.h"

namespace seqkernels::cpu::avx2 {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_avx2.h"
#include "cpu/channel_norm.h"
#include "cpu/resilient_batch_norm_kernel.h"
// clang-format on

}  // namespace seqkernels::cpu::avx2

namespace seqkernels::cpu {
const ResilientBatchNormKernelEntry& resilient_batch_norm_avx2() {
  static const ResilientBatchNormKernelEntry entry =
      avx2::ResilientBatchNormKernel<avx2::Avx2>::entry();
  return entry;
}
}  // namespace seqkernels::cpu
