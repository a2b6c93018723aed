// The AMX kernel with its tile instructions and vectors emulated, for tests on any processor.
#include "cpu/linear_model.h"

namespace seqkernels::cpu::amx_emulated {

// clang-format off
#include "cpu/bf16.h"
#include "cpu/vector_math.h"
#include "cpu/vector_portable.h"
#include "cpu/operand_bf16_portable.h"
#include "cpu/channel_norm.h"
#include "cpu/left_operand.h"
#include "cpu/product_tiles.h"
#include "cpu/tiles_emulated.h"
#include "cpu/product_rows.h"
#include "cpu/linear_kernel.h"
// clang-format on

}  // namespace seqkernels::cpu::amx_emulated

namespace seqkernels::cpu {
const LinearKernelEntry& linear_amx_emulated() {
  using namespace amx_emulated;
  using Kernel =
      LinearKernel<RowTileProduct<TileProduct<Bf16Portable<Portable<16>>, EmulatedTiles>>>;
  static const LinearKernelEntry entry = Kernel::entry();
  return entry;
}
}  // namespace seqkernels::cpu
