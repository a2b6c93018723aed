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
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda_encoder_runs.h"

namespace seqkernels::test {
namespace {

const EncoderInstance& instance_of(const Result& r) {
  return cuda::encoder_instances()[static_cast<size_t>(r.plan.instance)];
}

const std::vector<Shape> kShapes = {{64, 1, 32},  {20, 2, 7},    {24, 3, 10},  {1, 1, 1},
                                    {10, 1, 4},   {128, 8, 128}, {80, 5, 48},  {96, 2, 33},
                                    {128, 1, 64}, {96, 1, 32},   {128, 2, 32}, {64, 2, 512},
                                    {96, 3, 32},  {128, 4, 32},  {64, 4, 32},  {96, 6, 64}};
const std::vector<int64_t> kLengths = {1, 7, 16, 17, 99, 100, 101, 128, 200};

const Grid kReference{{{96, 2, 32}}, kLengths, false}, kGeneral{kShapes, kLengths};

void reference_shape(Session& session) {
  for (const Case& c : cover_pairs(kReference)) check_problem(session, c);
}

void shapes(Session& session) {
  for (const Case& c : cover_pairs(kGeneral)) check_problem(session, c);
}

// Every length with every mask and batch size, the other options drawn; several schedules.
void lengths_and_masks(Session& session) {
  std::mt19937_64 random(2);
  for (const int64_t length : {1, 7, 16, 99, 100, 101, 128, 200, 300}) {
    for (int mask = 0; mask < 6; ++mask) {
      for (const bool reference_shape : {true, false}) {
        Case c = draw(random, reference_shape ? kReference : kGeneral);
        c.length = length;
        c.mask = static_cast<Mask>(mask);
        c.layers = 1;
        c.batch = 3;
        c.seed = random() % 1000;
        if (c.latest_k > 8) c.latest_k = c.tokens() + 3;
        // Half of the pairs each way, and a mask with both.
        if ((length + mask) % 2 == (reference_shape ? 0 : 1)) c.batch = 1;
        check_problem(session, c);
        if (c.batch > 1) continue;
        const Problem p(c);
        session.guard(c, [&](const std::string& what) {
          Setting setting;
          const std::vector<float> y = forward(p, setting).y;
          for (uint64_t seed = 1; seed <= 2; ++seed) {
            setting.schedule = {Schedule::Order::kRandom, seed};
            session.verdicts.same_bits(y, forward(p, setting).y,
                                       what + ": schedule of seed " + std::to_string(seed));
          }
        });
      }
    }
  }
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
        const Counters &a = r.launches[0], &b = first.launches[0];
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
  for (const int width : {96, 64}) {  // an exact kernel and a general one
    Case c;
    c.d_model = width;
    check_one_sided(session.verdicts, c,
                    "one-sided: ", [](const Problem& p) { return forward(p).y; });
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
    const Counters& n = r.launches[0];
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
  // Masks and lengths are traffic, too; padded rows are none.
  std::vector<int64_t> read_with;
  for (const Mask mask : {Mask::kLengths, Mask::kPrefix, Mask::kHoles}) {
    Case masked = c;
    masked.mask = mask;
    const Problem q(masked);
    session.guard(masked, [&](const std::string& what) {
      const Result r = forward(q);
      const int64_t row = c.d_model * 2, rows = c.batch * c.length;
      const int64_t valid = std::count(q.valid.begin(), q.valid.end(), uint8_t{1});
      const int64_t told = mask == Mask::kLengths ? 8 * c.batch : rows;
      const int64_t packed = static_cast<int64_t>(cuda::encoder_packed_bytes(q.shape()));
      const Counters& n = r.launches[0];
      read_with.push_back(n.dram_load_bytes);
      session.verdicts.check(valid < rows && 10 * (n.dram_load_bytes + n.dram_store_bytes) <=
                                                 11 * (valid * row + told + packed + rows * row),
                             what + ": traffic of main memory with a mask");
    });
  }
  session.verdicts.check(
      read_with.size() == 3 && read_with[1] - read_with[0] >= c.batch * c.length - 64,
      "cost: a mask is no traffic");
  // Padding costs nothing: neither products nor reads.
  Case half = c;
  half.batch = 1;
  half.mask = Mask::kPrefix;
  const Problem padded(half);
  session.guard(half, [&](const std::string& what) {
    const Result r = forward(padded);
    const int64_t valid = std::count(padded.valid.begin(), padded.valid.end(), uint8_t{1});
    const int64_t strips = (valid + 15) / 16;
    session.verdicts.check(
        valid < half.length && r.total(&Counters::exp2) == 2 * 2 * strips * strips * 256,
        what + ": exponentials of padded tokens");
  });
  // The last layer computes only the strips that the summary shows.
  Case window = c;
  window.batch = 1;
  window.layers = 1;
  window.latest_k = 8;
  const Problem latest(window);
  session.guard(window, [&](const std::string& what) {
    session.verdicts.check(forward(latest).total(&Counters::exp2) == 2 * 16 * 112,
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
      session.verdicts.check(r.conflicts() == 0, what + ": bank conflicts");
    });
  }
}

// ---- plans ----

// What a block may ask for, by architecture.
constexpr std::pair<const char*, int64_t> kSharedBytes[] = {
    {"sm_80", 163 * 1024}, {"sm_86", 99 * 1024},   {"sm_89", 99 * 1024},
    {"sm_90", 227 * 1024}, {"sm_100", 227 * 1024}, {"sm_120", 99 * 1024}};

// Every plan stays within the chip: of every kernel at every kind of length, up to the longest.
void plans(Session& session) {
  const Problem p(reference_case());
  const PreparedCall made = prepare(p);
  for (const auto& [arch, shared] : kSharedBytes) {
    const EncoderDevice device{shared, 100};
    const EncoderPlan reference = cuda::plan_encoder(p.shape(), made.call, device);
    session.verdicts.check(reference.reasons.empty() && reference.shared_bytes == 43472 &&
                               cuda::encoder_instances()[0].exact() && reference.instance == 0,
                           std::string("plans: the reference problem on ") + arch);
    for (const EncoderInstance& i : cuda::encoder_instances()) {
      EncoderShape shape = p.shape();
      shape.d_model = i.model_rows;
      shape.nhead = i.model_rows / i.head_rows;
      shape.norm_first = !i.exact();
      int64_t largest = 0, longest = 0;
      for (int64_t length = 1; length < 100000; length += 1 + length / 16) {
        for (const bool pool : {false, true}) {
          EncoderCall call = made.call;
          call.batch = 1000;
          call.length = length;
          call.latest_k = pool ? 8 : -1;
          call.pool = pool ? Pool::kMax : Pool::kNone;
          const EncoderPlan plan = cuda::plan_encoder(shape, call, device);
          if (!plan.reasons.empty()) continue;
          largest = std::max(largest, plan.shared_bytes);
          longest = length;
          session.verdicts.check(plan.shared_bytes <= shared && plan.threads <= 1024 &&
                                     plan.threads % 32 == 0 && plan.grid >= 1,
                                 "plans: d_model " + std::to_string(i.model_rows) + ", length " +
                                     std::to_string(length) + " on " + arch);
        }
      }
      session.verdicts.check(largest > shared * 8 / 10 && longest > 20000,
                             "plans: d_model " + std::to_string(i.model_rows) + " on " + arch +
                                 " takes at most " + std::to_string(largest) + " bytes, " +
                                 std::to_string(longest) + " tokens");
    }
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
  with("d_model", [](EncoderShape& s, EncoderCall&) { s.d_model = 1026; });
  with("head_dim", [](EncoderShape& s, EncoderCall&) { s.d_model = 260; });
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

// Kernels of both kinds, in cases where every barrier has a reason to be there: two layers, a mask,
// a pool, and on a device of one multiprocessor, through the workspace, more sequences than blocks.
std::vector<std::pair<Case, EncoderDevice>> with_every_barrier() {
  Case exact = reference_case();
  exact.length = 40;
  exact.mask = Mask::kHoles;
  exact.latest_k = 8;
  exact.pool = true;
  Case general = exact;
  general.norm_first = true;
  general.length = 150;
  Case workspace = general;
  workspace.batch = 3;
  return {{exact, kH100}, {general, kH100}, {workspace, {24 * 1024, 1}}};
}

// How a kernel with a mistake came out: noticed by the emulation, by the bound on the error or by
// bank conflicts; or so that nobody could.
enum class Outcome { kNotMade, kEqual, kNoticed, kUnnoticed };

Outcome run_mistaken(const Problem& p, const Golden& golden, const Result& right,
                     const Setting& setting) {
  try {
    const Result r = forward(p, setting);
    if (r.launches[0].mistakes == 0) return Outcome::kNotMade;
    if (r.launches[0].shared_conflicts() > 0) return Outcome::kNoticed;
    if (std::memcmp(r.y.data(), right.y.data(), r.y.size() * sizeof(float)) == 0)
      return Outcome::kEqual;
    Verdicts verdicts;
    verdicts.quiet();
    verdicts.within_bound(r.y, golden, "");
    return verdicts.failures() > 0 ? Outcome::kNoticed : Outcome::kUnnoticed;
  } catch (const host_emulation::EmulationError&) {
    return Outcome::kNoticed;
  }
}

// Each barrier of a kernel is needed; a shifted access, a swapped fragment and a broken swizzle are
// noticed wherever they are.
void mistakes(Session& session) {
  using Kind = host_emulation::Mistake::Kind;
  struct Plan {
    const char* name;
    Kind kind;
    int64_t step, end;  // which of a thread's operations
    int least;          // of them are noticed
  };
  constexpr Plan kPlans[] = {
      {"barrier removed", Kind::kNoBarrier, 1, INT64_MAX, 5},
      {"index shifted", Kind::kShiftedIndex, 11, INT64_MAX, 5},
      // One product of one strip: later ones show less and less.
      {"fragment swapped", Kind::kSwappedFragment, 37, 1000, 15},
      {"swizzle broken", Kind::kBrokenSwizzle, 1, 1, 1},
  };
  for (const auto& [c, device] : with_every_barrier()) {
    const Problem p(c);
    const Golden golden(p);
    session.guard(c, [&, where = device](const std::string& what) {
      Setting setting;
      setting.device = where;
      const Result right = forward(p, setting);
      session.verdicts.within_bound(right.y, golden, what);
      for (const Plan& plan : kPlans) {
        int noticed = 0, equal = 0;
        for (int64_t at = 0; at < plan.end; at += plan.step) {
          setting.schedule.mistake = {plan.kind, at};
          const Outcome outcome = run_mistaken(p, golden, right, setting);
          if (outcome == Outcome::kNotMade) break;
          session.verdicts.check(
              outcome != Outcome::kUnnoticed,
              what + ": nobody noticed: " + plan.name + " " + std::to_string(at));
          ++(outcome == Outcome::kEqual ? equal : noticed);
        }
        // What changes no bit is none: b0 and b1 of a product with ones, or zeros read for zeros.
        const bool all = plan.kind == Kind::kNoBarrier;
        session.verdicts.check(noticed >= plan.least && (all ? equal == 0 : noticed >= 3 * equal),
                               what + ": " + plan.name + ": " + std::to_string(noticed) +
                                   " noticed, " + std::to_string(equal) + " without effect");
      }
    });
  }
}

}  // namespace
}  // namespace seqkernels::test

int main(int argc, char** argv) {
  using namespace seqkernels::test;
  return run_groups(argc, argv,
                    {
                        {"reference_shape", &reference_shape},
                        {"shapes", &shapes},
                        {"lengths_and_masks", &lengths_and_masks},
                        {"schedules", &schedules},
                        {"company", &company},
                        {"users", &users},
                        {"long_sequences", &long_sequences},
                        {"softmax", &softmax},
                        {"magnitudes", &magnitudes},
                        {"cost", &cost},
                        {"plans", &plans},
                        {"refusals", &refusals},
                        {"defects", &defects},
                        {"mistakes", &mistakes},
                    });
}
