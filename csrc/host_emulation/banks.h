// How many passes over the banks of shared memory, and how many sectors of global memory, a
// warp-wide access takes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace seqkernels::host_emulation {

struct Wavefronts {
  int taken = 0, ideal = 0;
};

// The lanes served at once: at most 32 words, each bank one word a pass. Equal words are one.
inline int passes(const uint32_t* words, int count) {
  uint32_t seen[32][32];
  int depth[32] = {};
  int most = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t bank = words[i] % 32;
    int at = 0;
    while (at < depth[bank] && seen[bank][at] != words[i]) ++at;
    if (at < depth[bank]) continue;
    seen[bank][depth[bank]++] = words[i];
    most = std::max(most, depth[bank]);
  }
  return most;
}

// `offsets` are those of the lanes in `active`. Accesses of 8 bytes are served by halves of a
// warp, those of 16 bytes by quarters.
inline Wavefronts wavefronts(const uint32_t (&offsets)[32], uint32_t active, int bytes) {
  const int words_each = bytes / 4, lanes_at_once = 32 / words_each;
  Wavefronts w;
  for (int first = 0; first < 32; first += lanes_at_once) {
    uint32_t words[32];
    int count = 0;
    for (int lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(active >> lane & 1)) continue;
      for (int i = 0; i < words_each; ++i) {
        words[count++] = offsets[lane] / 4 + static_cast<uint32_t>(i);
      }
    }
    if (count == 0) continue;
    w.taken += passes(words, count);
    ++w.ideal;
  }
  return w;
}

// Distinct 32-byte sectors; an access lies in one.
inline int sectors(const uint64_t (&addresses)[32], uint32_t active) {
  uint64_t all[32];
  int count = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (active >> lane & 1) all[count++] = addresses[lane] / 32;
  }
  std::sort(all, all + count);
  return static_cast<int>(std::unique(all, all + count) - all);
}

}  // namespace seqkernels::host_emulation
