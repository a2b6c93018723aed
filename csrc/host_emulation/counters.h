// What a launch cost, by the rules of the hardware.
#pragma once

#include <cstdint>

namespace seqkernels::host_emulation {

struct Counters {
  // Operations of a warp.
  int64_t mma_m16n8k16 = 0, mma_m16n8k8 = 0, ldmatrix = 0, shuffles = 0, votes = 0;
  int64_t warp_barriers = 0;
  int64_t barriers = 0;  // of a block

  // Operations of a lane.
  int64_t exp2 = 0, rsqrt = 0, reciprocals = 0;

  // Warp-wide accesses of shared memory (ldmatrix apart), and the passes over its 32 banks that
  // they and ldmatrix take; `ideal` is their number without bank conflicts.
  int64_t shared_loads = 0, shared_stores = 0;
  int64_t shared_wavefronts = 0, shared_wavefronts_ideal = 0;

  // What the lanes asked for, and the 32-byte sectors of each warp-wide access.
  int64_t global_load_bytes = 0, global_store_bytes = 0;
  int64_t global_load_sectors = 0, global_store_sectors = 0;

  // Each sector once: what a cache that holds everything would pass to main memory.
  int64_t dram_load_bytes = 0, dram_store_bytes = 0;

  // Bytes stored more than once.
  int64_t global_restored_bytes = 0;

  int64_t mistakes = 0;  // that the emulation was told to make, and did

  int64_t shared_conflicts() const { return shared_wavefronts - shared_wavefronts_ideal; }
  bool operator==(const Counters&) const = default;
};

}  // namespace seqkernels::host_emulation
