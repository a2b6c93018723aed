// Packs torch's parameters into the operands a kernel reads.
#pragma once

#include "cpu/encoder_model.h"

namespace seqkernels::cpu {

size_t packed_bytes(const EncoderShape& shape, const OperandLayout& layout);

// `memory`: so many bytes, aligned to 64.
void pack(const EncoderShape& shape, const EncoderParameters& parameters,
          const OperandLayout& layout, void* memory);

// The model that was packed there.
PackedModel packed_model(const EncoderShape& shape, const OperandLayout& layout,
                         const void* memory);

}  // namespace seqkernels::cpu
