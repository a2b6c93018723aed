// A hash of the bytes of several blocks of memory, to see whether their contents have changed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "seqkernels/api.h"

namespace seqkernels::cpu {

struct MemoryBlock {
  const void* data;
  size_t bytes;
};

// 64 bits of the contents, sizes and order of the blocks. Where the blocks lie and how they are
// aligned does not matter. Two different contents agree with a probability of about 2^-64. Not for
// contents that somebody chooses in order to collide.
SEQKERNELS_API uint64_t content_hash(const std::vector<MemoryBlock>& blocks);

}  // namespace seqkernels::cpu
