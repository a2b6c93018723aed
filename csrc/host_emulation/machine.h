// Runs the blocks of a launch, one after the other, each CUDA thread a fiber.
//
// The scheduler is greedy: one warp runs until all its lanes are at a block barrier or gone, one
// lane until it comes to an operation of its warp. So a thread that relies on another without a
// barrier meets that one far behind or far ahead, which lockstep would hide.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "host_emulation/banks.h"
#include "host_emulation/counters.h"
#include "host_emulation/fault.h"
#include "host_emulation/fiber.h"
#include "host_emulation/fragments.h"
#include "host_emulation/global_memory.h"
#include "host_emulation/shared_memory.h"

namespace seqkernels::host_emulation {

// A mistake that the emulation makes in a kernel that has none, so that tests can see whether it is
// noticed: in every thread of every block at the same of its operations of a kind.
struct Mistake {
  enum class Kind {
    kNone,
    kNoBarrier,        // sync_threads does nothing
    kNoWarpBarrier,    // sync_warp does nothing
    kNoWait,           // copy_async_wait does nothing
    kShiftedIndex,     // an access of shared memory (ldmatrix, too) is one element further
    kSwappedFragment,  // b0 and b1 of mma_m16n8k16 change places
    kBrokenSwizzle,    // 16-byte pieces of shared memory lie elsewhere; always, not once
  };
  Kind kind = Kind::kNone;
  int64_t at = 0;
};

struct Schedule {
  enum class Order { kForward, kReverse, kRandom };  // of blocks, warps and lanes
  Order order = Order::kForward;
  uint64_t seed = 0;
  // Whether a kernel may read shared memory that it never wrote; it gets NaN.
  bool unwritten_reads = false;
  Mistake mistake = {};
};

// What all lanes of a warp do together. `run` gets each lane's operands.
struct Collective {
  const char* name;
  void (*run)(void* const (&lanes)[32]);
};

struct Access {
  enum Kind : uint8_t { kSharedLoad, kSharedStore, kGlobalLoad, kGlobalStore };
  Site site;
  uint64_t at;  // an offset in shared memory, or an address
  uint8_t bytes;
  Kind kind;

  bool goes_with(const Access& other) const {
    return kind == other.kind && bytes == other.bytes && same_site(site, other.site);
  }
};

struct Lane {
  Fiber fiber;
  int thread = 0;
  bool started = false, gone = false;

  // Where it waits: at `collective`, or with none at a block barrier.
  const Collective* collective = nullptr;
  void* operands = nullptr;
  Site site;
  std::exception_ptr failure;

  std::vector<Access> accesses;  // since the last operation of the warp

  struct Copy {
    uint32_t offset;
    int group;
    unsigned char bytes[16];
    Site site;
  };
  std::vector<Copy> copies;  // not landed yet
  int group = 0;             // the one that is open

  int64_t operations = 0;  // of the kind of the mistake
};

class Machine {
 public:
  static Machine& current() { return *current_; }

  Machine(int grid, int block, size_t shared_bytes, Schedule schedule)
      : grid_(grid),
        lanes_(static_cast<size_t>(block)),
        schedule_(schedule),
        shared_(shared_bytes, schedule.unwritten_reads) {}

  // `body(context)` is a thread's work.
  Counters run(void (*body)(const void*), const void* context) {
    body_ = body;
    context_ = context;
    struct Installed {
      Machine* before;
      explicit Installed(Machine* now) : before(std::exchange(current_, now)) {}
      ~Installed() { current_ = before; }
    } installed(this);
    std::vector<int> blocks = order_of(grid_);
    for (const int b : blocks) {
      block_ = b;
      run_block();
    }
    counters.dram_load_bytes = 32 * global.loaded_sectors();
    counters.dram_store_bytes = 32 * global.stored_sectors();
    return counters;
  }

  // ---- called by the threads ----

  int grid() const { return grid_; }
  int block() const { return block_; }
  int threads() const { return static_cast<int>(lanes_.size()); }
  int thread() const { return lane_->thread; }
  unsigned char* shared_data() { return shared_.data(); }

  // Whether the thread's next operation of this kind is the mistaken one.
  bool errs(Mistake::Kind kind) {
    if (schedule_.mistake.kind != kind || lane_->operations++ != schedule_.mistake.at) return false;
    ++counters.mistakes;
    return true;
  }
  // Where an element of shared memory lies. The broken swizzle turns the eight 16-byte pieces of a
  // 128-byte line and the eight lines of a kilobyte into one another.
  template <class T>
  T* place_of(T* p) {
    if (errs(Mistake::Kind::kShiftedIndex)) return p + 1;
    if (schedule_.mistake.kind != Mistake::Kind::kBrokenSwizzle) return p;
    using Byte = std::conditional_t<std::is_const_v<T>, const unsigned char, unsigned char>;
    const auto at = reinterpret_cast<Byte*>(p) - shared_.data();
    if (at < 0 || (at | 1023) >= static_cast<std::ptrdiff_t>(shared_.bytes())) return p;
    const auto piece = at >> 4 & 7, line = at >> 7 & 7;
    ++counters.mistakes;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) +
                                16 * ((line - piece) + 8 * (piece - line)));
  }

  void wait_for_warp(const Collective& collective, void* operands, const Site& site) {
    wait(&collective, operands, site);
  }
  void wait_for_block(const Site& site) { wait(nullptr, nullptr, site); }

  void access_shared(bool store, const char* operation, const void* p, int size, const Site& site) {
    const uint32_t at = shared_.offset(operation, p, size, site);
    const Accessor who = accessor(lane_->thread % 32);
    store ? shared_.check_write(at, size, who, site) : shared_.check_read(at, size, who, site);
    lane_->accesses.push_back(
        {site, at, static_cast<uint8_t>(size), store ? Access::kSharedStore : Access::kSharedLoad});
  }
  // A row that a lane names for ldmatrix; the whole warp reads it.
  void access_matrix_row(const void* p, const Site& site) {
    const uint32_t at = shared_.offset("ldmatrix", p, 16, site);
    shared_.check_read(at, 16, accessor(Accessor::kWholeWarp), site);
  }
  void load_global(const char* operation, const void* p, int size, bool coherent,
                   const Site& site) {
    global.load(operation, p, size, coherent, site);
    counters.global_load_bytes += size;
    log_global(Access::kGlobalLoad, p, size, site);
  }
  void store_global(const void* p, int size, const Site& site) {
    counters.global_restored_bytes += global.store("store_global", p, size, site);
    counters.global_store_bytes += size;
    log_global(Access::kGlobalStore, p, size, site);
  }

  // The source is read now; the data land at the wait.
  void copy_async(void* shared, const void* source, const Site& site) {
    load_global("copy_async_16", source, 16, true, site);
    access_shared(true, "copy_async_16", shared, 16, site);
    const uint32_t at = shared_.offset("copy_async_16", shared, 16, site);
    shared_.set_in_flight(at, 16, true);
    Lane::Copy copy{at, lane_->group, {}, site};
    std::memcpy(copy.bytes, source, 16);
    lane_->copies.push_back(copy);
  }
  void commit_copies() { ++lane_->group; }
  void wait_for_copies(int pending) {
    std::vector<Lane::Copy>& copies = lane_->copies;
    size_t landed = 0;
    for (; landed < copies.size() && copies[landed].group < lane_->group - pending; ++landed) {
      const Lane::Copy& copy = copies[landed];
      shared_.set_in_flight(copy.offset, 16, false);
      shared_.check_write(copy.offset, 16, accessor(lane_->thread % 32), copy.site);
      std::memcpy(shared_.data() + copy.offset, copy.bytes, 16);
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(landed));
  }

  // ---- called within a collective ----

  const Lane& lane_of_warp(int lane) const {
    return lanes_[static_cast<size_t>(32 * warp_ + lane)];
  }
  // Orders the memory of the warp's lanes.
  void order_warp() { ++warps_[static_cast<size_t>(warp_)].order; }
  void count(const Wavefronts& w) {
    counters.shared_wavefronts += w.taken;
    counters.shared_wavefronts_ideal += w.ideal;
  }

  Counters counters;
  GlobalMemory global;

 private:
  struct Warp {
    uint32_t order = 0;
    bool at_barrier = false, gone = false;
    bool runnable() const { return !at_barrier && !gone; }
  };
  struct Cancelled {};

  // ---- fibers ----

  static void enter() {
    Machine& m = current();
    Lane& lane = *m.lane_;
    lane.fiber.started();
    m.run_thread(lane);
    lane.gone = true;
    lane.fiber.pause();
    __builtin_unreachable();
  }
  void run_thread(Lane& lane) {
    try {
      body_(context_);
      if (!lane.copies.empty()) {
        throw EmulationError(Fault::kUnwaited,
                             "thread " + std::to_string(lane.thread) +
                                 " leaves copies it did not wait for, issued at " +
                                 text(lane.copies[0].site));
      }
    } catch (const Cancelled&) {
    } catch (...) {
      lane.failure = std::current_exception();
    }
  }
  void wait(const Collective* collective, void* operands, const Site& site) {
    Lane& lane = *lane_;
    lane.collective = collective;
    lane.operands = operands;
    lane.site = site;
    lane.fiber.pause();
    if (cancelled_) throw Cancelled();
  }
  void resume(Lane& lane) {
    lane_ = &lane;
    if (!lane.started) {
      lane.started = true;
      lane.fiber.start(static_cast<size_t>(lane.thread), &Machine::enter);
    }
    lane.fiber.resume();
    if (lane.failure) std::rethrow_exception(std::exchange(lane.failure, nullptr));
  }
  // Unwinds the threads that still wait.
  void cancel() {
    cancelled_ = true;
    for (Lane& lane : lanes_) {
      if (lane.started && !lane.gone) {
        lane_ = &lane;
        lane.fiber.resume();
      }
    }
    cancelled_ = false;
  }

  // ---- scheduling ----

  uint64_t random() {  // splitmix64
    uint64_t z = (schedule_.seed += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  std::vector<int> order_of(int count) {
    std::vector<int> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    arrange(order.data(), count);
    return order;
  }
  void arrange(int* order, int count) {
    if (schedule_.order == Schedule::Order::kReverse) std::reverse(order, order + count);
    if (schedule_.order != Schedule::Order::kRandom) return;
    for (int i = count - 1; i > 0; --i) {
      std::swap(order[i], order[random() % static_cast<uint64_t>(i + 1)]);
    }
  }

  void run_block() {
    ++epoch_;
    shared_.start_block(epoch_);
    const int warps = threads() / 32;
    warps_.assign(static_cast<size_t>(warps), Warp{});
    for (int i = 0; i < threads(); ++i) {
      Lane& lane = lanes_[static_cast<size_t>(i)];
      lane.thread = i;
      lane.started = lane.gone = false;
      lane.accesses.clear();
      lane.copies.clear();
      lane.group = 0;
      lane.operations = 0;
    }
    try {
      while (true) {
        const std::vector<int> order = order_of(warps);
        const auto next = std::find_if(order.begin(), order.end(), [&](int w) {
          return warps_[static_cast<size_t>(w)].runnable();
        });
        if (next != order.end()) {
          run_warp(*next);
        } else if (std::all_of(warps_.begin(), warps_.end(),
                               [](const Warp& w) { return w.gone; })) {
          return;
        } else {
          pass_barrier();
        }
      }
    } catch (...) {
      cancel();
      throw;
    }
  }

  void pass_barrier() {
    for (size_t w = 0; w < warps_.size(); ++w) {
      if (warps_[w].gone) {
        const auto waits = std::find_if(warps_.begin(), warps_.end(),
                                        [](const Warp& other) { return other.at_barrier; });
        const size_t lane = 32 * static_cast<size_t>(waits - warps_.begin());
        throw EmulationError(Fault::kDivergence, "divergent barrier: warp " + std::to_string(w) +
                                                     " has left the kernel, " +
                                                     where(lanes_[lane]));
      }
    }
    for (Warp& warp : warps_) warp.at_barrier = false;
    ++epoch_;
    ++counters.barriers;
  }

  // Until the warp waits at a barrier or is gone.
  void run_warp(int w) {
    warp_ = w;
    Warp& warp = warps_[static_cast<size_t>(w)];
    Lane* const lanes = &lanes_[static_cast<size_t>(32 * w)];
    while (true) {
      int order[32];
      std::iota(order, order + 32, 0);
      arrange(order, 32);
      for (const int i : order) {
        if (!lanes[i].gone) resume(lanes[i]);
      }
      count_accesses(lanes);
      for (int i = 1; i < 32; ++i) {
        if (lanes[i].gone != lanes[0].gone ||
            (!lanes[0].gone && lanes[i].collective != lanes[0].collective)) {
          throw EmulationError(Fault::kDivergence, "the lanes of warp " + std::to_string(w) +
                                                       " diverge: " + where(lanes[0]) + ", " +
                                                       where(lanes[i]));
        }
      }
      warp.gone = lanes[0].gone;
      warp.at_barrier = !warp.gone && !lanes[0].collective;
      if (!warp.runnable()) return;
      void* operands[32];
      for (int i = 0; i < 32; ++i) operands[i] = lanes[i].operands;
      lanes[0].collective->run(operands);
    }
  }
  static std::string where(const Lane& lane) {
    const std::string who = "thread " + std::to_string(lane.thread);
    if (lane.gone) return who + " has left the kernel";
    return who + " waits at " + (lane.collective ? lane.collective->name : "sync_threads") + " " +
           text(lane.site);
  }

  Accessor accessor(int lane) const {
    return {warp_, lane, epoch_, warps_[static_cast<size_t>(warp_)].order};
  }

  // ---- counting ----

  void log_global(Access::Kind kind, const void* p, int size, const Site& site) {
    lane_->accesses.push_back(
        {site, reinterpret_cast<uintptr_t>(p), static_cast<uint8_t>(size), kind});
  }

  // The lanes' n-th accesses from one place since the last operation of the warp are one access of
  // the warp.
  void count_accesses(Lane* lanes) {
    if (in_step(lanes)) {
      for (size_t n = 0; n < lanes[0].accesses.size(); ++n) {
        uint64_t at[32];
        for (int i = 0; i < 32; ++i) at[i] = lanes[i].accesses[n].at;
        count_access(lanes[0].accesses[n], at, 0xffffffffu);
      }
    } else {
      count_apart(lanes);
    }
    for (int i = 0; i < 32; ++i) lanes[i].accesses.clear();
  }
  static bool in_step(const Lane* lanes) {
    const std::vector<Access>& first = lanes[0].accesses;
    for (int i = 1; i < 32; ++i) {
      if (!std::equal(first.begin(), first.end(), lanes[i].accesses.begin(),
                      lanes[i].accesses.end(),
                      [](const Access& a, const Access& b) { return a.goes_with(b); })) {
        return false;
      }
    }
    return true;
  }
  // Lanes that went different ways.
  void count_apart(const Lane* lanes) {
    std::vector<std::pair<const Access*, std::array<std::vector<uint64_t>, 32>>> places;
    for (int i = 0; i < 32; ++i) {
      for (const Access& access : lanes[i].accesses) {
        auto place = std::find_if(places.begin(), places.end(),
                                  [&](const auto& p) { return p.first->goes_with(access); });
        if (place == places.end()) place = places.insert(place, {&access, {}});
        place->second[static_cast<size_t>(i)].push_back(access.at);
      }
    }
    for (const auto& [access, of_lanes] : places) {
      for (size_t n = 0;; ++n) {
        uint32_t active = 0;
        uint64_t at[32] = {};
        for (size_t i = 0; i < 32; ++i) {
          if (n >= of_lanes[i].size()) continue;
          active |= 1u << i;
          at[i] = of_lanes[i][n];
        }
        if (active == 0) break;
        count_access(*access, at, active);
      }
    }
  }
  void count_access(const Access& access, const uint64_t (&at)[32], uint32_t active) {
    if (access.kind == Access::kGlobalLoad) {
      counters.global_load_sectors += sectors(at, active);
    } else if (access.kind == Access::kGlobalStore) {
      counters.global_store_sectors += sectors(at, active);
    } else {
      ++(access.kind == Access::kSharedLoad ? counters.shared_loads : counters.shared_stores);
      uint32_t offsets[32];
      for (int i = 0; i < 32; ++i) offsets[i] = static_cast<uint32_t>(at[i]);
      count(wavefronts(offsets, active, access.bytes));
    }
  }

  static inline Machine* current_ = nullptr;

  int grid_, block_ = 0, warp_ = 0;
  Lane* lane_ = nullptr;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  Schedule schedule_;
  SharedMemory shared_;
  uint32_t epoch_ = 0;
  bool cancelled_ = false;
  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
};

}  // namespace seqkernels::host_emulation
