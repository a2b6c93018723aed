// The packed linear layer and the contract between the dispatcher (linear.cpp) and the kernels (one
// source an instruction set). Operands, pairs and steps are those of encoder_model.h.
//
// A thread takes a block of rows of x to a *panel*, tiles of 16 rows by 16 words (1 KB) that every
// product engine reads as its left operand:
//     [row / 16][step / 16][row % 16][step % 16]   32-bit words
// The weights are the right operand, strips of `lanes` features: [feature / lanes][step][lane].
#pragma once

#include <cstdint>

#include "cpu/channel_norm_pack.h"
#include "cpu/encoder_model.h"
#include "seqkernels/linear.h"

namespace seqkernels::cpu {

constexpr int kPanelRows = 16;   // of a tile
constexpr int kPanelSteps = 16;  // of a tile

struct PackedLinear {
  int64_t in_features = 0;
  int64_t out_features = 0;
  int steps = 0;                     // of K, padded to whole tiles
  int64_t strips = 0;                // of F
  const uint32_t* weight = nullptr;  // [strip][step][lane], zero where it pads
  const float* bias = nullptr;       // [F, padded]; in output_norm.offset where there is one
  PackedChannelNorm input_norm;      // arrays padded to whole vectors
  PackedChannelNorm output_norm;
  Activation activation = Activation::kNone;
  float negative_slope = 0.01f;
};

// Rows [row_begin, row_end) by feature strips [strip_begin, strip_end) of a call.
struct LinearTask {
  int64_t row_begin, row_end;
  int64_t strip_begin, strip_end;
};

// What a kernel source exports.
struct LinearKernelEntry {
  int lanes;  // features of a strip
  int pair;   // elements of K in a word
  // Fills the panel with a task's rows, then computes it. `panel` holds the rows, rounded up to
  // whole tiles, 64-byte aligned.
  void (*run)(const PackedLinear& layer, const LinearCall& call, const LinearTask& task,
              uint32_t* panel);
  // Called by each thread before its first and after its last `run` of a call.
  void (*enter)();
  void (*leave)();
};

// As the functions without `cpu::`, on this kernel, which must be able to run here.
size_t linear_packed_bytes(const LinearKernelEntry& kernel, const LinearShape& shape);
void pack_linear(const LinearKernelEntry& kernel, const LinearShape& shape,
                 const LinearParameters& parameters, void* packed);
void run_linear(const LinearKernelEntry& kernel, const LinearShape& shape, const void* packed,
                const LinearCall& call);

const LinearKernelEntry& linear_portable();
const LinearKernelEntry& linear_amx_emulated();
const LinearKernelEntry& linear_avx2();
const LinearKernelEntry& linear_avx512();
const LinearKernelEntry& linear_avx512_bf16();
const LinearKernelEntry& linear_amx_bf16();

}  // namespace seqkernels::cpu
