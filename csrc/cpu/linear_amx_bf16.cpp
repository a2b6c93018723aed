// AMX-BF16: tdpbf16ps multiplies a 16 x 32 by a 32 x 16 tile of bf16 and adds to 16 x 16 fp32.
#include <immintrin.h>

#include "cpu/linear_model.h"

namespace seqkernels::cpu::amx_bf16 {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_avx512.h"
#include "cpu/operand_bf16_avx512.h"
#include "cpu/channel_norm.h"
#include "cpu/left_operand.h"
#include "cpu/product_tiles.h"
#include "cpu/tiles_amx.h"
#include "cpu/product_rows.h"
#include "cpu/linear_kernel.h"
// clang-format on

}  // namespace seqkernels::cpu::amx_bf16

namespace seqkernels::cpu {
const LinearKernelEntry& linear_amx_bf16() {
  using namespace amx_bf16;
  using Kernel = LinearKernel<RowTileProduct<TileProduct<Bf16Avx512, AmxTiles>>>;
  static const LinearKernelEntry entry = Kernel::entry();
  return entry;
}
}  // namespace seqkernels::cpu
