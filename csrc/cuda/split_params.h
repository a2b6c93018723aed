// What the kernels of the split encoder are given; their sizes.
//
// Between the launches a sequence's activations lie in the workspace, in tiles of 512 bytes in lane
// order: [sequence][strip of 16 tokens][tile of 16 columns][lane], left operands of mma.m16n8k16.
#pragma once

#include "cuda/encoder_params.h"

namespace seqkernels::cuda {

constexpr int kSplitWarps = 8;  // of a block, at most

// Of the hidden layer's columns a warp computes so many tiles at once; `column_tiles` are those of
// the model's columns that it owns.
constexpr int hidden_tiles_of(int column_tiles) {
  return column_tiles == 8 ? 2 : 1;
}

// Two sums of rows on their way between warps: [strip][sum][warp][16 rows] fp32, with 8 words
// between so that four warps' sums lie in different banks.
constexpr int kSumsStride = kTile + 8;                         // words
constexpr int kSumsBytes = 2 * 4 * kSplitWarps * kSumsStride;  // a strip

struct SplitParams {
  EncoderParams encoder;
  int64_t first_sequence;  // sequence 0 of the workspace
  int layer;
  int blocks;  // that share a sequence
  int group;   // strips that a block takes at once

  // In the workspace. `source` is what attention reads: x, or its norm.
  unsigned char* x;         // [sequence][strip][model tiles]
  unsigned char* source;    // likewise
  unsigned char* attended;  // [sequence][strip][tiles of all heads]

  // Offsets in units of 16 bytes in shared memory.
  int operand;  // [strip of the group][tile]: what all warps multiply by weights; later sums
  int hidden;   // [strip of the group][tile of a chunk]; before and after it sums
};

}  // namespace seqkernels::cuda
