// The host emulation of CUDA: its operations beside the tables of the PTX ISA, its counters on
// access patterns of known cost, and its eyes on kernels with one mistake each.
//
//   cuda_primitives_test [--only=GROUP] [--plant=DEFECT] [--list]
//
// Each group of checks is one line. Every kernel runs forward, in reverse and in random orders. A
// plant is an access out of bounds, which a build with AddressSanitizer must end the program for.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/ptx.cuh"
#include "host_emulation/launch.h"

namespace seqkernels::test {
namespace {

using namespace seqkernels::cuda;
using host_emulation::Counters;
using host_emulation::EmulationError;
using host_emulation::Fault;
using host_emulation::launch;
using host_emulation::Schedule;

struct Verdicts {
  int checks = 0, failures = 0;
  void check(bool holds, const std::string& what) {
    ++checks;
    if (holds) return;
    ++failures;
    if (failures <= 20) std::fprintf(stderr, "FAIL %s\n", what.c_str());
  }
};

std::vector<std::pair<std::string, Schedule>> schedules() {
  std::vector<std::pair<std::string, Schedule>> all = {{"forward", {Schedule::Order::kForward}},
                                                       {"reverse", {Schedule::Order::kReverse}}};
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    all.push_back({"seed " + std::to_string(seed), {Schedule::Order::kRandom, seed}});
  }
  return all;
}

// Whole numbers that products and sums of products keep exactly.
std::vector<float> draw_whole(std::mt19937& g, size_t n) {
  std::uniform_int_distribution<int> number(-8, 8);
  std::vector<float> values(n);
  for (float& v : values) v = static_cast<float>(number(g));
  return values;
}

// ---- mma: the ISA's tables, by element i of a lane's fragment ----

struct Place {
  int row, column;
};
Place place_a16(int lane, int i) {
  const bool upper = i < 2 || (4 <= i && i < 6);
  return {lane / 4 + (upper ? 0 : 8), lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
Place place_a8(int lane, int i) {
  return {lane / 4 + (i < 2 ? 0 : 8), lane % 4 * 2 + (i & 1)};
}
Place place_b(int lane, int i) {
  return {lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8), lane / 4};
}
Place place_c(int lane, int i) {
  return {lane / 4 + (i < 2 ? 0 : 8), lane % 4 * 2 + (i & 1)};
}

struct MmaProblem {
  const float *a, *b, *c;  // [16, K], [K, 8], [16, 8]
  float* d;                // [16, 8]
};

template <int kDepth>
__global__ void multiply_fragments(MmaProblem p) {
  const int lane = lane_index();
  uint32_t a[kDepth / 4], b[kDepth / 8];
  for (int r = 0; r < kDepth / 4; ++r) {
    const auto element = [&](int i) {
      const Place at = kDepth == 16 ? place_a16(lane, i) : place_a8(lane, i);
      return p.a[at.row * kDepth + at.column];
    };
    a[r] = pack_bf16(element(2 * r), element(2 * r + 1));
  }
  for (int r = 0; r < kDepth / 8; ++r) {
    const auto element = [&](int i) {
      const Place at = place_b(lane, i);
      return p.b[at.row * 8 + at.column];
    };
    b[r] = pack_bf16(element(2 * r), element(2 * r + 1));
  }
  float d[4];
  for (int i = 0; i < 4; ++i) {
    const Place at = place_c(lane, i);
    d[i] = p.c[at.row * 8 + at.column];
  }
  if constexpr (kDepth == 16) {
    mma_m16n8k16(d, a, b[0], b[1]);
  } else {
    mma_m16n8k8(d, a, b[0]);
  }
  for (int i = 0; i < 4; ++i) {
    const Place at = place_c(lane, i);
    p.d[at.row * 8 + at.column] = d[i];
  }
}

template <int kDepth>
void check_mma(Verdicts& verdicts) {
  std::mt19937 g(kDepth);
  for (const auto& [name, schedule] : schedules()) {
    const std::vector<float> a = draw_whole(g, 16 * kDepth), b = draw_whole(g, kDepth * 8),
                             c = draw_whole(g, 16 * 8);
    std::vector<float> d(16 * 8, -1), expected = c;
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        for (int k = 0; k < kDepth; ++k) {
          expected[static_cast<size_t>(row * 8 + column)] +=
              a[static_cast<size_t>(row * kDepth + k)] * b[static_cast<size_t>(k * 8 + column)];
        }
      }
    }
    const MmaProblem p{a.data(), b.data(), c.data(), d.data()};
    const Counters counters = launch(multiply_fragments<kDepth>, 1, 32, 0, schedule, p);
    const std::string what = "mma m16n8k" + std::to_string(kDepth) + ", " + name;
    verdicts.check(d == expected, what + ": value");
    verdicts.check(counters.mma_m16n8k16 == (kDepth == 16) && counters.mma_m16n8k8 == (kDepth == 8),
                   what + ": count");
  }
}

// NaN, infinities and denormals go through the products as in fp32.
void check_mma_special(Verdicts& verdicts) {
  std::vector<float> a(16 * 16, 0), b(16 * 8, 0), c(16 * 8, 0), d(16 * 8, 0);
  a[0] = std::numeric_limits<float>::infinity();
  a[16] = 1, a[17] = 1;
  b[0] = 1, b[8] = -1;
  a[2 * 16] = 0x1p-100f;
  c[3 * 8] = 1;
  const MmaProblem p{a.data(), b.data(), c.data(), d.data()};
  launch(multiply_fragments<16>, 1, 32, 0, Schedule{}, p);
  verdicts.check(std::isinf(d[0]), "mma: infinity");
  verdicts.check(std::isnan(d[1]), "mma: infinity times 0");
  verdicts.check(d[8] == 0, "mma: 1 - 1");
  verdicts.check(d[16] == 0x1p-100f, "mma: a small product");
  verdicts.check(d[24] == 1, "mma: c alone");
}

// ---- ldmatrix ----

template <int kMatrices, bool kTransposed>
__global__ void load_matrices(uint32_t* out) {
  unsigned char* const shared = shared_memory();
  // Element (row, column) of matrix i is 64 i + 8 row + column.
  for (int word = lane_index(); word < 32 * kMatrices; word += 32) {
    const uint32_t low = static_cast<uint32_t>(2 * word);
    store_shared(reinterpret_cast<uint32_t*>(shared) + word, low | (low + 1) << 16);
  }
  sync_warp();
  uint32_t r[kMatrices];
  // Lanes beyond the rows of x2 name no row.
  const void* row = lane_index() < 8 * kMatrices ? shared + 16 * lane_index() : nullptr;
  if constexpr (kMatrices == 2 && kTransposed) ldmatrix_x2_trans(r, row);
  if constexpr (kMatrices == 2 && !kTransposed) ldmatrix_x2(r, row);
  if constexpr (kMatrices == 4 && kTransposed) ldmatrix_x4_trans(r, row);
  if constexpr (kMatrices == 4 && !kTransposed) ldmatrix_x4(r, row);
  for (int i = 0; i < kMatrices; ++i) {
    store_global(out + 32 * i + lane_index(), r[i]);
  }
}

template <int kMatrices, bool kTransposed>
void check_ldmatrix(Verdicts& verdicts) {
  for (const auto& [name, schedule] : schedules()) {
    std::vector<uint32_t> out(32 * kMatrices, 0);
    const Counters counters =
        launch(load_matrices<kMatrices, kTransposed>, 1, 32, 128 * kMatrices, schedule, out.data());
    bool right = true;
    for (uint32_t i = 0; i < kMatrices; ++i) {
      for (uint32_t lane = 0; lane < 32; ++lane) {
        const uint32_t row = lane / 4, column = lane % 4 * 2;
        const uint32_t low = 64 * i + (kTransposed ? 8 * column + row : 8 * row + column);
        right &= out[32 * i + lane] == (low | (low + (kTransposed ? 8 : 1)) << 16);
      }
    }
    const std::string what =
        "ldmatrix x" + std::to_string(kMatrices) + (kTransposed ? " trans, " : ", ") + name;
    verdicts.check(right, what);
    verdicts.check(counters.ldmatrix == 1 && counters.shared_conflicts() == 0, what + ": counts");
  }
}

// ---- cp.async ----

struct CopyProblem {
  const uint32_t* from;  // [2, 128]
  uint32_t* before;      // [128], what is there before the wait
  uint32_t* after;       // [2, 128]
};

__global__ void copy_in_groups(CopyProblem p) {
  unsigned char* const shared = shared_memory();
  const int at = 16 * lane_index();
  for (int group = 0; group < 2; ++group) {
    copy_async_16(shared + 512 * group + at, p.from + 128 * group + 4 * lane_index());
    copy_async_commit();
  }
  // Past the emulator's checks: what lies there is poison until the wait.
  std::memcpy(p.before + 4 * lane_index(), shared + at, 16);
  copy_async_wait<1>();
  std::memcpy(p.after + 4 * lane_index(), shared + at, 16);
  uint32_t second;
  std::memcpy(&second, shared + 512 + at, 4);
  p.before[lane_index()] &= second == p.before[lane_index()] ? 0xffffffffu : 0;
  copy_async_wait<0>();
  std::memcpy(p.after + 128 + 4 * lane_index(), shared + 512 + at, 16);
}

void check_copies(Verdicts& verdicts) {
  alignas(16) static uint32_t from[256];
  for (uint32_t i = 0; i < 256; ++i) from[i] = i + 1;
  for (const auto& [name, schedule] : schedules()) {
    std::vector<uint32_t> before(128), after(256);
    const Counters counters = launch(copy_in_groups, 1, 32, 1024, schedule,
                                     CopyProblem{from, before.data(), after.data()});
    verdicts.check(std::count(before.begin(), before.end(), 0x7fa07fa0u) == 128,
                   "copy_async, " + name + ": landed before its wait");
    verdicts.check(std::equal(after.begin(), after.end(), from), "copy_async, " + name);
    verdicts.check(counters.global_load_bytes == 1024 && counters.dram_load_bytes == 1024,
                   "copy_async, " + name + ": bytes");
  }
}

// ---- lanes and barriers ----

struct LaneResults {
  int* numbers;  // [threads, 8]
  float* value;  // [threads]
};

__global__ void talk(LaneResults p) {
  int* const n = p.numbers + 8 * thread_index();
  const int t = thread_index(), lane = lane_index();
  n[0] = shuffle_xor(t, 5);
  n[1] = shuffle(t, lane + 3);  // modulo 32
  n[2] = any(lane == 7);
  n[3] = all(lane < 31) + 2 * all(lane < 32);
  n[4] = any(t == 32 + 9);  // in one warp only
  n[5] = warp_index();
  n[6] = block_index() * 1000 + block_size() + grid_size();
  store_shared(reinterpret_cast<int*>(shared_memory()) + t, 3 * t);
  sync_threads();
  n[7] = load_shared(reinterpret_cast<int*>(shared_memory()) + (t + 37) % block_size());
  p.value[t] = shuffle(static_cast<float>(t), 31);
}

void check_lanes(Verdicts& verdicts) {
  constexpr int kThreads = 96;
  for (const auto& [name, schedule] : schedules()) {
    std::vector<int> n(8 * kThreads);
    std::vector<float> value(kThreads);
    const Counters counters =
        launch(talk, 1, kThreads, 4 * kThreads, schedule, LaneResults{n.data(), value.data()});
    bool right = true;
    for (int t = 0; t < kThreads; ++t) {
      const int warp = t / 32, lane = t % 32;
      const int expected[8] = {
          32 * warp + (lane ^ 5), 32 * warp + (lane + 3) % 32, 1, 2, warp == 1, warp,
          kThreads + 1,           3 * ((t + 37) % kThreads)};
      right &= std::equal(expected, expected + 8, n.begin() + 8 * t);
      right &= value[static_cast<size_t>(t)] == static_cast<float>(32 * warp + 31);
    }
    verdicts.check(right, "shuffles, votes, barriers, " + name);
    verdicts.check(counters.barriers == 1 && counters.votes == 4 * 3 && counters.shuffles == 4 * 3,
                   "shuffles, votes, barriers, " + name + ": counts");
  }
}

// ---- arithmetic ----

__global__ void compute(float* out) {
  if (lane_index() != 0) return;
  const float inf = std::numeric_limits<float>::infinity();
  const float inputs[] = {0, 1, -1, 3.5f, -126, -127, -149, 128, inf, -inf, 0x1p-127f};
  for (const float x : inputs) {
    *out++ = exp2_approx(x);
    *out++ = rsqrt_approx(x);
    *out++ = reciprocal_approx(x);
  }
}

void check_arithmetic(Verdicts& verdicts) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float expected[] = {
      1,           inf,
      inf,  // 0
      2,           1,
      1,  // 1
      0.5f,        nan,
      -1,  // -1
      11.31371f,   1 / std::sqrt(3.5f),
      1 / 3.5f,  // 3.5
      0x1p-126f,   nan,
      1 / -126.0f,  // -126
      0,           nan,
      1 / -127.0f,  // -127: the result is a denormal
      0,           nan,
      1 / -149.0f,  // -149
      inf,         1 / std::sqrt(128.f),
      1 / 128.0f,  // 128
      inf,         0,
      0,  // inf
      0,           nan,
      -0.0f,  // -inf
      1,           inf,
      inf,  // a denormal counts as 0
  };
  std::vector<float> out(std::size(expected), -7);
  const Counters counters = launch(compute, 1, 32, 0, Schedule{}, out.data());
  for (size_t i = 0; i < out.size(); ++i) {
    const float e = expected[i];
    const bool same = std::isnan(e) ? std::isnan(out[i])
                                    : out[i] == e || std::fabs(out[i] - e) <= 4e-7f * std::fabs(e);
    verdicts.check(same, "approximation " + std::to_string(i) + ": expected " + std::to_string(e) +
                             ", got " + std::to_string(out[i]));
  }
  verdicts.check(counters.exp2 == 11 && counters.rsqrt == 11 && counters.reciprocals == 11,
                 "approximations: counts");

  const auto bits = [](uint32_t b) { return bits_as_float(b); };
  verdicts.check(pack_bf16(1.0f, -2.0f) == 0xc0003f80u, "pack_bf16: order of the halves");
  verdicts.check(bf16_low(0xc0003f80u) == 1 && bf16_high(0xc0003f80u) == -2, "bf16_low, bf16_high");
  verdicts.check(pack_bf16(bits(0x3f808000u), bits(0x3f818000u)) == 0x3f823f80u,
                 "pack_bf16: ties to even");
  verdicts.check(pack_bf16(bits(0x3f808001u), bits(0x3f80ffffu)) == 0x3f813f81u,
                 "pack_bf16: to nearest");
  verdicts.check(pack_bf16(bits(0x7f7fffffu), inf) == 0x7f807f80u, "pack_bf16: infinity");
  verdicts.check(std::isnan(bf16_low(pack_bf16(nan, 0))) &&
                     std::isnan(bf16_low(pack_bf16(bits(0x7f800001u), 0))),
                 "pack_bf16: NaN");
  verdicts.check(pack_bf16(bits(1), bits(0x80000001u)) == 0x80000000u, "pack_bf16: denormals");
}

// ---- bank conflicts and traffic ----

// Each lane loads or stores at `scale` times its index, in bytes.
template <class T>
__global__ void touch_shared(int scale, bool store) {
  T* const at = reinterpret_cast<T*>(shared_memory() + scale * lane_index());
  if (store) {
    store_shared(at, T{});
  } else {
    load_shared(at);
  }
}

struct Wavefronts {
  int64_t taken, ideal;
};
template <class T>
Wavefronts measure(int scale, bool store, const Schedule& base) {
  Schedule schedule = base;
  schedule.unwritten_reads = true;
  // The pattern counts, not whether lanes overlap.
  const Counters c = launch(touch_shared<T>, 1, 32, 31 * static_cast<size_t>(scale) + sizeof(T),
                            schedule, scale, store);
  return {c.shared_wavefronts, c.shared_wavefronts_ideal};
}

__global__ void touch_matrices(int row_bytes, bool swizzled) {
  const int row = lane_index() % 8, matrix = lane_index() / 8;
  const int column = swizzled ? matrix ^ row : matrix;
  uint32_t r[4];
  ldmatrix_x4(r, shared_memory() + row_bytes * row + 16 * column);
}

// Half the lanes take another way: two accesses, each of 16 lanes.
__global__ void touch_apart() {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  if (lane_index() % 2 == 0) {
    store_shared(shared + lane_index(), 1.0f);
  } else {
    store_shared(shared + 32 * lane_index(), 1.0f);
  }
}

void check_banks(Verdicts& verdicts) {
  for (const auto& [name, schedule] : schedules()) {
    const auto expect = [&, &name = name](const std::string& what, Wavefronts w, int64_t taken,
                                          int64_t ideal) {
      verdicts.check(w.taken == taken && w.ideal == ideal,
                     "banks: " + what + ", " + name + ": expected " + std::to_string(taken) + " (" +
                         std::to_string(ideal) + "), got " + std::to_string(w.taken) + " (" +
                         std::to_string(w.ideal) + ")");
    };
    const Schedule& s = schedule;
    for (const bool store : {false, true}) {
      expect("4 bytes, stride 4", measure<float>(4, store, s), 1, 1);
      expect("4 bytes, stride 8", measure<float>(8, store, s), 2, 1);
      expect("4 bytes, stride 16", measure<float>(16, store, s), 4, 1);
      expect("4 bytes, stride 128", measure<float>(128, store, s), 32, 1);
      expect("4 bytes, stride 132", measure<float>(132, store, s), 1, 1);
      expect("8 bytes, stride 8", measure<Vector8>(8, store, s), 2, 2);
      expect("8 bytes, stride 16", measure<Vector8>(16, store, s), 4, 2);
      expect("8 bytes, stride 128", measure<Vector8>(128, store, s), 32, 2);
      expect("16 bytes, stride 16", measure<Vector16>(16, store, s), 4, 4);
      expect("16 bytes, stride 32", measure<Vector16>(32, store, s), 8, 4);
      expect("16 bytes, stride 128", measure<Vector16>(128, store, s), 32, 4);
      expect("16 bytes, stride 144", measure<Vector16>(144, store, s), 4, 4);
    }
    expect("4 bytes, all the same", measure<float>(0, false, s), 1, 1);
    expect("16 bytes, all the same", measure<Vector16>(0, false, s), 4, 4);

    Schedule reads = schedule;
    reads.unwritten_reads = true;
    const auto matrices = [&](int row_bytes, bool swizzled) {
      const Counters c = launch(touch_matrices, 1, 32, 2048, reads, row_bytes, swizzled);
      return Wavefronts{c.shared_wavefronts, c.shared_wavefronts_ideal};
    };
    expect("ldmatrix, rows of 64 bytes", matrices(64, false), 16, 4);
    expect("ldmatrix, rows of 128 bytes", matrices(128, false), 32, 4);
    expect("ldmatrix, rows of 128 bytes, swizzled", matrices(128, true), 4, 4);
    expect("ldmatrix, rows of 144 bytes", matrices(144, false), 4, 4);

    const Counters apart = launch(touch_apart, 1, 32, 4096, schedule);
    expect("two branches", {apart.shared_wavefronts, apart.shared_wavefronts_ideal}, 17, 2);
    verdicts.check(apart.shared_stores == 2, "banks: two branches, " + name);
  }
}

template <class T>
__global__ void touch_global(const unsigned char* from, unsigned char* to, int scale, int times) {
  const int at = scale * (thread_index() + block_index() * block_size());
  for (int i = 0; i < times; ++i) {
    const T value = load_global(reinterpret_cast<const T*>(from + at));
    store_global(reinterpret_cast<T*>(to + at), value);
  }
}

void check_traffic(Verdicts& verdicts) {
  alignas(128) static unsigned char from[1 << 15], to[1 << 15];
  for (const auto& [name, schedule] : schedules()) {
    const auto expect = [&, &name = name](const std::string& what, const Counters& c, int64_t bytes,
                                          int64_t sectors, int64_t dram, int64_t restored) {
      verdicts.check(c.global_load_bytes == bytes && c.global_store_bytes == bytes,
                     "traffic: " + what + ", " + name + ": bytes");
      verdicts.check(c.global_load_sectors == sectors && c.global_store_sectors == sectors,
                     "traffic: " + what + ", " + name + ": sectors");
      verdicts.check(c.dram_load_bytes == dram && c.dram_store_bytes == dram,
                     "traffic: " + what + ", " + name + ": main memory");
      verdicts.check(c.global_restored_bytes == restored,
                     "traffic: " + what + ", " + name + ": stored again");
    };
    const auto run = [&, &schedule = schedule](auto kernel, int scale, int grid, int block,
                                               int times, size_t shift) {
      return launch(kernel, grid, block, 0, schedule,
                    static_cast<const unsigned char*>(from) + shift, to + shift, scale, times);
    };
    expect("1 byte", run(touch_global<uint8_t>, 1, 1, 32, 1, 0), 32, 1, 32, 0);
    expect("2 bytes", run(touch_global<uint16_t>, 2, 1, 32, 1, 0), 64, 2, 64, 0);
    expect("4 bytes", run(touch_global<float>, 4, 1, 32, 1, 0), 128, 4, 128, 0);
    expect("4 bytes, shifted", run(touch_global<float>, 4, 1, 32, 1, 16), 128, 5, 160, 0);
    expect("4 bytes, stride 32", run(touch_global<float>, 32, 1, 32, 1, 0), 128, 32, 1024, 0);
    expect("16 bytes", run(touch_global<Vector16>, 16, 1, 64, 1, 0), 1024, 32, 1024, 0);
    expect("16 bytes, 3 times", run(touch_global<Vector16>, 16, 2, 64, 3, 0), 6144, 192, 2048,
           4096);
  }
}

// ---- planted faults ----

// c [32, 8] = a [32, 32] b [32, 8] in a block of two warps: a by cp.async into rows of 64 bytes,
// two of them a 128-byte line, with a swizzle; b by the first warp in fragment order; the product
// turned in shared memory, so that each thread stores 16 bytes.
enum class Plant {
  kNone,
  kNoBarrier,
  kNoSecondBarrier,
  kNoWarpBarrier,
  kNoWait,
  kWrongWait,
  kShiftedIndex,
  kShiftedRow,
  kSwappedFragment,
  kSwappedRegisters,
  kBrokenSwizzle,
  kDivergentBarrier,
  kDivergentWarp,
  kEarlyExit,
  kOutOfRange,
  kMisaligned,
  kUnwritten,
  kSameDestination,
  kUnwaited,
};

struct Product {
  const uint16_t* a;
  const uint16_t* b;
  float* c;
};

// The place of 16-byte piece `piece` of row `row`, 4 pieces a row: of each 8 rows, every piece lies
// in other banks.
template <Plant kPlant>
__device__ __forceinline__ int place_of(int row, int piece) {
  const int swizzle = kPlant == Plant::kBrokenSwizzle ? 0 : row / 2 % 4;
  return 64 * row + 16 * (piece ^ swizzle);
}

constexpr int kBytesA = 32 * 64, kBytesB = 32 * 8 * 2, kBytesC = 32 * 32;
constexpr int kProductBytes = kBytesA + kBytesB + kBytesC;

template <Plant kPlant>
__global__ void __launch_bounds__(64) multiply(const Product p) {
  unsigned char* const shared_a = shared_memory();
  unsigned char* const shared_b = shared_a + kBytesA;
  unsigned char* const shared_c = shared_b + kBytesB;
  const int t = thread_index(), lane = lane_index(), warp = warp_index();

  for (int i = t; i < 32 * 4; i += block_size()) {
    const int row = i / 4, piece = i % 4;
    copy_async_16(shared_a + place_of<kPlant>(row, piece), p.a + 32 * row + 8 * piece);
    copy_async_commit();
  }
  if constexpr (kPlant == Plant::kSameDestination) {
    if (t == 40) copy_async_16(shared_a + place_of<kPlant>(0, 0), p.a);
  }
  if (warp == 0) {
    for (int r = 0; r < 4; ++r) {
      const int k = lane % 4 * 2 + 8 * r, n = lane / 4;
      const uint32_t low = load_global(p.b + 8 * k + n), high = load_global(p.b + 8 * k + 8 + n);
      if (kPlant == Plant::kUnwritten && r == 3 && lane == 31) break;
      store_shared(reinterpret_cast<uint32_t*>(shared_b) + 32 * r + lane, low | high << 16);
    }
  }
  if constexpr (kPlant == Plant::kWrongWait) {
    copy_async_wait<1>();
  } else if constexpr (kPlant != Plant::kNoWait && kPlant != Plant::kUnwaited) {
    copy_async_wait<0>();
  }
  if constexpr (kPlant == Plant::kUnwaited) return;
  if constexpr (kPlant == Plant::kEarlyExit) {
    if (warp == 1) return;
  }
  if constexpr (kPlant == Plant::kDivergentBarrier) {
    if (lane < 16) sync_threads();
  } else if constexpr (kPlant != Plant::kNoBarrier) {
    sync_threads();
  }

  float d[4] = {};
  for (int step = 0; step < 2; ++step) {
    uint32_t a[4], b[2];
    const int row = 16 * warp + lane % 16 + (kPlant == Plant::kShiftedRow ? lane % 16 / 15 - 1 : 0);
    const int piece = 2 * step + (kPlant == Plant::kSwappedRegisters ? 1 - lane / 16 : lane / 16);
    ldmatrix_x4(a, shared_a + place_of<kPlant>(std::max(row, 0), piece) +
                       (kPlant == Plant::kMisaligned ? 8 : 0));
    for (int r = 0; r < 2; ++r) {
      const int from = 2 * step + r + (kPlant == Plant::kOutOfRange ? 11 * step : 0);
      const int other = kPlant == Plant::kShiftedIndex ? (lane + 1) % 32 : lane;
      b[r] = load_shared(reinterpret_cast<uint32_t*>(shared_b) + 32 * from + other);
    }
    if constexpr (kPlant == Plant::kSwappedFragment) std::swap(b[0], b[1]);
    if constexpr (kPlant == Plant::kDivergentWarp) {
      if (lane == 5) sync_warp();
    }
    mma_m16n8k16(d, a, b[0], b[1]);
  }

  // Row r of 8 numbers, its two pieces of 16 bytes swizzled by the row.
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + lane / 4 + 8 * half, column = lane % 4 * 2;
    const int piece = column / 4 ^ row / 4 % 2;
    store_shared(reinterpret_cast<Vector8*>(shared_c + 32 * row + 16 * piece + column % 4 * 4),
                 Vector8{{float_as_bits(d[2 * half]), float_as_bits(d[2 * half + 1])}});
  }
  if constexpr (kPlant == Plant::kNoSecondBarrier) {
    sync_warp();
  } else if constexpr (kPlant != Plant::kNoWarpBarrier) {
    sync_threads();
  }
  // Crosswise: each warp stores the rows of the other, but of its own with the warp barrier's
  // plant.
  const int row = (kPlant == Plant::kNoWarpBarrier ? 16 * warp : 16 * (1 - warp)) + lane / 2;
  const int piece = lane % 2;
  const Vector16 out =
      load_shared(reinterpret_cast<Vector16*>(shared_c + 32 * row + 16 * (piece ^ row / 4 % 2)));
  store_global(reinterpret_cast<Vector16*>(p.c + 8 * row + 4 * piece), out);
}

// What a run came to.
struct Outcome {
  std::string error;  // empty if none
  Fault fault{};
  bool right = false;
  Counters counters;
};

template <Plant kPlant>
Outcome run_product(const Schedule& schedule) {
  static const auto problem = [] {
    std::mt19937 g(3);
    struct {
      std::vector<float> a = std::vector<float>(32 * 32), b = std::vector<float>(32 * 8);
    } values;
    values.a = draw_whole(g, 32 * 32);
    values.b = draw_whole(g, 32 * 8);
    return values;
  }();
  alignas(16) uint16_t a[32 * 32];
  alignas(16) uint16_t b[32 * 8];
  alignas(32) float c[32 * 8];
  for (size_t i = 0; i < std::size(a); ++i) {
    a[i] = static_cast<uint16_t>(pack_bf16(problem.a[i], 0));
  }
  for (size_t i = 0; i < std::size(b); ++i) {
    b[i] = static_cast<uint16_t>(pack_bf16(problem.b[i], 0));
  }
  std::fill(std::begin(c), std::end(c), -1.0f);
  Outcome outcome;
  try {
    outcome.counters = launch(multiply<kPlant>, 1, 64, kProductBytes, schedule, Product{a, b, c});
  } catch (const EmulationError& e) {
    outcome.error = e.what();
    outcome.fault = e.fault();
    return outcome;
  }
  outcome.right = true;
  for (size_t row = 0; row < 32; ++row) {
    for (size_t column = 0; column < 8; ++column) {
      float sum = 0;
      for (size_t k = 0; k < 32; ++k) sum += problem.a[32 * row + k] * problem.b[8 * k + column];
      outcome.right &= c[8 * row + column] == sum;
    }
  }
  return outcome;
}

template <Plant kPlant>
void expect_fault(Verdicts& verdicts, const std::string& plant, std::vector<Fault> faults) {
  for (const auto& [name, schedule] : schedules()) {
    const Outcome o = run_product<kPlant>(schedule);
    const bool named =
        !o.error.empty() && std::find(faults.begin(), faults.end(), o.fault) != faults.end();
    verdicts.check(named, plant + ", " + name + ": " + (o.error.empty() ? "no error" : o.error));
    verdicts.check(o.error.find("cuda_primitives_test.cpp:") != std::string::npos,
                   plant + ", " + name + ": the error names no place: " + o.error);
  }
}

template <Plant kPlant>
void expect_wrong(Verdicts& verdicts, const std::string& plant) {
  for (const auto& [name, schedule] : schedules()) {
    const Outcome o = run_product<kPlant>(schedule);
    verdicts.check(o.error.empty() && !o.right, plant + ", " + name + ": not noticed " + o.error);
  }
}

void check_unbroken(Verdicts& verdicts) {
  const Counters first = run_product<Plant::kNone>(Schedule{}).counters;
  for (const auto& [name, schedule] : schedules()) {
    const Outcome o = run_product<Plant::kNone>(schedule);
    verdicts.check(o.error.empty(), "unbroken, " + name + ": " + o.error);
    verdicts.check(o.right, "unbroken, " + name + ": wrong");
    verdicts.check(o.counters.shared_conflicts() == 0, "unbroken, " + name + ": bank conflicts");
    verdicts.check(o.counters == first, "unbroken, " + name + ": counters depend on the order");
    verdicts.check(o.counters.mma_m16n8k16 == 4 && o.counters.ldmatrix == 4,
                   "unbroken, " + name + ": counts");
    verdicts.check(
        o.counters.dram_store_bytes == 32 * 8 * 4 && o.counters.global_restored_bytes == 0,
        "unbroken, " + name + ": traffic");
  }
}

void check_plants(Verdicts& v) {
  expect_fault<Plant::kNoBarrier>(v, "barrier removed",
                                  {Fault::kRace, Fault::kUnwritten, Fault::kInFlight});
  expect_fault<Plant::kNoSecondBarrier>(v, "second barrier removed",
                                        {Fault::kRace, Fault::kUnwritten});
  expect_fault<Plant::kNoWarpBarrier>(v, "warp barrier removed", {Fault::kRace, Fault::kUnwritten});
  expect_fault<Plant::kNoWait>(v, "wait removed", {Fault::kInFlight});
  expect_fault<Plant::kWrongWait>(v, "wait leaves one group out", {Fault::kInFlight});
  expect_fault<Plant::kUnwaited>(v, "copies left behind", {Fault::kUnwaited});
  expect_fault<Plant::kSameDestination>(v, "two copies to one place",
                                        {Fault::kInFlight, Fault::kRace});
  expect_fault<Plant::kDivergentBarrier>(v, "divergent barrier", {Fault::kDivergence});
  expect_fault<Plant::kDivergentWarp>(v, "divergent warp barrier", {Fault::kDivergence});
  expect_fault<Plant::kEarlyExit>(v, "exit before a barrier", {Fault::kDivergence});
  expect_fault<Plant::kOutOfRange>(v, "index out of range", {Fault::kOutOfRange});
  expect_fault<Plant::kMisaligned>(v, "misaligned row", {Fault::kMisaligned});
  expect_fault<Plant::kUnwritten>(v, "word never written", {Fault::kUnwritten});
  expect_wrong<Plant::kShiftedIndex>(v, "index shifted");
  expect_wrong<Plant::kShiftedRow>(v, "row shifted");
  expect_wrong<Plant::kSwappedFragment>(v, "fragment swapped");
  expect_wrong<Plant::kSwappedRegisters>(v, "registers swapped");
  for (const auto& [name, schedule] : schedules()) {
    const Outcome o = run_product<Plant::kBrokenSwizzle>(schedule);
    v.check(o.error.empty() && o.right && o.counters.shared_conflicts() > 0,
            "swizzle broken, " + name + ": not noticed " + o.error);
  }
}

// Mistakes that the emulation makes in the product that has none, each at every place there is.
void check_mistakes(Verdicts& v) {
  using host_emulation::Mistake;
  using Kind = Mistake::Kind;
  const std::pair<Kind, int64_t> kinds[] = {// how many places a thread has
                                            {Kind::kNoBarrier, 2},
                                            {Kind::kNoWait, 1},
                                            {Kind::kShiftedIndex, 15},
                                            {Kind::kNoWarpBarrier, 0},
                                            {Kind::kSwappedFragment, 2}};
  for (const auto& [kind, places] : kinds) {
    for (const auto& [name, schedule] : schedules()) {
      int64_t at = 0;
      for (;; ++at) {
        Schedule mistaken = schedule;
        mistaken.mistake = {kind, at};
        const Outcome o = run_product<Plant::kNone>(mistaken);
        if (o.error.empty() && o.counters.mistakes == 0) break;
        v.check(!o.error.empty() || !o.right, "mistake " + std::to_string(static_cast<int>(kind)) +
                                                  " " + std::to_string(at) + ", " + name);
      }
      v.check(at == places, "mistake " + std::to_string(static_cast<int>(kind)) + ", " + name +
                                ": " + std::to_string(at) + " places");
    }
  }
  Schedule scattered;
  scattered.mistake = {Kind::kBrokenSwizzle, 0};
  const Outcome o = run_product<Plant::kNone>(scattered);
  v.check(o.error.empty() && o.right && o.counters.shared_conflicts() > 0,
          "mistake: a broken swizzle: " + o.error);
}

// Little kernels whose faults the product above has no room for.
__global__ void overwrite_early() {  // the second round's writes overtake the first round's reads
  float* const shared = reinterpret_cast<float*>(shared_memory());
  for (int round = 0; round < 2; ++round) {
    store_shared(shared + thread_index(), 1.0f);
    sync_threads();
    load_shared(shared + (thread_index() + 32) % block_size());
  }
}
__global__ void write_twice() {
  store_shared(reinterpret_cast<float*>(shared_memory()) + lane_index(), 1.0f);
}
__global__ void lanes_without_order() {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  store_shared(shared + lane_index(), 1.0f);
  shuffle(1, 0);  // brings the lanes together, and orders no memory
  load_shared(shared + (lane_index() ^ 1));
}
__global__ void lanes_in_order() {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  for (int round = 0; round < 2; ++round) {
    store_shared(shared + thread_index(), 1.0f);
    sync_warp();
    load_shared(shared + (thread_index() ^ 1));
    sync_warp();
  }
}
__global__ void copy_while_read(const uint32_t* from) {
  uint32_t* const shared = reinterpret_cast<uint32_t*>(shared_memory());
  if (warp_index() == 0) store_shared(shared + lane_index(), 1u);
  sync_threads();
  if (warp_index() == 0) load_shared(shared + lane_index());
  if (warp_index() == 1 && lane_index() < 8) copy_async_16(shared + 4 * lane_index(), from);
  copy_async_commit();
  copy_async_wait<0>();
}
__global__ void pass_barrier_in_flight(const uint32_t* from) {
  uint32_t* const shared = reinterpret_cast<uint32_t*>(shared_memory());
  if (warp_index() == 0) copy_async_16(shared + 4 * lane_index(), from);
  copy_async_commit();
  sync_threads();
  if (warp_index() == 1) load_shared(shared + lane_index());
  sync_threads();
  copy_async_wait<0>();
}
__global__ void load_what_was_stored(float* x) {
  store_global(x + thread_index(), 1.0f);
  sync_threads();
  load_global(x + (thread_index() + 1) % block_size());
}
__global__ void load_what_was_stored_coherently(float* x) {
  store_global(x + thread_index(), 1.0f);
  sync_threads();
  load_global_coherent(x + (thread_index() + 1) % block_size());
}
__global__ void load_misaligned(const unsigned char* x) {
  load_global(reinterpret_cast<const Vector16*>(x + 4));
}
__global__ void shuffle_apart() {
  if (lane_index() < 16) {
    shuffle(1, 0);
  } else {
    any(true);
  }
}
__global__ void leave_within_warp() {
  if (lane_index() == 3) return;
  sync_warp();
}
__global__ void touch_end(int past) {
  store_shared(reinterpret_cast<float*>(shared_memory()) + thread_index() + past, 1.0f);
}
__global__ void deep(int* out) {  // a frame of tens of kilobytes
  volatile char frame[40 * 1024];
  frame[thread_index()] = static_cast<char>(thread_index());
  sync_threads();
  out[thread_index()] = frame[thread_index()];
}

void check_small_faults(Verdicts& v) {
  alignas(16) static float x[64];
  alignas(16) static const uint32_t words[4] = {};
  for (const auto& [name, schedule] : schedules()) {
    const auto expect = [&, &name = name](const std::string& what, std::vector<Fault> faults,
                                          const std::function<void()>& run) {
      bool found = faults.empty();
      std::string got = "no error";
      try {
        run();
      } catch (const EmulationError& e) {
        got = e.what();
        found = std::find(faults.begin(), faults.end(), e.fault()) != faults.end();
      }
      v.check(found, what + ", " + name + ": " + got);
    };
    const Schedule& s = schedule;
    expect("overwritten while read", {Fault::kRace},
           [&] { launch(overwrite_early, 1, 64, 256, s); });
    expect("two warps write one word", {Fault::kRace}, [&] { launch(write_twice, 1, 64, 128, s); });
    expect("one warp writes each word", {}, [&] { launch(write_twice, 1, 32, 128, s); });
    expect("a shuffle for a warp barrier", {Fault::kRace},
           [&] { launch(lanes_without_order, 1, 32, 128, s); });
    expect("warp barriers", {}, [&] { launch(lanes_in_order, 1, 64, 256, s); });
    for (int64_t at = 0; at < 3; ++at) {
      Schedule mistaken = s;
      mistaken.mistake = {host_emulation::Mistake::Kind::kNoWarpBarrier, at};
      expect("warp barrier " + std::to_string(at) + " left out", {Fault::kRace, Fault::kUnwritten},
             [&] { launch(lanes_in_order, 1, 64, 256, mistaken); });
    }
    expect("copied over while read", {Fault::kRace, Fault::kInFlight},
           [&] { launch(copy_while_read, 1, 64, 128, s, static_cast<const uint32_t*>(words)); });
    expect("read between a copy and its wait", {Fault::kInFlight}, [&] {
      launch(pass_barrier_in_flight, 1, 64, 512, s, static_cast<const uint32_t*>(words));
    });
    expect("read-only load of stored data", {Fault::kStale},
           [&] { launch(load_what_was_stored, 1, 64, 0, s, x + 0); });
    expect("coherent load of stored data", {},
           [&] { launch(load_what_was_stored_coherently, 1, 64, 0, s, x + 0); });
    expect("misaligned global load", {Fault::kMisaligned}, [&] {
      launch(load_misaligned, 1, 32, 0, s, reinterpret_cast<const unsigned char*>(x));
    });
    expect("shuffle and vote at once", {Fault::kDivergence},
           [&] { launch(shuffle_apart, 1, 32, 0, s); });
    expect("a lane that left", {Fault::kDivergence},
           [&] { launch(leave_within_warp, 1, 64, 0, s); });
    expect("the last word", {}, [&] { launch(touch_end, 1, 32, 132, s, 1); });
    expect("one word behind the last", {Fault::kOutOfRange},
           [&] { launch(touch_end, 1, 32, 132, s, 2); });
    expect("one word before the first", {Fault::kOutOfRange},
           [&] { launch(touch_end, 1, 32, 132, s, -1); });
    expect("half a warp", {Fault::kLaunch}, [&] { launch(touch_end, 1, 48, 256, s, 0); });
    expect("no block", {Fault::kLaunch}, [&] { launch(touch_end, 0, 32, 256, s, 0); });
    expect("too much shared memory", {Fault::kLaunch},
           [&] { launch(touch_end, 1, 32, 228 * 1024, s, 0); });
    std::vector<int> out(1024, -1);
    expect("large frames", {}, [&] { launch(deep, 2, 1024, 0, s, out.data()); });
    bool right = true;
    for (int t = 0; t < 1024; ++t) right &= out[static_cast<size_t>(t)] == static_cast<char>(t);
    v.check(right, "large frames, " + name);
  }
}

// A build with -ftrivial-auto-var-init=pattern leaves no variable at a value that looks right.
__global__ void read_register(float* out) {
  float number;
  asm volatile("" ::"r"(&number) : "memory");
  out[lane_index()] = number;
}

void check_registers(Verdicts& v) {
  std::vector<float> out(32, 0.0f);
  launch(read_register, 1, 32, 0, Schedule{}, out.data());
  const bool poisoned = std::all_of(out.begin(), out.end(), [](float x) {
    return float_as_bits(x) == 0xfefefefeu || std::isnan(x);
  });
  v.check(poisoned, "registers: variables do not start poisoned in this build");
}

// ---- accesses out of bounds, which sanitizers find ----

__global__ void overread(const float* x, float* out) {
  store_global(out + thread_index(), load_global(x + thread_index() + 1));
}
__global__ void overwrite(const float* /*x*/, float* out) {
  store_global(out + thread_index() + 1, 1.0f);
}
__global__ void copy_too_much(const float* x, float* /*out*/) {
  copy_async_16(shared_memory() + 16 * thread_index(), x + 4 * thread_index());
  copy_async_commit();
  copy_async_wait<0>();
}
// By a plain pointer, past the emulator's checks.
__global__ void overread_shared(const float* /*x*/, float* out) {
  out[thread_index()] = reinterpret_cast<const float*>(shared_memory())[thread_index() + 97];
}

using PlantedKernel = void (*)(const float*, float*);
const std::pair<const char*, PlantedKernel> kPlantedKernels[] = {
    {"overread", overread},
    {"overwrite", overwrite},
    {"copy", copy_too_much},
    {"overread-shared", overread_shared},
};

int run_planted(const std::string& plant) {
  for (const auto& [name, kernel] : kPlantedKernels) {
    if (plant != name) continue;
    const std::vector<float> x(32);
    std::vector<float> out(32);
    launch(kernel, 1, 32, 512, Schedule{}, x.data(), out.data());
    std::printf("the plant was not noticed\n");
    return 0;
  }
  std::fprintf(stderr, "no plant '%s'\n", plant.c_str());
  return 2;
}

// ---- the program ----

struct Group {
  const char* name;
  void (*run)(Verdicts&);
};

const Group kGroups[] = {
    {"mma",
     [](Verdicts& v) {
       check_mma<16>(v);
       check_mma<8>(v);
       check_mma_special(v);
     }},
    {"ldmatrix",
     [](Verdicts& v) {
       check_ldmatrix<2, false>(v);
       check_ldmatrix<2, true>(v);
       check_ldmatrix<4, false>(v);
       check_ldmatrix<4, true>(v);
     }},
    {"copies", check_copies},
    {"lanes", check_lanes},
    {"arithmetic", check_arithmetic},
    {"banks", check_banks},
    {"traffic", check_traffic},
    {"unbroken", check_unbroken},
    {"plants", check_plants},
    {"mistakes", check_mistakes},
    {"small faults", check_small_faults},
    {"registers", check_registers},
};

int run(int argc, char** argv) {
  std::string only;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list") {
      for (const Group& group : kGroups) std::printf("%s\n", group.name);
      return 0;
    }
    if (argument.rfind("--plant=", 0) == 0) return run_planted(argument.substr(8));
    if (argument.rfind("--only=", 0) != 0) {
      std::fprintf(stderr, "unknown argument '%s'\n", argv[i]);
      return 2;
    }
    only = argument.substr(7);
    if (std::none_of(std::begin(kGroups), std::end(kGroups),
                     [&](const Group& group) { return only == group.name; })) {
      std::fprintf(stderr, "no group '%s'\n", only.c_str());
      return 2;
    }
  }
  Verdicts total;
  for (const Group& group : kGroups) {
    if (!only.empty() && only != group.name) continue;
    Verdicts verdicts;
    group.run(verdicts);
    std::printf("%-14s %d checks, %d failures\n", group.name, verdicts.checks, verdicts.failures);
    total.checks += verdicts.checks;
    total.failures += verdicts.failures;
  }
  std::printf("%d checks, %d failures\n", total.checks, total.failures);
  return total.failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace seqkernels::test

int main(int argc, char** argv) {
  return seqkernels::test::run(argc, argv);
}
