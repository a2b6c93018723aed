// Request scoring on CUDA, executed on the host: its kernels run on the emulation from the source
// that is compiled for the device.
//
//   cuda_request_scoring_test [--only=GROUP,...] [--list]
//
// Values are judged by the reference in fp64 on each candidate's whole sequence, accesses and
// barriers by the emulation, and both under AddressSanitizer where it is built with it. The program
// needs no CUDA.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/encoder_pack.h"
#include "cuda/ptx.cuh"
#include "encoder_problem.h"
#include "encoder_reference.h"
#include "encoder_verdicts.h"
#include "host_emulation/launch.h"

// What can be left out of a kernel: a barrier, and every doubt whether a sum is in range.
namespace seqkernels::test {
struct LeftOut {
  int barrier = -1;  // the n-th of each thread of a block
  bool doubts = false;
};
inline LeftOut left_out;
}  // namespace seqkernels::test

namespace seqkernels::cuda {
inline void sync_threads_or_not(Site site = Site::current()) {
  static std::array<std::pair<int, int>, 1024> passed;  // by each thread, in this block
  const int thread = thread_index(), block = block_index();
  auto& [of_block, count] = passed[static_cast<size_t>(thread)];
  if (of_block != block + 1) count = 0;
  of_block = block + 1;
  if (count++ != test::left_out.barrier) sync_threads(site);
}
inline bool all_or_no_doubts(bool holds, Site site = Site::current()) {
  return all(holds, site) || test::left_out.doubts;
}
}  // namespace seqkernels::cuda

#define sync_threads sync_threads_or_not
#define all all_or_no_doubts
#include "cuda/request_scoring.cuh"
#undef all
#undef sync_threads

namespace seqkernels::test {
namespace {

using cuda::EncoderClass;
using cuda::EncoderDevice;
using cuda::RequestKernel;
using cuda::RequestParams;
using cuda::RequestPlan;
using host_emulation::Counters;
using host_emulation::Schedule;

constexpr EncoderDevice kH100{227 * 1024, 132};
constexpr EncoderDevice kL4{99 * 1024, 58};

// ---- a request ----

// Users, and candidates for them.
struct Request {
  Problem users;
  std::vector<int64_t> index;
  Problem repeated;

  Request(const Case& c, const std::vector<int64_t>& user_index)
      : users(c), index(user_index), repeated(Problem(users).repeated(user_index)) {}
  Case c() const { return repeated.c; }
  int64_t width() const { return c().rows() * c().row_width(); }
};

struct Setting {
  Run run;
  Schedule schedule;
  EncoderDevice device = kH100;
  int64_t users_at_once = 0;  // 0: the plan's
  std::function<void(RequestKernel, RequestParams&)> spoil = [](RequestKernel, RequestParams&) {};
};

struct Result {
  std::vector<float> y;
  RequestPlan plan;
  std::vector<Counters> counters;  // of each launch
};

// A heap block aligned as the allocators of CUDA align, so that counts of sectors are the same.
struct Device {
  explicit Device(size_t bytes)
      : data(static_cast<unsigned char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256)),
             &std::free) {
    std::memset(data.get(), kNanByte, bytes);
  }
  std::unique_ptr<unsigned char, void (*)(void*)> data;
};

struct Packed : Device {
  explicit Packed(const Problem& p) : Device(cuda::encoder_packed_bytes(p.shape())) {
    cuda::pack_encoder(p.shape(), p.parameters(), data.get());
  }
};

Result score(const Request& request, const Setting& setting = {}) {
  const PreparedRequest made =
      prepare_request(request.users, request.repeated, request.index, setting.run);
  const EncoderCall& call = made.candidates.call;
  const EncoderShape shape = request.users.shape();
  Result r;
  r.plan = cuda::plan_request_scoring(shape, call, setting.device);
  if (!r.plan.reasons.empty()) throw std::runtime_error("refused: " + r.plan.reasons[0]);
  if (r.plan.shared_bytes > setting.device.shared_bytes)
    throw std::runtime_error("the plan takes more shared memory than the device has");
  if (setting.users_at_once > 0) r.plan.users_at_once = setting.users_at_once;
  const Packed packed(request.users);
  const Device workspace(static_cast<size_t>(r.plan.workspace_bytes));
  cuda::launch_each(
      r.plan, cuda::request_params(shape, r.plan, call, packed.data.get(), workspace.data.get()),
      [&](RequestKernel kind, int grid, RequestParams params) {
        setting.spoil(kind, params);
        r.counters.push_back(host_emulation::launch(
            cuda::request_kernel_of(kind, r.plan.instance), grid, r.plan.candidates.threads,
            static_cast<size_t>(r.plan.shared_bytes), setting.schedule, params));
        return std::string();
      });
  r.y = made.candidates.output();
  return r;
}

// In the order of request_instances().
#define SEQKERNELS_KERNEL(...) &cuda::encoder_kernel<EncoderClass<__VA_ARGS__>>,
constexpr void (*kEncoderKernels[])(cuda::EncoderParams) = {
    SEQKERNELS_CUDA_REQUEST_INSTANCES(SEQKERNELS_KERNEL)};
#undef SEQKERNELS_KERNEL

// Every candidate as a sequence of its own, by the encoder's kernel.
Result ordinary(const Request& request, const Setting& setting = {}) {
  const PreparedRequest made =
      prepare_request(request.users, request.repeated, request.index, setting.run);
  const EncoderShape shape = request.users.shape();
  Result r;
  r.plan = cuda::plan_request_scoring(shape, made.candidates.call, setting.device);
  if (!r.plan.reasons.empty()) throw std::runtime_error("refused: " + r.plan.reasons[0]);
  const cuda::EncoderPlan& plan = r.plan.candidates;
  const Packed packed(request.users);
  r.counters = {host_emulation::launch(
      kEncoderKernels[r.plan.instance], plan.grid, plan.threads,
      static_cast<size_t>(plan.shared_bytes), setting.schedule,
      cuda::encoder_params(shape, plan, made.candidates.call, packed.data.get(), nullptr))};
  r.y = made.candidates.output();
  return r;
}

// Candidate n alone.
Problem only(const Request& request, int64_t n) {
  Problem p = request.repeated;
  const auto keep = [&](auto& values, int64_t each) {
    if (!values.empty()) values = {values.begin() + n * each, values.begin() + (n + 1) * each};
  };
  p.c.batch = 1;
  keep(p.x, p.c.length * p.c.event_dim());
  keep(p.candidate, p.c.candidate_width());
  keep(p.valid, p.c.length);
  keep(p.lengths, 1);
  return p;
}

// The rows of candidate n.
std::vector<float> of_candidate(const Request& request, const std::vector<float>& y, size_t n) {
  const auto begin = y.begin() + static_cast<int64_t>(n) * request.width();
  return {begin, begin + request.width()};
}

struct Session {
  Verdicts verdicts;

  // An exception is a failure of its own.
  void guard(const Request& request, const std::function<void(const std::string&)>& body) {
    const std::string what = request.c().text() + " users=" + std::to_string(request.users.c.batch);
    try {
      body(what);
    } catch (const std::exception& error) {
      verdicts.fail(what + ": " + error.what());
    }
  }
};

// ---- values ----

Case reference_case() {
  Case c;
  c.length = 100;
  c.layers = 2;
  c.fusion = Fusion::kConcat;
  c.candidate_dim = 32;
  c.latest_k = 8;
  c.pool = true;
  return c;
}

// `count` candidates, users in no order.
Request draw(const Case& c, size_t count) {
  std::vector<int64_t> index;
  for (size_t n = 0; n < count; ++n) index.push_back(static_cast<int64_t>(n * n + 2 * n) % c.batch);
  return {c, index};
}

std::vector<Request> requests() {
  std::vector<Request> all;
  const Mask masks[] = {Mask::kNone,   Mask::kHoles,   Mask::kLeft,  Mask::kEmpty,
                        Mask::kPrefix, Mask::kLengths, Mask::kHoles, Mask::kNone};
  const auto add = [&](Case c, size_t count) {
    c.seed = all.size();
    all.push_back(draw(c, count));
  };
  // The reference shape: lengths at the edges of strips, everything else in turn.
  int turn = 0;
  for (const int64_t length : {1, 15, 16, 17, 33, 60, 100}) {
    for (const bool summary : {false, true}) {
      Case c = reference_case();
      c.length = length;
      c.batch = turn % 3 == 2 ? 1 : 3;
      c.layers = length == 100 ? 2 : 1 + turn % 2;
      c.mask = length == 1 ? Mask::kNone : masks[turn % 8];
      c.padding = static_cast<Padding>(turn % 3);
      c.bf16 = turn % 2 != 0;
      c.layout = static_cast<Layout>(turn / 2 % 3);
      const int64_t widths[] = {32, 8, 33, 96, 64};
      c.candidate_dim = widths[turn % 5] == 96 ? 95 : widths[turn % 5];
      c.activation = static_cast<Activation>(1 + turn % 4);
      c.final_norm = turn % 4 == 3;
      c.parameters = static_cast<Parameters>(turn % 3);
      c.latest_last = turn % 4 < 2;
      c.pool = turn % 3 != 0;
      if (!summary) c.latest_k = -1, c.pool = false;
      if (!c.pool && c.padding == Padding::kExclude) c.padding = Padding::kZero;
      add(c, length == 17 ? 17 : length > 30 ? 3 : 5);
      ++turn;
    }
  }
  // Every class, some with columns that only pad.
  struct Shape {
    int d_model, nhead, dim_feedforward;
    int64_t length, candidate_dim;
  };
  for (const Shape& shape : {Shape{64, 2, 32, 40, 16},
                             {48, 2, 40, 37, 5},
                             {80, 2, 64, 50, 40},
                             {128, 4, 32, 33, 64},
                             {100, 2, 33, 20, 31},
                             {96, 2, 16, 257, 32}}) {
    Case c = reference_case();
    c.d_model = shape.d_model;
    c.nhead = shape.nhead;
    c.dim_feedforward = shape.dim_feedforward;
    c.length = shape.length;
    c.candidate_dim = shape.candidate_dim;
    c.layers = shape.length > 200 ? 1 : 2;
    c.batch = shape.length > 200 ? 1 : 2;
    c.mask = masks[all.size() % 8];
    c.padding = static_cast<Padding>(all.size() % 3);
    c.bf16 = all.size() % 2 != 0;
    c.latest_k = all.size() % 2 ? 3 : -1;
    c.pool = c.latest_k > 0;
    if (!c.pool && c.padding == Padding::kExclude) c.padding = Padding::kZero;
    c.final_norm = true;
    add(c, shape.length > 200 ? 1 : 3);
  }
  return all;
}

// Within the bound, by the user's part and not otherwise; NaN in padded slots changes no bit.
void values(Session& session) {
  std::vector<bool> used(cuda::request_instances().size());
  for (const Request& request : requests()) {
    session.guard(request, [&](const std::string& what) {
      const Result r = score(request);
      used[static_cast<size_t>(r.plan.instance)] = true;
      session.verdicts.check(r.counters.size() == 2, what + ": not two launches");
      session.verdicts.within_bound(r.y, Golden(request.repeated), what);
      const bool empty =
          std::count(request.repeated.valid.begin(), request.repeated.valid.end(), uint8_t{1}) == 0;
      if (request.c().length > 1 && !empty)
        session.verdicts.check(r.y != ordinary(request).y, what + ": nothing was shared");
      if (request.c().mask == Mask::kNone) return;
      Setting poisoned;
      poisoned.run.poison = request.c().seed % 2 ? Poison::kNan : Poison::kInf;
      const std::vector<float> y = score(request, poisoned).y;
      if (request.c().padding != Padding::kCompute) {
        session.verdicts.same_bits(r.y, y, what + ": poisoned padding");
      } else if (request.c().latest_k < 0) {
        // Rows of padded tokens are computed: theirs is what sends the candidate the other way.
        const std::vector<float> alone = ordinary(request, poisoned).y;
        for (size_t n = 0; n < request.index.size(); ++n) {
          const Problem p = only(request, static_cast<int64_t>(n));
          if (std::count(p.valid.begin(), p.valid.end(), uint8_t{0}) == 0) continue;
          session.verdicts.same_bits(valid_rows(p, of_candidate(request, y, n)),
                                     valid_rows(p, of_candidate(request, alone, n)),
                                     what + ": poisoned padding, computed");
        }
      }
    });
  }
  session.verdicts.check(std::count(used.begin(), used.end(), true) == std::ssize(used),
                         "values: a class was not used");
}

// ---- order, company ----

// Registers and shared memory, lists of both kinds.
std::vector<Request> varied() {
  Case exact = reference_case();
  exact.batch = 3;
  exact.length = 50;
  exact.mask = Mask::kHoles;
  exact.seed = 1;
  Case general = exact;
  general.d_model = 128;
  general.nhead = 4;
  general.length = 150;  // two strips a warp
  general.layers = 1;
  general.batch = 2;
  general.mask = Mask::kLengths;
  general.latest_k = -1;
  general.pool = false;
  general.seed = 2;
  return {{exact, {2, 0, 2, 1, 2}}, {general, {1, 0, 0}}};
}

void schedules(Session& session) {
  for (const Request& request : varied()) {
    session.guard(request, [&](const std::string& what) {
      const Result first = score(request);
      for (const Schedule& schedule :
           {Schedule{Schedule::Order::kReverse}, Schedule{Schedule::Order::kRandom, 1},
            Schedule{Schedule::Order::kRandom, 2}}) {
        Setting setting;
        setting.schedule = schedule;
        const Result r = score(request, setting);
        const std::string which = what + ": schedule " +
                                  std::to_string(static_cast<int>(schedule.order)) + " seed " +
                                  std::to_string(schedule.seed);
        session.verdicts.same_bits(first.y, r.y, which);
        for (size_t i = 0; i < r.counters.size(); ++i) {
          const Counters &a = r.counters[i], &b = first.counters[i];
          session.verdicts.check(a.mma_m16n8k16 == b.mma_m16n8k16 && a.exp2 == b.exp2 &&
                                     a.barriers == b.barriers && a.ldmatrix == b.ldmatrix,
                                 which + ": the counters differ");
        }
      }
    });
  }
}

// A candidate's bits depend neither on the others, nor on how many users are prepared at once.
void company(Session& session) {
  for (const Request& request : varied()) {
    session.guard(request, [&](const std::string& what) {
      const std::vector<float> all = score(request).y;
      const int64_t count = std::ssize(request.index);
      for (const auto& [first, number] : {std::pair<int64_t, int64_t>{0, 1}, {1, count - 1}}) {
        Setting setting;
        setting.run.first = first;
        setting.run.count = number;
        const auto begin = all.begin() + first * request.width();
        session.verdicts.same_bits({begin, begin + number * request.width()},
                                   score(request, setting).y,
                                   what + ": from candidate " + std::to_string(first));
      }
      Setting one_by_one;
      one_by_one.users_at_once = 1;
      const Result r = score(request, one_by_one);
      session.verdicts.check(std::ssize(r.counters) == 2 * request.users.c.batch,
                             what + ": users were not prepared one by one");
      session.verdicts.same_bits(all, r.y, what + ": users one by one");
    });
  }
}

// Indices and lengths beyond their range are clamped, not followed.
void clamped(Session& session) {
  Case c = reference_case();
  c.batch = 2;
  c.length = 20;
  c.layers = 1;
  c.mask = Mask::kLengths;
  Request request(c, {0, 1});
  session.guard(request, [&](const std::string& what) {
    request.users.lengths = {7, 20};
    const std::vector<float> inside = score(request).y;
    request.users.lengths = {7, 2000};
    request.index = {-5, 99};
    session.verdicts.same_bits(inside, score(request).y, what + ": clamped");
  });
}

// ---- the guard ----

// User and candidate want different keys, each by more than a float can hold: then a candidate runs
// as a sequence of its own, bit by bit, and the candidates beside it do not.
void guard(Session& session) {
  for (const bool general : {false, true}) {
    Case c = reference_case();
    c.length = general ? 150 : 60;
    c.d_model = general ? 128 : 96;
    c.layers = general ? 1 : 2;
    c.batch = 2;
    c.sharpen = 100;
    c.mask = Mask::kEmpty;  // of the first user
    c.seed = 5;
    const std::vector<int64_t> index = {1, 0, 1, 1, 1};
    Request request(c, index);
    const int64_t width = c.candidate_dim;
    // The third is so small that the user decides alone. So is the last one, but for a NaN.
    for (const int64_t n : {2, 4}) {
      for (int64_t i = 0; i < width; ++i)
        request.repeated.candidate[static_cast<size_t>(n * width + i)] *= 0x1p-12f;
    }
    request.repeated.candidate.back() = std::numeric_limits<float>::quiet_NaN();
    session.guard(request, [&](const std::string& what) {
      const Result r = score(request);
      const std::vector<float> alone = ordinary(request).y;
      for (const size_t n : {0, 1, 3, 4}) {
        session.verdicts.same_bits(of_candidate(request, r.y, n), of_candidate(request, alone, n),
                                   what + ": the ordinary path, candidate " + std::to_string(n));
      }
      session.verdicts.check(of_candidate(request, r.y, 2) != of_candidate(request, alone, 2),
                             what + ": a calm candidate shared nothing");
      session.verdicts.within_bound(of_candidate(request, r.y, 2), Golden(only(request, 2)), what);
      Setting setting;
      setting.schedule = {Schedule::Order::kReverse};
      session.verdicts.same_bits(r.y, score(request, setting).y, what + ": reverse");
    });
  }
}

// ---- cost ----

double products(const Counters& n) {
  return static_cast<double>(n.mma_m16n8k16) + 0.5 * static_cast<double>(n.mma_m16n8k8);
}

// What a candidate of the reference shape costs beside a sequence of its own.
void cost(Session& session) {
  Case c = reference_case();
  c.bf16 = true;
  c.latest_k = -1;
  c.pool = false;
  constexpr int64_t kCandidates = 3;
  const Request request(c, std::vector<int64_t>(kCandidates, 0));
  session.guard(request, [&](const std::string& what) {
    const Result r = score(request);
    const Counters &user = r.counters[0], &n = r.counters[1];
    const Counters whole = ordinary(request).counters[0];
    // For a strip, the first layer loses Q, K and V, 36 column tiles of 6 steps, and a head's 14 x
    // 3 of scores; w takes 3 products a head. a and f are 12 tiles of 2 steps.
    constexpr int64_t kLost = (36 * 6 + 2 * 14 * 3) * 7, kAdded = 2 * 3 * 7 + 12 * 2;
    static_assert(kLost == 2100 && kAdded == 66);
    session.verdicts.check(products(whole) - products(n) == kCandidates * (kLost - kAdded),
                           what + ": products");
    // Of 2 heads, 112 queries and 112 keys; w once a key, in 4 lanes.
    session.verdicts.check(whole.exp2 - n.exp2 == kCandidates * 2 * (112 * 112 - 4 * 112),
                           what + ": exponentials");
    session.verdicts.check(user.exp2 == 2 * 112 * 100, what + ": exponentials of the user");
    session.verdicts.check(user.shared_conflicts() == 0 && n.shared_conflicts() == 0,
                           what + ": " + std::to_string(user.shared_conflicts()) + " and " +
                               std::to_string(n.shared_conflicts()) + " bank conflicts");
    session.verdicts.check(n.barriers == kCandidates * (1 + 3 + 2), what + ": barriers");
    const int64_t rows = c.length * c.d_model * 2, events = c.length * c.event_dim() * 2;
    const int64_t packed = static_cast<int64_t>(cuda::encoder_packed_bytes(request.users.shape()));
    session.verdicts.check(r.plan.user_bytes == 2 * 7 * 7 * 512 + 2 * 7 * 3 * 512 * 3,
                           what + ": a user's part");
    session.verdicts.check(
        user.dram_store_bytes == r.plan.user_bytes && user.global_restored_bytes == 0,
        what + ": a user's stores");
    session.verdicts.check(user.dram_load_bytes <= (events + packed) * 11 / 10,
                           what + ": a user's loads");
    session.verdicts.check(n.dram_load_bytes <= (events + packed + r.plan.user_bytes) * 11 / 10 &&
                               n.dram_store_bytes >= kCandidates * rows &&
                               n.dram_store_bytes <= kCandidates * rows * 11 / 10 &&
                               n.global_restored_bytes == 0,
                           what + ": traffic of main memory");
    const auto each = [&](int64_t count) { return static_cast<long long>(count / kCandidates); };
    std::printf(
        "  reference shape, a candidate: %.0f products for %.0f, %lld exponentials for %lld, %lld "
        "shared wavefronts for %lld, %lld KB through L1 for %lld; a user: %.0f products, %lld KB "
        "kept\n",
        products(n) / kCandidates, products(whole) / kCandidates, each(n.exp2), each(whole.exp2),
        each(n.shared_wavefronts), each(whole.shared_wavefronts), each(n.global_load_sectors / 32),
        each(whole.global_load_sectors / 32), products(user),
        static_cast<long long>(r.plan.user_bytes / 1024));
  });
  for (const Request& other : varied()) {
    session.guard(other, [&](const std::string& what) {
      for (const Counters& n : score(other).counters)
        session.verdicts.check(n.shared_conflicts() == 0, what + ": bank conflicts");
    });
  }
}

// ---- what is refused ----

void refusals(Session& session) {
  const Request request = draw(reference_case(), 2);
  const PreparedRequest made = prepare_request(request.users, request.repeated, request.index);
  const auto refuses = [&](const std::string& argument,
                           const std::function<void(EncoderShape&, EncoderCall&)>& spoil) {
    EncoderShape shape = request.users.shape();
    EncoderCall call = made.candidates.call;
    spoil(shape, call);
    const RequestPlan plan = cuda::plan_request_scoring(shape, call, kL4);
    session.verdicts.check(!plan.reasons.empty() && plan.reasons[0].find(argument) == 0 &&
                               plan.reasons[0].find(", got ") != std::string::npos,
                           "refusals: expected a reason that names " + argument + ", got " +
                               (plan.reasons.empty() ? "none" : plan.reasons[0]));
  };
  refuses("user_index", [](EncoderShape&, EncoderCall& call) { call.user_index = nullptr; });
  refuses("fusion", [](EncoderShape&, EncoderCall& call) { call.fusion = Fusion::kAppend; });
  refuses("norm_first", [](EncoderShape& s, EncoderCall&) { s.norm_first = true; });
  refuses("d_model and head_dim", [](EncoderShape& s, EncoderCall&) { s.nhead = 6; });
  refuses("d_model", [](EncoderShape& s, EncoderCall&) { s.d_model = 1 << 20; });
  refuses("x", [](EncoderShape&, EncoderCall& call) { call.length = 1000; });
  refuses("x", [](EncoderShape&, EncoderCall& call) { call.length = 0; });

  // How many there are decides nothing but the grid and the workspace.
  EncoderCall many = made.candidates.call, none = many;
  many.batch = 1 << 20;
  many.users = 1 << 20;
  none.batch = 0;
  const RequestPlan a = cuda::plan_request_scoring(request.users.shape(), many, kL4);
  const RequestPlan b = cuda::plan_request_scoring(request.users.shape(), none, kL4);
  session.verdicts.check(a.reasons.empty() && b.reasons.empty() && a.instance == b.instance &&
                             b.candidates.grid == 0 && a.workspace_bytes <= 64 << 20,
                         "refusals: numbers");
}

// ---- mistakes ----

// Each must exceed the bound or be seen by the emulation.
void defects(Session& session) {
  Case c = reference_case();
  c.length = 40;
  c.layers = 1;
  c.batch = 2;
  c.latest_k = 3;
  const Request request(c, {1, 0});
  c.mask = Mask::kHoles;
  const Request masked(c, {1, 0});
  const Golden golden(request.repeated), of_masked(masked.repeated);
  const auto noticed = [&](const Request& of, const Golden& expected, const Setting& setting) {
    Session inner;
    inner.verdicts.quiet();
    inner.guard(of, [&](const std::string& what) {
      inner.verdicts.within_bound(score(of, setting).y, expected, what);
    });
    return inner.verdicts.failures() > 0;
  };
  session.verdicts.check(!noticed(request, golden, {}) && !noticed(masked, of_masked, {}),
                         "defects: seen where there is none");
  const auto caught = [&](const std::string& name, RequestKernel of,
                          const std::function<void(RequestParams&)>& spoil) {
    Setting setting;
    setting.spoil = [&](RequestKernel kernel, RequestParams& r) {
      if (kernel == of) spoil(r);
    };
    session.verdicts.check(noticed(request, golden, setting) || noticed(masked, of_masked, setting),
                           "defects: nobody noticed " + name);
  };
  constexpr RequestKernel kUsers = RequestKernel::kUsers, kCandidates = RequestKernel::kCandidates;
  // With one layer, these weights are read for the candidate's part alone.
  Packed without_values(request.users);
  const cuda::EncoderLayout layout = cuda::encoder_layout(request.users.shape());
  std::memset(without_values.data.get() + 16 * layout.value, 0,
              static_cast<size_t>(16 * (layout.out - layout.value)));
  caught("an absent f", kCandidates,
         [&](RequestParams& r) { r.encoder.packed = without_values.data.get(); });
  caught("a of another scale", kCandidates,
         [](RequestParams& r) { r.encoder.score_scale *= std::sqrt(48.0f / 64.0f); });
  caught("E of another scale", kUsers,
         [](RequestParams& r) { r.encoder.score_scale *= std::sqrt(48.0f / 64.0f); });
  caught("the part of another user", kCandidates, [](RequestParams& r) { r.user_bytes = 0; });
  // What is read instead is finite, so that the guard does not help.
  caught("keys a tile too early", kCandidates, [](RequestParams& r) { r.keys -= 32; });
  caught("a by other weights", kCandidates,
         [](RequestParams& r) { r.encoder.layout.query = r.encoder.layout.key; });
  caught("values a tile too early", kCandidates, [](RequestParams& r) { r.values -= 64; });
  caught("an absent mask", kUsers, [](RequestParams& r) { r.encoder.mask = nullptr; });
  caught("another candidate", kCandidates,
         [](RequestParams& r) { r.encoder.candidate_stride = 0; });
  caught("w over scores", kCandidates, [](RequestParams& r) { r.weights = r.scores; });

  // Every barrier: of the list, of the user's keys or of the largest score, of w, of the pool.
  for (int barrier = 0; barrier < 4; ++barrier) {
    bool seen = false;
    for (const Schedule::Order order : {Schedule::Order::kForward, Schedule::Order::kReverse}) {
      Setting setting;
      setting.schedule = {order};
      left_out.barrier = barrier;
      seen = seen || noticed(masked, of_masked, setting);
      left_out.barrier = -1;
    }
    session.verdicts.check(
        seen, "defects: nobody noticed that barrier " + std::to_string(barrier) + " was gone");
  }

  // The guard: what it sends another way would be wrong.
  c.sharpen = 100;
  c.seed = 5;
  const Request sharp(c, {1});
  const Golden of_sharp(sharp.repeated);
  session.verdicts.check(!noticed(sharp, of_sharp, {}), "defects: the guard does not help");
  left_out.doubts = true;
  session.verdicts.check(noticed(sharp, of_sharp, {}), "defects: nobody noticed an absent guard");
  left_out.doubts = false;
}

}  // namespace
}  // namespace seqkernels::test

int main(int argc, char** argv) {
  using namespace seqkernels::test;
  const std::vector<std::pair<std::string, void (*)(Session&)>> groups = {
      {"values", &values},     {"schedules", &schedules}, {"company", &company},
      {"clamped", &clamped},   {"guard", &guard},         {"cost", &cost},
      {"refusals", &refusals}, {"defects", &defects},
  };
  std::string only;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list") {
      for (const auto& group : groups) std::printf("%s\n", group.first.c_str());
      return 0;
    }
    if (argument.rfind("--only=", 0) != 0) {
      std::fprintf(stderr, "cuda_request_scoring_test [--only=GROUP,...] [--list]\n");
      return 2;
    }
    only = "," + argument.substr(7) + ",";
  }
  Session session;
  for (const auto& group : groups) {
    if (!only.empty() && only.find("," + group.first + ",") == std::string::npos) continue;
    const int checks = session.verdicts.checks();
    group.second(session);
    std::printf("%-16s %d checks\n", group.first.c_str(), session.verdicts.checks() - checks);
    std::fflush(stdout);
  }
  std::printf("%d checks, %d failures, worst error %.2f rms %.2f largest\n",
              session.verdicts.checks(), session.verdicts.failures(), session.verdicts.worst().rms,
              session.verdicts.worst().largest);
  return session.verdicts.failures() == 0 && session.verdicts.checks() > 0 ? 0 : 1;
}
