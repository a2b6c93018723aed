// A block's shared memory: poisoned at its start, checked at every access, watched for races.
//
// Per 4 bytes: the last writer, and the readers since the last barrier. Two threads of different
// warps are in order if a barrier of the block lies between, two lanes of one warp also by a
// barrier of the warp (shuffles, votes and mma order no memory). ldmatrix reads for all lanes: what
// one lane wrote it must not read, nor one lane overwrite what it read, without a barrier between.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "host_emulation/fault.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace seqkernels::host_emulation {

// Who accesses, and when: a lane, or (ldmatrix) all of a warp.
struct Accessor {
  static constexpr int kWholeWarp = 32;
  int warp, lane;
  uint32_t epoch;  // counts the barriers of the block, over all blocks of the launch
  uint32_t order;  // counts the barriers of the warp

  uint32_t lane_mask() const { return lane == kWholeWarp ? 0xffffffffu : 1u << lane; }
  std::string text() const {
    return lane == kWholeWarp ? "warp " + std::to_string(warp)
                              : "thread " + std::to_string(32 * warp + lane);
  }
};

class SharedMemory {
 public:
  // Both halves are a signalling NaN in bf16, the whole is one in fp32.
  static constexpr uint32_t kPoison = 0x7fa07fa0u;
  static constexpr size_t kAlignment = 128;
  static constexpr size_t kMostBytes = 227 * 1024;

  SharedMemory(size_t bytes, bool unwritten_reads)
      : bytes_(bytes), unwritten_reads_(unwritten_reads), words_((bytes + 3) / 4) {
    const size_t room = (bytes / kAlignment + 1) * kAlignment;
    memory_ = static_cast<unsigned char*>(std::aligned_alloc(kAlignment, room));
    if (!memory_) throw std::bad_alloc();
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(memory_ + bytes, room - bytes);
#endif
    room_ = room;
  }
  ~SharedMemory() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_, room_);
#endif
    std::free(memory_);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  unsigned char* data() { return memory_; }
  size_t bytes() const { return bytes_; }

  // `epoch` is the first of the block.
  void start_block(uint32_t epoch) {
    first_epoch_ = epoch;
    for (size_t i = 0; i < bytes_; ++i) {
      memory_[i] = static_cast<unsigned char>(kPoison >> 8 * (i % 4));
    }
    for (Word& w : words_) w.in_flight = false;
  }

  // The offset of an access, which must lie within and be aligned.
  uint32_t offset(const char* operation, const void* p, int size, const Site& site) const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    const uintptr_t base = reinterpret_cast<uintptr_t>(memory_);
    const auto place = [&] {
      return std::string(operation) + " of " + std::to_string(size) + " bytes at offset " +
             std::to_string(static_cast<int64_t>(at - base)) + " of " + std::to_string(bytes_) +
             " at " + text(site);
    };
    if (at < base || at - base > bytes_ || bytes_ - (at - base) < static_cast<size_t>(size)) {
      throw EmulationError(Fault::kOutOfRange, "out of shared memory: " + place());
    }
    if (at % static_cast<uintptr_t>(size) != 0) {
      throw EmulationError(Fault::kMisaligned, "misaligned: " + place());
    }
    return static_cast<uint32_t>(at - base);
  }

  void check_read(uint32_t at, int size, const Accessor& who, const Site& site) {
    for (uint32_t i = at / 4; i < (at + static_cast<uint32_t>(size)) / 4; ++i) {
      Word& w = words_[i];
      if (w.in_flight) refuse_in_flight(i, who, site);
      if (w.write_epoch < first_epoch_ && !unwritten_reads_) {
        throw EmulationError(Fault::kUnwritten, "read of shared memory that was never written: " +
                                                    access(i, who, site));
      }
      if (follows_write(w, who)) refuse_race(i, "written", w.writer, w.write_site, who, site);
      if (w.read_epoch != who.epoch) {
        w.read_epoch = who.epoch;
        w.read_warps = 0;
        w.reader = -1;
      }
      if (w.reader != who.warp || w.read_order != who.order) {
        w.reader = who.warp;
        w.read_order = who.order;
        w.read_lanes = 0;
        w.read_site = site;
      }
      w.read_warps |= 1u << who.warp;
      w.read_lanes |= who.lane_mask();
    }
  }

  void check_write(uint32_t at, int size, const Accessor& who, const Site& site) {
    for (uint32_t i = at / 4; i < (at + static_cast<uint32_t>(size)) / 4; ++i) {
      Word& w = words_[i];
      if (w.in_flight) refuse_in_flight(i, who, site);
      if (follows_write(w, who)) refuse_race(i, "written", w.writer, w.write_site, who, site);
      if (follows_read(w, who)) {
        const bool own = w.read_warps == 1u << who.warp;
        int lane = 0;
        while (own && lane < 31 && !((w.read_lanes & ~who.lane_mask()) >> lane & 1)) ++lane;
        const int other_warp = own ? who.warp : lowest(w.read_warps & ~(1u << who.warp));
        refuse_race(i, "read", own ? 32 * who.warp + lane : 32 * other_warp, w.read_site, who,
                    site);
      }
      w.write_epoch = who.epoch;
      w.write_order = who.order;
      w.writer = 32 * who.warp + who.lane;
      w.write_site = site;
    }
  }

  void set_in_flight(uint32_t at, int size, bool in_flight) {
    for (uint32_t i = at / 4; i < (at + static_cast<uint32_t>(size)) / 4; ++i) {
      words_[i].in_flight = in_flight;
    }
  }

 private:
  struct Word {
    uint32_t write_epoch = 0, write_order = 0;
    int writer = 0;
    uint32_t read_epoch = 0, read_order = 0;
    uint32_t read_warps = 0;  // since the last barrier of the block
    int reader = -1;          // the last warp that read, and its lanes since its last barrier
    uint32_t read_lanes = 0;
    bool in_flight = false;
    Site write_site, read_site;
  };

  static int lowest(uint32_t mask) { return mask == 0 ? 0 : __builtin_ctz(mask); }

  static bool follows_write(const Word& w, const Accessor& who) {
    if (w.write_epoch != who.epoch || w.writer == 32 * who.warp + who.lane) return false;
    return w.writer / 32 != who.warp || w.write_order == who.order;
  }
  static bool follows_read(const Word& w, const Accessor& who) {
    if (w.read_epoch != who.epoch) return false;
    if (w.read_warps & ~(1u << who.warp)) return true;
    return w.read_order == who.order && (w.read_lanes & ~who.lane_mask()) != 0;
  }

  static std::string access(uint32_t word, const Accessor& who, const Site& site) {
    return "bytes " + std::to_string(4 * word) + " to " + std::to_string(4 * word + 3) + ", " +
           who.text() + " at " + text(site);
  }
  [[noreturn]] static void refuse_race(uint32_t word, const char* done, int thread,
                                       const Site& before, const Accessor& who, const Site& site) {
    throw EmulationError(Fault::kRace, "race: " + access(word, who, site) + ", " + done +
                                           " by thread " + std::to_string(thread) + " at " +
                                           text(before) + " with no barrier between");
  }
  [[noreturn]] static void refuse_in_flight(uint32_t word, const Accessor& who, const Site& site) {
    throw EmulationError(Fault::kInFlight,
                         "destination of a copy not waited for: " + access(word, who, site));
  }

  size_t bytes_, room_ = 0;
  bool unwritten_reads_;
  std::vector<Word> words_;
  unsigned char* memory_ = nullptr;
  uint32_t first_epoch_ = 0;
};

}  // namespace seqkernels::host_emulation
