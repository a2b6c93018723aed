// The CUDA encoder, executed on the host: its kernels run on the emulation from the source that is
// compiled for the device.
//
//   cuda_encoder_test [--only=GROUP,...] [--list]
//
// Values are judged by the reference in fp64 (encoder_reference.h), accesses and barriers by the
// emulation, and both under AddressSanitizer where it is built with it. The program needs no CUDA.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/encoder_kernels.cuh"
#include "encoder_problem.h"
#include "encoder_reference.h"
#include "encoder_verdicts.h"
#include "host_emulation/launch.h"

namespace seqkernels::test {
namespace {

using cuda::EncoderDevice;
using cuda::EncoderInstance;
using cuda::EncoderParams;
using cuda::EncoderPlan;
using host_emulation::Counters;
using host_emulation::Schedule;

constexpr EncoderDevice kH100{227 * 1024, 132};
constexpr EncoderDevice kL4{99 * 1024, 58};

// ---- a launch ----

struct Setting {
  Run run;
  Schedule schedule;
  EncoderDevice device = kH100;
  std::function<void(EncoderParams&)> spoil = [](EncoderParams&) {};  // a mistake, planted
};

struct Result {
  std::vector<float> y;
  EncoderPlan plan;
  Counters counters;
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

Result launch(const Problem& p, const PreparedCall& made, const EncoderCall& call,
              const Setting& setting) {
  const EncoderShape shape = p.shape();
  Result r;
  r.plan = cuda::plan_encoder(shape, call, setting.device);
  if (!r.plan.reasons.empty()) throw std::runtime_error("refused: " + r.plan.reasons[0]);
  if (r.plan.shared_bytes > setting.device.shared_bytes)
    throw std::runtime_error("the plan takes more shared memory than the device has");
  Device packed(cuda::encoder_packed_bytes(shape));
  cuda::pack_encoder(shape, p.parameters(), packed.data.get());
  Device workspace(static_cast<size_t>(r.plan.workspace_bytes));
  EncoderParams params =
      cuda::encoder_params(shape, r.plan, call, packed.data.get(), workspace.data.get());
  setting.spoil(params);
  r.counters =
      host_emulation::launch(cuda::encoder_kernel_of(r.plan.instance), r.plan.grid, r.plan.threads,
                             static_cast<size_t>(r.plan.shared_bytes), setting.schedule, params);
  r.y = made.output();
  return r;
}

Result forward(const Problem& p, const Setting& setting = {}) {
  const PreparedCall made = prepare(p, setting.run);
  return launch(p, made, made.call, setting);
}

const EncoderInstance& instance_of(const Result& r) {
  return cuda::encoder_instances()[static_cast<size_t>(r.plan.instance)];
}

struct Session {
  Verdicts verdicts;

  // An exception is a failure of its own.
  void guard(const Case& c, const std::function<void(const std::string&)>& body) {
    try {
      body(c.text());
    } catch (const std::exception& error) {
      verdicts.fail(c.text() + ": " + error.what());
    }
  }
};

// ---- the grid ----

struct Shape {
  int d_model, nhead, dim_feedforward;
};
constexpr Shape kShapes[] = {{96, 2, 32}, {64, 1, 32},   {20, 2, 7},   {24, 3, 10}, {1, 1, 1},
                             {10, 1, 4},  {128, 8, 128}, {80, 5, 48},  {96, 2, 33}, {128, 1, 64},
                             {96, 1, 32}, {128, 2, 32},  {64, 2, 512}, {96, 3, 32}, {128, 4, 32},
                             {64, 4, 32}, {96, 6, 64}};
constexpr int64_t kLengths[] = {1, 7, 16, 17, 99, 100, 101, 128, 200};

// Levels of all options, drawn.
Case draw(std::mt19937_64& random, bool reference_shape) {
  const auto level = [&](size_t n) { return static_cast<int>(random() % n); };
  Case c;
  c.length = kLengths[level(std::size(kLengths))];
  const Shape& shape = kShapes[reference_shape ? 0 : 1 + level(std::size(kShapes) - 1)];
  c.d_model = shape.d_model;
  c.nhead = shape.nhead;
  c.dim_feedforward = shape.dim_feedforward;
  c.layers = 1 + level(2);
  c.batch = 1 + 2 * level(2);
  if (c.length * c.d_model * c.batch > 20000) c.batch = 1;
  c.fusion = static_cast<Fusion>(level(3));
  const int64_t widths[] = {c.d_model / 3, c.d_model / 2 | 1, c.d_model, c.d_model / 24 * 8};
  c.candidate_dim =
      c.fusion == Fusion::kConcat ? std::min<int64_t>(widths[level(4)], c.d_model) : 0;
  c.padding = static_cast<Padding>(level(3));
  c.mask = static_cast<Mask>(level(6));
  c.layout = static_cast<Layout>(level(3));
  c.bf16 = level(2) != 0;
  const int64_t latest_k[] = {-1, 0, 1, 8, c.tokens() + 3};
  c.latest_k = latest_k[level(5)];
  c.latest_last = level(2) != 0;
  c.pool = c.latest_k == 0 || (c.latest_k > 0 && level(2) != 0);
  if (!c.pool && c.padding == Padding::kExclude) c.padding = Padding::kZero;
  c.norm_first = !reference_shape && level(2) != 0;
  c.activation = static_cast<Activation>(1 + level(4));
  c.final_norm = level(2) != 0;
  c.parameters = static_cast<Parameters>(level(3));
  return c;
}

// Every pair of two options' levels that options do not exclude: all of them turn up among so many
// draws. Each case is the one of many draws with the most pairs not seen yet.
std::vector<Case> cover_pairs(bool reference_shape) {
  using Pair = std::pair<int64_t, int64_t>;
  const auto collect = [](const Case& c, std::set<Pair>& pairs) {
    const int64_t k = c.latest_k > 8 ? 9 : c.latest_k;
    const int64_t levels[] = {c.length,
                              c.d_model * 10 + c.nhead,
                              c.layers,
                              c.batch,
                              static_cast<int64_t>(c.fusion),
                              static_cast<int64_t>(c.padding),
                              static_cast<int64_t>(c.mask),
                              static_cast<int64_t>(c.layout),
                              c.bf16,
                              k,
                              c.latest_last,
                              c.pool,
                              c.norm_first,
                              static_cast<int64_t>(c.activation),
                              c.final_norm,
                              static_cast<int64_t>(c.parameters)};
    const int64_t count = std::ssize(levels);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = i + 1; j < count; ++j)
        pairs.insert({i * 10000 + levels[i], j * 10000 + levels[j]});
    }
  };
  std::mt19937_64 random(1);
  std::set<Pair> possible, seen;
  for (int i = 0; i < 20000; ++i) collect(draw(random, reference_shape), possible);
  std::vector<Case> cases;
  while (seen.size() < possible.size()) {
    Case best;
    size_t most = 0;
    for (int i = 0; i < 40; ++i) {
      const Case c = draw(random, reference_shape);
      std::set<Pair> pairs = seen;
      collect(c, pairs);
      if (pairs.size() > most) {
        most = pairs.size();
        best = c;
      }
    }
    collect(best, seen);
    collect(best, possible);
    best.seed = cases.size();
    cases.push_back(best);
  }
  return cases;
}

// Values, and what padded slots hold: NaN or infinity there changes no bit elsewhere.
void check_problem(Session& session, const Case& c, const Setting& setting = {}) {
  const Problem p(c);
  session.guard(c, [&](const std::string& what) {
    const std::vector<float> y = forward(p, setting).y;
    session.verdicts.within_bound(y, Golden(p), what);
    if (std::count(p.valid.begin(), p.valid.end(), uint8_t{0}) == 0) return;
    Setting poisoned = setting;
    poisoned.run.poison = c.seed % 2 ? Poison::kNan : Poison::kInf;
    poisoned.schedule = {Schedule::Order::kReverse};
    const std::vector<float> z = forward(p, poisoned).y;
    if (c.padding != Padding::kCompute) {
      session.verdicts.same_bits(y, z, what + ": poisoned padding");
    } else if (c.latest_k < 0) {
      session.verdicts.same_bits(valid_rows(p, y), valid_rows(p, z), what + ": poisoned padding");
    }
  });
}

void reference_shape(Session& session) {
  for (const Case& c : cover_pairs(true)) check_problem(session, c);
}

void shapes(Session& session) {
  for (const Case& c : cover_pairs(false)) check_problem(session, c);
}

// ---- order, company, memory ----

Case reference_case() {
  Case c;
  c.length = 100;
  c.layers = 2;
  return c;
}

// Cases that take every way a kernel has: registers, shared memory, workspace.
std::vector<std::pair<Case, EncoderDevice>> varied() {
  Case exact = reference_case();
  exact.batch = 3;
  exact.mask = Mask::kHoles;
  exact.padding = Padding::kCompute;
  Case summary = reference_case();
  summary.batch = 3;
  summary.bf16 = true;
  summary.fusion = Fusion::kConcat;
  summary.candidate_dim = 32;
  summary.mask = Mask::kLengths;
  summary.latest_k = 8;
  summary.latest_last = true;
  summary.pool = true;
  summary.final_norm = true;
  Case general = summary;  // two strips a warp
  general.norm_first = true;
  general.length = 200;
  general.layout = Layout::kGaps;
  general.mask = Mask::kEmpty;
  general.activation = Activation::kGelu;
  Case wide = reference_case();  // on the small device activations go to the workspace
  wide.d_model = 128;
  wide.nhead = 2;
  wide.length = 160;
  wide.batch = 2;
  wide.mask = Mask::kLeft;
  Case wider = wide;  // and keys and values
  wider.length = 200;
  wider.padding = Padding::kExclude;
  wider.latest_k = 3;
  wider.pool = true;
  return {{exact, kH100}, {summary, kL4}, {general, kH100}, {wide, kL4}, {wider, kL4}};
}

void schedules(Session& session) {
  for (const auto& [c, device] : varied()) {
    const Problem p(c);
    session.guard(c, [&, where = device](const std::string& what) {
      Setting setting;
      setting.device = where;
      const Result first = forward(p, setting);
      std::vector<Schedule> all = {{Schedule::Order::kReverse}};
      for (uint64_t seed = 1; seed <= 3; ++seed) all.push_back({Schedule::Order::kRandom, seed});
      for (const Schedule& schedule : all) {
        setting.schedule = schedule;
        const Result r = forward(p, setting);
        const std::string which = what + ": schedule " +
                                  std::to_string(static_cast<int>(schedule.order)) + " seed " +
                                  std::to_string(schedule.seed);
        session.verdicts.same_bits(first.y, r.y, which);
        const Counters &a = r.counters, &b = first.counters;
        session.verdicts.check(a.mma_m16n8k16 == b.mma_m16n8k16 && a.exp2 == b.exp2 &&
                                   a.barriers == b.barriers && a.ldmatrix == b.ldmatrix &&
                                   a.shared_conflicts() == b.shared_conflicts(),
                               which + ": the counters differ");
      }
    });
  }
}

// A sequence's bits do not depend on the batch it is in.
void company(Session& session) {
  for (const auto& [c, device] : varied()) {
    const Problem p(c);
    session.guard(c, [&, where = device](const std::string& what) {
      Setting setting;
      setting.device = where;
      const std::vector<float> all = forward(p, setting).y;
      const int64_t width = c.rows() * c.row_width();
      for (int64_t first = 0; first < c.batch; ++first) {
        setting.run.first = first;
        setting.run.count = std::min<int64_t>(2, c.batch - first);
        const auto begin = all.begin() + first * width;
        session.verdicts.same_bits({begin, begin + setting.run.count * width},
                                   forward(p, setting).y,
                                   what + ": from sequence " + std::to_string(first));
      }
    });
  }
}

// Candidates that name their user: bitwise as if each brought its events.
void users(Session& session) {
  for (const Mask mask : {Mask::kLengths, Mask::kHoles, Mask::kNone}) {
    Case c = reference_case();
    c.length = 37;
    c.batch = 3;
    c.fusion = Fusion::kConcat;
    c.candidate_dim = 32;
    c.mask = mask;
    c.latest_k = 5;
    c.pool = true;
    Problem of_users(c);
    const std::vector<int64_t> index = {2, 0, 2, 1, 0};
    const Problem repeated = Problem(of_users).repeated(index);
    session.guard(repeated.c, [&](const std::string& what) {
      const PreparedCall made = prepare(repeated), theirs = prepare(of_users);
      EncoderCall call = theirs.call;
      call.batch = made.call.batch;
      call.candidate = made.call.candidate;
      call.candidate_stride = made.call.candidate_stride;
      call.out = made.call.out;
      call.out_stride_b = made.call.out_stride_b;
      call.out_stride_l = made.call.out_stride_l;
      call.user_index = index.data();
      call.users = c.batch;
      session.verdicts.same_bits(forward(repeated).y, launch(repeated, made, call, {}).y,
                                 what + ": users by index");
    });
  }
}

// Longer sequences than shared memory holds, on a large and on a small device.
void long_sequences(Session& session) {
  bool exact = false, shared = false, activations = false, keys = false;
  for (const int64_t length : {129, 250, 256, 257, 300, 520}) {
    for (const EncoderDevice& device : {kH100, kL4}) {
      for (const bool wide : {false, true}) {
        Case c = reference_case();
        c.layers = 1;
        c.length = length;
        c.d_model = wide ? 128 : 96;
        c.mask = length % 2 ? Mask::kHoles : Mask::kLengths;
        c.padding = wide ? Padding::kCompute : Padding::kZero;
        c.bf16 = true;
        c.seed = static_cast<uint64_t>(length);
        const Problem p(c);
        session.guard(c, [&](const std::string& what) {
          Setting setting;
          setting.device = device;
          const Result r = forward(p, setting);
          session.verdicts.within_bound(r.y, Golden(p), what);
          exact = exact || instance_of(r).exact();
          shared = shared || (!instance_of(r).exact() && r.plan.workspace_bytes == 0);
          activations = activations || (r.plan.workspace_bytes > 0 && !r.plan.keys_in_workspace);
          keys = keys || r.plan.keys_in_workspace;
        });
      }
    }
  }
  session.verdicts.check(exact && shared && activations && keys, "long: a kind of memory is idle");
}

// ---- numbers at the edge ----

// Attention so sharp that sums leave the range of the first pass, above and below.
void softmax(Session& session) {
  constexpr double kInRange = 100;  // log2
  for (int i = 0; i < 8; ++i) {
    Case c;
    c.sharpen = i % 2 ? 3.0f : 40.0f;
    c.length = i < 4 ? 100 : 17;
    c.layers = 1 + i / 2 % 2;
    c.mask = i % 4 < 2 ? Mask::kHoles : Mask::kNone;
    c.norm_first = i == 2;
    c.seed = static_cast<uint64_t>(i);
    const Problem p(c);
    const Golden golden(p);
    const Golden::Sequence& s = golden.sequences[0];
    session.guard(c, [&](const std::string& what) {
      if (c.sharpen > 3) {
        session.verdicts.check(s.lowest_sum < -kInRange || s.highest_sum > kInRange,
                               what + ": no row needs the second pass");
      }
      session.verdicts.within_bound(forward(p).y, golden, what);
    });
  }
  // Padded tokens are queries beside valid ones in a strip. Whether they need the second pass or
  // not, the bits of the valid rows are the same.
  for (const int64_t length : {13, 30}) {
    Case c;
    c.length = length;
    c.padding = Padding::kCompute;
    c.mask = Mask::kHoles;
    c.seed = static_cast<uint64_t>(length);
    const Problem calm(c);
    Problem wild(c);
    const size_t e = static_cast<size_t>(c.event_dim());
    for (size_t l = 0; l < wild.valid.size(); ++l) {
      for (size_t i = 0; i < e && !wild.valid[l]; ++i) wild.x[l * e + i] *= 256;
    }
    const Golden golden(wild);
    session.guard(c, [&](const std::string& what) {
      const std::vector<float> y = forward(wild).y;
      session.verdicts.check(golden.sequences[0].highest_sum > kInRange,
                             what + ": no row needs the second pass");
      session.verdicts.within_bound(y, golden, what);
      session.verdicts.same_bits(valid_rows(calm, forward(calm).y), valid_rows(wild, y),
                                 what + ": neighbours in the second pass");
    });
  }
}

void magnitudes(Session& session) {
  for (const float scale : {1e4f, 1e-4f, 0.0f}) {
    for (const bool norm_first : {false, true}) {
      Case c;
      c.length = 33;
      c.layers = 2;
      c.norm_first = norm_first;
      c.bf16 = norm_first;
      c.mask = Mask::kPrefix;
      c.batch = 2;
      c.seed = 3;
      c.scale = scale == 1e4f ? scale : 1.0f;
      Problem p(c);
      if (scale != c.scale) {
        for (float& v : p.x) v = c.bf16 ? rounded_to_bf16(v * scale) : v * scale;
      }
      session.guard(c, [&](const std::string& what) {
        session.verdicts.check(std::count(p.valid.begin(), p.valid.end(), uint8_t{1}) > 10,
                               what + ": nothing to compute");
        session.verdicts.within_bound(forward(p).y, Golden(p),
                                      what + " x scaled by " + std::to_string(scale));
      });
    }
  }
}

// ---- cost ----

// What the reference shape costs: products, bank conflicts, memory traffic, exponentials.
void cost(Session& session) {
  Case c = reference_case();
  c.batch = 2;
  c.bf16 = true;
  const Problem p(c);
  session.guard(c, [&](const std::string& what) {
    const Result r = forward(p);
    const Counters& n = r.counters;
    // A strip of 16 rows and a layer, in m16n8k16: Q, K and V 36 column tiles of 6 steps; a head's
    // scores 14 x 3 and P V 7 x 6; 12 x 6 for the out-projection; 4 x 6 and 12 x 2 behind it.
    constexpr int64_t kIdeal = (36 * 6 + 2 * (14 * 3 + 7 * 6) + 12 * 6 + 4 * 6 + 12 * 2) * 7 * 2;
    static_assert(kIdeal == 7056);
    const double products =
        static_cast<double>(n.mma_m16n8k16) + 0.5 * static_cast<double>(n.mma_m16n8k8);
    const double ratio = products / static_cast<double>(kIdeal * c.batch);
    session.verdicts.check(instance_of(r).exact(), what + ": not the exact kernel");
    session.verdicts.check(ratio >= 1 && ratio <= 1.15,
                           what + ": " + std::to_string(ratio) + " times the products needed");
    session.verdicts.check(n.shared_conflicts() == 0,
                           what + ": " + std::to_string(n.shared_conflicts()) + " bank conflicts");
    const int64_t rows = c.batch * c.length * c.d_model * 2;
    const double read =
        static_cast<double>(rows) + static_cast<double>(cuda::encoder_packed_bytes(p.shape()));
    session.verdicts.check(static_cast<double>(n.dram_load_bytes) <= 1.1 * read &&
                               n.dram_store_bytes <= rows * 11 / 10 && n.dram_store_bytes >= rows,
                           what + ": traffic of main memory");
    session.verdicts.check(n.global_restored_bytes == 0, what + ": bytes stored twice");
    // 2 heads, 100 queries in 112 rows, 100 keys in 112.
    session.verdicts.check(n.exp2 == c.batch * c.layers * 2 * 112 * 112, what + ": exponentials");
    std::printf(
        "  reference shape, a sequence: %.0f products (%.3f of the %lld needed), %lld "
        "exponentials, "
        "%lld shared wavefronts, %lld conflicts, %lld KB of weights and rows through L1, %lld "
        "bytes of main memory for %lld\n",
        products / static_cast<double>(c.batch), ratio, static_cast<long long>(kIdeal),
        static_cast<long long>(n.exp2 / c.batch),
        static_cast<long long>(n.shared_wavefronts / c.batch),
        static_cast<long long>(n.shared_conflicts()),
        static_cast<long long>(n.global_load_sectors * 32 / c.batch / 1024),
        static_cast<long long>(n.dram_load_bytes + n.dram_store_bytes),
        static_cast<long long>(static_cast<int64_t>(read) + rows));
  });
  // Padding costs nothing: neither products nor reads.
  Case half = c;
  half.batch = 1;
  half.mask = Mask::kPrefix;
  const Problem padded(half);
  session.guard(half, [&](const std::string& what) {
    const Result r = forward(padded);
    const int64_t valid = std::count(padded.valid.begin(), padded.valid.end(), uint8_t{1});
    const int64_t strips = (valid + 15) / 16;
    session.verdicts.check(valid < half.length && r.counters.exp2 == 2 * 2 * strips * strips * 256,
                           what + ": exponentials of padded tokens");
  });
  // The last layer computes only the strips that the summary shows.
  Case window = c;
  window.batch = 1;
  window.layers = 1;
  window.latest_k = 8;
  const Problem latest(window);
  session.guard(window, [&](const std::string& what) {
    session.verdicts.check(forward(latest).counters.exp2 == 2 * 16 * 112,
                           what + ": exponentials of rows that nobody reads");
  });
  // No kernel's tiles meet bank conflicts.
  for (const EncoderInstance& i : cuda::encoder_instances()) {
    Case other = reference_case();
    other.length = 50;
    other.d_model = i.model_rows;
    other.nhead = i.model_rows / i.head_rows;
    other.layers = 1;
    other.bf16 = true;
    other.norm_first = !i.exact();
    const Problem q(other);
    session.guard(other, [&](const std::string& what) {
      const Result r = forward(q);
      session.verdicts.check(instance_of(r) == i, what + ": another kernel than expected");
      session.verdicts.check(r.counters.shared_conflicts() == 0, what + ": bank conflicts");
    });
  }
}

// ---- what is refused ----

void refusals(Session& session) {
  const auto refuses = [&](const std::string& argument, const EncoderShape& shape,
                           const EncoderCall& call) {
    const EncoderPlan plan = cuda::plan_encoder(shape, call, kL4);
    session.verdicts.check(!plan.reasons.empty() && plan.reasons[0].find(argument) == 0 &&
                               plan.reasons[0].find(", got ") != std::string::npos,
                           "refusals: expected a reason that names " + argument + ", got " +
                               (plan.reasons.empty() ? "none" : plan.reasons[0]));
  };
  Case c = reference_case();
  const Problem p(c);
  const PreparedCall made = prepare(p);
  const auto with = [&](const std::string& argument,
                        const std::function<void(EncoderShape&, EncoderCall&)>& spoil) {
    EncoderShape shape = p.shape();
    EncoderCall call = made.call;
    spoil(shape, call);
    refuses(argument, shape, call);
  };
  with("d_model", [](EncoderShape& s, EncoderCall&) { s.d_model = 130; });
  with("d_model", [](EncoderShape& s, EncoderCall&) { s.d_model = 0; });
  with("nhead", [](EncoderShape& s, EncoderCall&) { s.nhead = 5; });
  with("nhead", [](EncoderShape& s, EncoderCall&) { s.nhead = 0; });
  with("dim_feedforward", [](EncoderShape& s, EncoderCall&) { s.dim_feedforward = 1 << 20; });
  with("layers", [](EncoderShape& s, EncoderCall&) { s.num_layers = 0; });
  with("activation", [](EncoderShape& s, EncoderCall&) { s.activation = Activation::kNone; });
  with("x", [](EncoderShape&, EncoderCall& call) { call.length = 100000; });
  with("x", [](EncoderShape&, EncoderCall& call) { call.length = 0; });
  with("latest_k", [](EncoderShape&, EncoderCall& call) { call.latest_k = int64_t{1} << 40; });

  EncoderCall empty = made.call;
  empty.batch = 0;
  const EncoderPlan plan = cuda::plan_encoder(p.shape(), empty, kL4);
  session.verdicts.check(plan.reasons.empty() && plan.grid == 0, "refusals: an empty batch");
}

// ---- mistakes ----

// Each, planted in what the kernel is given, must exceed the bound or be seen by the
// emulation. No plant reaches beyond global memory: those end a program with AddressSanitizer.
void defects(Session& session) {
  Case c = reference_case();
  c.mask = Mask::kPrefix;
  c.padding = Padding::kCompute;
  const Problem p(c);
  const Golden golden(p);
  const auto caught = [&](const char* name, const std::function<void(EncoderParams&)>& spoil) {
    Setting setting;
    setting.spoil = spoil;
    Session inner;
    inner.verdicts.quiet();
    inner.guard(c, [&](const std::string& what) {
      inner.verdicts.within_bound(forward(p, setting).y, golden, what);
    });
    session.verdicts.check(inner.verdicts.failures() > 0,
                           std::string("defects: nobody noticed ") + name);
  };
  caught("the scale of another head width",
         [](EncoderParams& q) { q.score_scale *= std::sqrt(48.0f / 64.0f); });
  caught("a norm over padded columns", [](EncoderParams& q) { q.inverse_d = 1.0f / 128; });
  caught("an absent mask", [](EncoderParams& q) { q.mask = nullptr; });
  caught("values for keys", [](EncoderParams& q) { std::swap(q.layout.key, q.layout.value); });
  caught("another bias", [](EncoderParams& q) { q.layout.out_bias = q.layout.linear2_bias; });
  caught("a tile of weights too far", [](EncoderParams& q) { q.layout.linear2 += 32; });
  caught("half a tile too far", [](EncoderParams& q) { q.layout.query += 16; });
  caught("keys over values", [](EncoderParams& q) { q.values = q.keys + 32; });
  caught("keys past the end", [](EncoderParams& q) { q.values += 42 * 32; });
}

}  // namespace
}  // namespace seqkernels::test

int main(int argc, char** argv) {
  using namespace seqkernels::test;
  const std::vector<std::pair<std::string, void (*)(Session&)>> groups = {
      {"reference_shape", &reference_shape},
      {"shapes", &shapes},
      {"schedules", &schedules},
      {"company", &company},
      {"users", &users},
      {"long_sequences", &long_sequences},
      {"softmax", &softmax},
      {"magnitudes", &magnitudes},
      {"cost", &cost},
      {"refusals", &refusals},
      {"defects", &defects},
  };
  std::string only;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list") {
      for (const auto& group : groups) std::printf("%s\n", group.first.c_str());
      return 0;
    }
    if (argument.rfind("--only=", 0) != 0) {
      std::fprintf(stderr, "cuda_encoder_test [--only=GROUP,...] [--list]\n");
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
