// AMX-BF16: tdpbf16ps multiplies a 16 x 32 by a 32 x 16 tile of bf16 and adds to 16 x 16 fp32.
#include <immintrin.h>

#include "cpu/encoder_model.h"

namespace seqkernels::cpu::amx_bf16 {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_avx512.h"
#include "cpu/operand_bf16_avx512.h"
#include "cpu/left_operand.h"
#include "cpu/encoder_kernel.h"
#include "cpu/request_kernel.h"
#include "cpu/product_tiles.h"
#include "cpu/tiles_amx.h"
// clang-format on

}  // namespace seqkernels::cpu::amx_bf16

namespace seqkernels::cpu {
const EncoderKernelEntry& encoder_amx_bf16() {
  using Kernel =
      amx_bf16::EncoderKernel<amx_bf16::TileProduct<amx_bf16::Bf16Avx512, amx_bf16::AmxTiles>>;
  static const EncoderKernelEntry entry = Kernel::entry();
  return entry;
}
}  // namespace seqkernels::cpu
