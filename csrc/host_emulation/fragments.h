// The tensor-core operations of a warp on the registers of its 32 lanes, in the fragment layouts
// of the PTX ISA (mma.m16n8k16, mma.m16n8k8 and ldmatrix .b16).
#pragma once

#include <cstdint>
#include <cstring>

namespace seqkernels::host_emulation {

inline float widen_bf16(uint32_t half) {
  const uint32_t bits = half << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// One lane's operands; `a` holds kDepth / 4 registers.
struct MmaOperands {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
};

// d [16, 8] += a [16, kDepth] b [kDepth, 8]: in fp32, along k in order.
template <int kDepth>
inline void mma_warp(void* const (&lanes)[32]) {
  static_assert(kDepth == 8 || kDepth == 16);
  float a[kDepth][16], b[kDepth][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& own = *static_cast<const MmaOperands*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int r = 0; r < kDepth / 4; ++r) {
      const int row = group + r % 2 * 8, column = pair + r / 2 * 8;
      a[column][row] = widen_bf16(own.a[r] & 0xffff);
      a[column + 1][row] = widen_bf16(own.a[r] >> 16);
    }
    for (int r = 0; r < kDepth / 8; ++r) {
      const uint32_t word = r == 0 ? own.b0 : own.b1;
      b[pair + r * 8][group] = widen_bf16(word & 0xffff);
      b[pair + r * 8 + 1][group] = widen_bf16(word >> 16);
    }
    for (int r = 0; r < 4; ++r) d[group + r / 2 * 8][pair + r % 2] = own.d[r];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      const float x = a[k][row];
      for (int column = 0; column < 8; ++column) d[row][column] += x * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& own = *static_cast<const MmaOperands*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int r = 0; r < 4; ++r) own.d[r] = d[group + r / 2 * 8][pair + r % 2];
  }
}

// One lane's operands: the registers it gets, and the row whose address it gives.
struct LdmatrixOperands {
  uint32_t* r;
  const void* row;
};

// Matrix i has its rows at lanes 8 i to 8 i + 7.
template <int kMatrices, bool kTransposed>
inline void ldmatrix_warp(void* const (&lanes)[32]) {
  for (int i = 0; i < kMatrices; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      const auto& giver = *static_cast<const LdmatrixOperands*>(lanes[8 * i + row]);
      std::memcpy(matrix[row], giver.row, sizeof matrix[row]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = kTransposed ? matrix[column][row] : matrix[row][column];
      const uint32_t high = kTransposed ? matrix[column + 1][row] : matrix[row][column + 1];
      static_cast<const LdmatrixOperands*>(lanes[lane])->r[i] = low | high << 16;
    }
  }
}

}  // namespace seqkernels::host_emulation
