// The AMX kernel with its tile instructions and vectors emulated: runs, slowly, on any processor,
// so that the algorithm is tested where there are no tiles. Never chosen by itself.
#include "cpu/encoder_model.h"

namespace seqkernels::cpu::amx_emulated {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_portable.h"
#include "cpu/operand_bf16_portable.h"
#include "cpu/left_operand.h"
#include "cpu/encoder_kernel.h"
#include "cpu/request_kernel.h"
#include "cpu/product_tiles.h"
#include "cpu/tiles_emulated.h"
// clang-format on

}  // namespace seqkernels::cpu::amx_emulated

namespace seqkernels::cpu {
const EncoderKernelEntry& encoder_amx_emulated() {
  using Operand = amx_emulated::Bf16Portable<amx_emulated::Portable<16>>;
  using Kernel =
      amx_emulated::EncoderKernel<amx_emulated::TileProduct<Operand, amx_emulated::EmulatedTiles>>;
  static const EncoderKernelEntry entry = Kernel::entry();
  return entry;
}
}  // namespace seqkernels::cpu
