// The CUDA encoder's form for wide models, executed on the host.
//
//   cuda_split_encoder_test [--only=GROUP,...] [--list]
//
// Judged as in cuda_encoder_test. Workspaces start as NaN.
#include <cmath>
#include <cstdio>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda_encoder_runs.h"

namespace seqkernels::test {
namespace {

using cuda::SplitStep;

constexpr EncoderDevice kOneMultiprocessor{227 * 1024, 1};  // few sequences at once
constexpr EncoderDevice kSmall{30 * 1024, 1};               // and little of everything

Case wide(const Shape& shape, int64_t length) {
  Case c;
  c.d_model = shape.d_model;
  c.nhead = shape.nhead;
  c.dim_feedforward = shape.dim_feedforward;
  c.length = length;
  return c;
}

// ---- values ----

// Widths and heads with and without padding, warps without a column.
const std::vector<Shape> kShapes = {{192, 4, 48}, {256, 16, 40}, {160, 8, 32}, {130, 5, 17},
                                    {192, 2, 96}, {260, 4, 32},  {520, 8, 16}};

void options(Session& session) {
  Grid grid{kShapes, {1, 7, 16, 33}};
  grid.most_values = 4000;
  for (const Case& c : cover_pairs(grid)) check_problem(session, c);
}

void lengths(Session& session) {
  uint64_t seed = 0;
  for (const int64_t length : {1, 7, 16, 99, 100, 101, 128, 200, 300}) {
    Case c = wide({160, 5, 32}, length);
    c.mask = static_cast<Mask>(seed % 6);
    c.padding = static_cast<Padding>(seed % 2);
    c.norm_first = seed % 2 != 0;
    c.bf16 = seed % 3 == 0;
    c.seed = seed++;
    check_problem(session, c);
  }
}

void shapes(Session& session) {
  const std::pair<Shape, int64_t> all[] = {
      {{256, 4, 1024}, 49},  {{192, 4, 256}, 100}, {{160, 8, 64}, 100}, {{512, 8, 2048}, 20},
      {{1024, 16, 512}, 17}, {{1024, 8, 32}, 16},  {{384, 3, 64}, 50}};
  uint64_t seed = 0;
  for (const auto& [shape, length] : all) {
    Case c = wide(shape, length);
    c.mask = Mask::kHoles;
    c.norm_first = seed % 2 != 0;
    c.activation = seed % 2 ? Activation::kGelu : Activation::kRelu;
    c.seed = seed++;
    const Problem p(c);
    session.guard(c, [&](const std::string& what) {
      session.verdicts.within_bound(forward(p).y, Golden(p), what);
    });
  }
}

// Attention so sharp that sums leave the range of the first pass.
void softmax(Session& session) {
  constexpr double kInRange = 100;  // log2
  for (int i = 0; i < 3; ++i) {
    Case c = wide({144, 3, 32}, i == 2 ? 17 : 50);
    c.sharpen = 40.0f;
    c.mask = i == 0 ? Mask::kHoles : Mask::kNone;
    c.seed = static_cast<uint64_t>(i);
    const Problem p(c);
    const Golden golden(p);
    session.guard(c, [&](const std::string& what) {
      session.verdicts.check(golden.sequences[0].highest_sum > kInRange,
                             what + ": no row needs the second pass");
      session.verdicts.within_bound(forward(p).y, golden, what);
    });
  }
  check_one_sided(session.verdicts, wide({144, 3, 32}, 20),
                  "one-sided: ", [](const Problem& p) { return forward(p).y; });
}

void magnitudes(Session& session) {
  for (const bool norm_first : {false, true}) {
    Case c = wide({144, 3, 32}, 33);
    c.layers = 2;
    c.norm_first = norm_first;
    c.mask = Mask::kPrefix;
    c.scale = 1e4f;
    c.seed = 3;
    const Problem p(c);
    session.guard(c, [&](const std::string& what) {
      session.verdicts.within_bound(forward(p).y, Golden(p), what);
    });
  }
}

// Rows far from 0: a padded column that counted would change their variance.
void offsets(Session& session) {
  for (const Shape& shape : {Shape{144, 3, 32}, {260, 4, 16}, {520, 8, 16}}) {
    for (const bool norm_first : {false, true}) {
      Case c = wide(shape, 17);
      c.norm_first = norm_first;
      Problem p(c);
      for (float& v : p.x) v = rounded_to_bf16(v + 4);
      session.guard(c, [&](const std::string& what) {
        session.verdicts.within_bound(forward(p).y, Golden(p), what + " x + 4");
      });
    }
  }
}

// ---- order, company, memory ----

std::vector<Case> varied() {
  Case last = wide({160, 5, 80}, 115);
  last.layers = 2;
  last.batch = 2;
  last.mask = Mask::kLengths;
  last.bf16 = true;
  last.fusion = Fusion::kConcat;
  last.candidate_dim = 32;
  last.latest_k = 8;
  last.latest_last = true;
  last.pool = true;
  last.final_norm = true;
  Case first = last;
  first.norm_first = true;
  first.layout = Layout::kGaps;
  first.mask = Mask::kEmpty;
  first.latest_k = -1;
  first.pool = false;
  first.length = 70;
  Case plain = last;  // no norm behind the last layer's
  plain.layers = 1;
  plain.final_norm = false;
  Case wider = wide({260, 4, 40}, 35);
  wider.batch = 2;
  wider.mask = Mask::kHoles;
  wider.padding = Padding::kCompute;
  Case widest = wide({520, 8, 16}, 20);
  widest.batch = 2;
  widest.mask = Mask::kLeft;
  return {last, first, plain, wider, widest};
}

void schedules(Session& session) {
  for (const Case& c : varied()) {
    const Problem p(c);
    session.guard(c, [&](const std::string& what) {
      Setting setting;
      const Result first = forward(p, setting);
      std::vector<Schedule> all = {{Schedule::Order::kReverse}};
      for (uint64_t seed = 1; seed <= 2; ++seed) all.push_back({Schedule::Order::kRandom, seed});
      for (const Schedule& schedule : all) {
        setting.schedule = schedule;
        const Result r = forward(p, setting);
        session.verdicts.same_bits(first.y, r.y,
                                   what + ": schedule " +
                                       std::to_string(static_cast<int>(schedule.order)) + " seed " +
                                       std::to_string(schedule.seed));
      }
    });
  }
}

// A sequence's bits do not depend on the batch it is in, nor on how many share the workspace or how
// many strips a block takes.
void company(Session& session) {
  for (const Case& c : varied()) {
    const Problem p(c);
    session.guard(c, [&](const std::string& what) {
      const Result all = forward(p);
      const int64_t width = c.rows() * c.row_width();
      for (int64_t first = 0; first < c.batch; ++first) {
        Setting alone;
        alone.run.first = first;
        alone.run.count = 1;
        const auto begin = all.y.begin() + first * width;
        session.verdicts.same_bits({begin, begin + width}, forward(p, alone).y,
                                   what + ": sequence " + std::to_string(first));
      }
      Setting small;
      small.device = kSmall;
      const Result r = forward(p, small);
      session.verdicts.check(r.plan.split.group < all.plan.split.group,
                             what + ": the small device takes as many strips");
      session.verdicts.same_bits(all.y, r.y, what + ": on a small device");
    });
  }
  Case c = wide({144, 3, 16}, 100);
  c.batch = 9;
  c.mask = Mask::kLengths;
  const Problem p(c);
  session.guard(c, [&](const std::string& what) {
    Setting few;
    few.device = kOneMultiprocessor;
    const Result r = forward(p, few);
    session.verdicts.check(r.plan.split.sequences < c.batch, what + ": all sequences at once");
    session.verdicts.same_bits(forward(p).y, r.y, what + ": a few sequences at a time");
  });
}

// Candidates that name their user: bitwise as if each brought its events.
void users(Session& session) {
  Case c = wide({144, 3, 16}, 20);
  c.batch = 3;
  c.fusion = Fusion::kConcat;
  c.candidate_dim = 32;
  c.mask = Mask::kLengths;
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

// Keys and values that shared memory does not hold.
void long_sequences(Session& session) {
  for (const auto& [device, length] : {std::pair{kL4, int64_t{200}}, {kSmall, int64_t{101}}}) {
    Case c = wide({256, 2, 32}, length);
    c.mask = Mask::kHoles;
    c.padding = Padding::kCompute;
    c.batch = device.multiprocessors == 1 ? 2 : 1;
    const Problem p(c);
    session.guard(c, [&, where = device](const std::string& what) {
      Setting setting;
      setting.device = where;
      const Result r = forward(p, setting);
      session.verdicts.check(r.plan.keys_in_workspace, what + ": keys fit");
      session.verdicts.within_bound(r.y, Golden(p), what);
    });
  }
}

// ---- cost ----

// Products that a shape needs, in m16n8k16; all of its widths are multiples of 16.
int64_t products_needed(const Case& c, int64_t tokens, int64_t head_tiles) {
  const int64_t strips = (tokens + 15) / 16, d = c.d_model / 16, f = c.dim_feedforward / 16;
  const int64_t rows = strips * 2 * (4 * d * d + 2 * d * f);
  return c.layers * c.batch * (rows + c.nhead * strips * strips * 2 * (2 * head_tiles));
}

void cost(Session& session) {
  Case c = wide({256, 4, 1024}, 100);
  c.bf16 = true;
  const Problem p(c);
  session.guard(c, [&](const std::string& what) {
    Setting setting;
    setting.device = kOneMultiprocessor;  // one block a sequence
    const Result r = forward(p, setting);
    const int64_t needed = products_needed(c, c.length, 4);
    const double ratio =
        static_cast<double>(r.total(&Counters::mma_m16n8k16)) / static_cast<double>(needed);
    session.verdicts.check(ratio >= 1 && ratio <= 1.15,
                           what + ": " + std::to_string(ratio) + " times the products needed");
    session.verdicts.check(r.conflicts() == 0,
                           what + ": " + std::to_string(r.conflicts()) + " bank conflicts");
    session.verdicts.check(r.total(&Counters::global_restored_bytes) == 0,
                           what + ": bytes stored twice");
    // x goes to the workspace and is read by attention and by the rows behind it; so is what
    // attention leaves.
    const int64_t rows = c.length * c.d_model * 2, strips = 112 * c.d_model * 2;
    const int64_t weights = static_cast<int64_t>(cuda::encoder_packed_bytes(p.shape()));
    const int64_t loaded = r.total(&Counters::dram_load_bytes);
    const int64_t stored = r.total(&Counters::dram_store_bytes);
    constexpr int64_t kEnds = 64;  // of sectors that rows share with other memory
    session.verdicts.check(loaded <= rows + 3 * strips + weights + kEnds &&
                               stored >= rows + 2 * strips && stored <= rows + 2 * strips + kEnds,
                           what + ": traffic of main memory");
    std::printf(
        "  d 256, L 100, a layer: %lld products (%.3f of those needed), %lld shared wavefronts, "
        "%lld KB through L1, %lld KB loaded and %lld KB stored beside %lld KB of weights\n",
        static_cast<long long>(r.total(&Counters::mma_m16n8k16)), ratio,
        static_cast<long long>(r.total(&Counters::shared_wavefronts)),
        static_cast<long long>(r.total(&Counters::global_load_sectors) / 32),
        static_cast<long long>((loaded - weights) / 1024), static_cast<long long>(stored / 1024),
        static_cast<long long>(weights / 1024));
  });
  // Padding costs nothing, and the last layer computes only the strips that the summary shows.
  Case part = wide({192, 4, 48}, 100);
  part.mask = Mask::kPrefix;
  part.latest_k = 8;
  part.seed = 1;
  const Problem q(part);
  session.guard(part, [&](const std::string& what) {
    const Result r = forward(q);
    const int64_t valid = std::count(q.valid.begin(), q.valid.end(), uint8_t{1});
    const int64_t strips = (valid + 15) / 16;
    session.verdicts.check(strips < 7 && r.total(&Counters::exp2) == 4 * 16 * 16 * strips,
                           what + ": exponentials of rows that nobody reads");
    // Of the tail: 12 x 12 tiles for the out-projection, 12 x 3 and 3 x 12 behind it.
    session.verdicts.check(r.launches[2].mma_m16n8k16 == 2 * (12 * 12 + 2 * 12 * 3),
                           what + ": products of rows that nobody reads");
  });
  // No kernel meets bank conflicts.
  std::set<std::pair<int, int>> seen;
  for (const auto& [shape, norm_first] : {std::pair{Shape{256, 16, 64}, true},
                                          {{160, 5, 64}, false},
                                          {{192, 4, 64}, true},
                                          {{512, 8, 32}, true},
                                          {{192, 2, 32}, false},
                                          {{1024, 8, 32}, true}}) {
    Case each = wide(shape, 33);
    each.norm_first = norm_first;
    each.bf16 = true;
    each.final_norm = true;
    const Problem problem(each);
    session.guard(each, [&](const std::string& what) {
      const Result r = forward(problem);
      seen.insert({0, r.plan.split.attention});
      seen.insert({1, r.plan.split.instance});
      session.verdicts.check(r.conflicts() == 0, what + ": bank conflicts");
    });
  }
  session.verdicts.check(
      seen.size() == cuda::split_attention_instances().size() + cuda::split_instances().size(),
      "cost: a kernel did not run");
}

// ---- what is refused ----

void refusals(Session& session) {
  const Problem p(wide({192, 4, 48}, 20));
  const PreparedCall made = prepare(p);
  const auto plan_with = [&](const std::function<void(EncoderShape&, EncoderCall&)>& spoil) {
    EncoderShape shape = p.shape();
    EncoderCall call = made.call;
    spoil(shape, call);
    return cuda::plan_encoder(shape, call, kL4);
  };
  const auto refuses = [&](const std::string& reason,
                           const std::function<void(EncoderShape&, EncoderCall&)>& spoil) {
    const EncoderPlan plan = plan_with(spoil);
    session.verdicts.check(!plan.reasons.empty() && plan.reasons[0] == reason,
                           "refusals: expected '" + reason + "', got '" +
                               (plan.reasons.empty() ? "" : plan.reasons[0]) + "'");
  };
  refuses("d_model: expected at most 1024, got 1040",
          [](EncoderShape& s, EncoderCall&) { s.d_model = 1040; });
  refuses("head_dim: expected at most 128, got 192",
          [](EncoderShape& s, EncoderCall&) { s.nhead = 1; });
  // Heads pad to 16 columns.
  refuses("nhead: expected at most 128, got 256", [](EncoderShape& s, EncoderCall&) {
    s.d_model = 256;
    s.nhead = 256;
  });
  refuses("x: expected at most 23024 tokens on this device, got 50000",
          [](EncoderShape&, EncoderCall& call) { call.length = 50000; });
  // What the refusal names is taken.
  const EncoderPlan longest =
      plan_with([](EncoderShape&, EncoderCall& call) { call.length = 23024; });
  session.verdicts.check(longest.reasons.empty(), "refusals: the longest sequence");
  const EncoderPlan most_heads = plan_with([](EncoderShape& s, EncoderCall& call) {
    s.d_model = 1024;
    s.nhead = 128;
    call.pool = Pool::kMax;
    call.length = 5000;
  });
  session.verdicts.check(most_heads.reasons.empty(), "refusals: as many heads as are taken");
  const EncoderPlan empty = plan_with([](EncoderShape&, EncoderCall& call) { call.batch = 0; });
  session.verdicts.check(empty.reasons.empty() && empty.workspace_bytes == 0,
                         "refusals: an empty batch");
}

// ---- mistakes ----

// Each, planted in what the kernels are given, must exceed the bound or be seen by the emulation.
void defects(Session& session) {
  Case c = wide({144, 3, 100}, 70);
  c.mask = Mask::kPrefix;
  c.padding = Padding::kCompute;
  c.layers = 2;
  const auto caught = [&](const char* name, bool norm_first,
                          const std::function<void(SplitLaunch&)>& spoil) {
    Case with = c;
    with.norm_first = norm_first;
    const Problem p(with);
    Setting setting;
    setting.spoil_split = spoil;
    Session inner;
    inner.verdicts.quiet();
    inner.guard(with, [&](const std::string& what) {
      inner.verdicts.within_bound(forward(p, setting).y, Golden(p), what);
    });
    session.verdicts.check(inner.verdicts.failures() > 0,
                           std::string("defects: nobody noticed ") + name);
  };
  const auto layout = [](SplitLaunch& l) -> cuda::EncoderLayout& {
    return l.params.encoder.layout;
  };
  caught("the scale of another head width", false,
         [](SplitLaunch& l) { l.params.encoder.score_scale *= std::sqrt(48.0f / 64.0f); });
  caught("a norm over padded columns", false,
         [](SplitLaunch& l) { l.params.encoder.inverse_d = 1.0f / 160; });
  caught("an absent mask in attention", false, [](SplitLaunch& l) {
    if (l.step == SplitStep::kAttention) l.params.encoder.mask = nullptr;
  });
  caught("values for keys", false,
         [&](SplitLaunch& l) { std::swap(layout(l).key, layout(l).value); });
  caught("another layer", false, [](SplitLaunch& l) {
    if (l.step == SplitStep::kTail) l.params.layer = 1 - l.params.layer;
  });
  caught("the norm of the wrong layer", true, [&](SplitLaunch& l) {
    if (l.step == SplitStep::kTail) layout(l).norm1_bias = layout(l).norm2_bias;
  });
  caught("rows that are not normalized", true,
         [](SplitLaunch& l) { l.params.source = l.params.x; });
  caught("a tile of weights too far", false, [&](SplitLaunch& l) { layout(l).linear2 += 32; });
  caught("a group of weights too far", false,
         [&](SplitLaunch& l) { layout(l).linear1 += 2 * 10 * 32; });
  caught("the hidden layer over its operand", false, [](SplitLaunch& l) {
    if (l.step == SplitStep::kTail) l.params.hidden = l.params.operand;
  });
  caught("the operand over the positions", false, [](SplitLaunch& l) {
    if (l.step == SplitStep::kTail) l.params.operand = 0;
  });
  caught("keys over values", false,
         [](SplitLaunch& l) { l.params.encoder.values = l.params.encoder.keys + 32; });
  caught("strips that nobody brings", false, [](SplitLaunch& l) {
    if (l.step == SplitStep::kTokens) l.grid -= 1;
  });
  caught("a head too few", false, [](SplitLaunch& l) {
    if (l.step == SplitStep::kAttention) l.grid -= 1;
  });
}

}  // namespace
}  // namespace seqkernels::test

int main(int argc, char** argv) {
  using namespace seqkernels::test;
  return run_groups(argc, argv,
                    {
                        {"options", &options},
                        {"lengths", &lengths},
                        {"shapes", &shapes},
                        {"softmax", &softmax},
                        {"magnitudes", &magnitudes},
                        {"offsets", &offsets},
                        {"schedules", &schedules},
                        {"company", &company},
                        {"users", &users},
                        {"long_sequences", &long_sequences},
                        {"cost", &cost},
                        {"refusals", &refusals},
                        {"defects", &defects},
                    });
}
