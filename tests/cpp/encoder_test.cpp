// The native encoder on a grid of hard problems, on every instruction set that runs here. Meant to
// be built with sanitizers: the program checks values, they check accesses and threads.
//
//   encoder_test [--isa=NAME] [--only=GROUP,...] [--plant=DEFECT] [--list]
//
// A plant is a deliberate mistake, which must make the program fail: it shows that the checks bite.
// The program needs nothing but the native core.
#include <chrono>
#include <cstdio>
#include <functional>
#include <map>
#include <set>
#include <thread>
#include <utility>

#include "encoder_problem.h"
#include "encoder_reference.h"
#include "encoder_verdicts.h"
#include "packed.h"

#if defined(__x86_64__) && defined(__linux__)
#include "amx_trap.h"
#define SEQKERNELS_AMX_TRAP
#endif

namespace seqkernels::test {
namespace {

// ---- what is tested ----

// An instruction set; `trapped`: the AMX machine code, its tile instructions performed by a signal
// handler on a processor that has none.
struct Target {
  std::string name;
  bool trapped = false;
  bool slow() const { return trapped || name == "amx_emulated"; }

  std::unique_ptr<Encoder> encoder(const Problem& p) const {
    if (!trapped) return std::make_unique<Encoder>(name, p.shape(), p.parameters());
    return std::make_unique<Encoder>(cpu::encoder_amx_bf16(), p.shape(), p.parameters());
  }
};

std::vector<Target> all_targets() {
  std::vector<Target> targets;
  for (const std::string& name : isa_names()) {
    if (isa_unsupported_reasons(name).empty()) targets.push_back({name});
  }
#if defined(SEQKERNELS_AMX_TRAP)
  const std::vector<std::string>& names = isa_names();
  const auto has = [&](const char* name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  if (has("amx_bf16") && !isa_unsupported_reasons("amx_bf16").empty() && has("avx512_bf16") &&
      isa_unsupported_reasons("avx512_bf16").empty()) {
    amx_trap::install();
    targets.push_back({"amx_bf16(trapped)", true});
  }
#endif
  return targets;
}

struct Session {
  std::vector<Target> targets;
  Verdicts verdicts;

  using Body = std::function<void(const Encoder&, const std::string&)>;

  // Runs `body` with the problem's encoder; an exception is a failure of its own.
  void guard(const Target& target, const Problem& p, const Body& body) {
    const std::string what = target.name + ": " + p.c.text();
    try {
      body(*target.encoder(p), what);
    } catch (const std::exception& error) {
      verdicts.fail(what + ": " + error.what());
    }
  }
  void each(const Problem& p, const Body& body, bool slow_too = true) {
    for (const Target& target : targets) {
      if (slow_too || !target.slow()) guard(target, p, body);
    }
  }
};

// ---- the grid ----

struct Shape {
  int d_model, nhead, dim_feedforward;
};
constexpr Shape kShapes[] = {{96, 2, 32}, {64, 1, 32}, {20, 2, 7},    {24, 3, 10}, {1, 1, 1},
                             {3, 3, 5},   {10, 1, 4},  {128, 8, 128}, {80, 5, 48}, {160, 2, 64}};
constexpr int64_t kLengths[] = {1, 2, 7, 15, 16, 17, 31, 33, 99, 100, 101, 128, 200};

// Every length with every shape; all other options so that every pair of two options' levels
// occurs, each level drawn, the best of many draws taken.
class Grid {
 public:
  static constexpr int kFactors = 17;
  // length, shape, layers, fusion, candidate width, padding, mask, layout, bf16, latest_k,
  // latest_last, pool, norm_first, activation, final norm, parameters, batch
  static constexpr int kLevels[kFactors] = {13, 10, 3, 3, 3, 3, 6, 3, 2, 5, 2, 2, 2, 4, 2, 3, 2};
  using Row = std::vector<int>;

  Grid() : random_(1) {
    collect_possible();
    for (int length = 0; length < kLevels[0]; ++length) {
      for (int shape = 0; shape < kLevels[1]; ++shape) add_best(length, shape);
    }
    while (seen_.size() < possible_.size()) add_best(-1, -1);
  }

  std::vector<Case> cases() const {
    std::vector<Case> all;
    for (const Row& row : rows_) all.push_back(made(row, all.size()));
    return all;
  }

 private:
  using Pair = std::pair<int, int>;  // levels numbered across factors

  // Pairs that options do not exclude: all of them turn up among so many draws.
  void collect_possible() {
    for (int i = 0; i < 20000; ++i) collect(draw(-1, -1), possible_);
  }

  // Of many drawn rows the one with the most pairs not seen yet.
  void add_best(int length, int shape) {
    Row best;
    size_t most = 0;
    for (int i = 0; i < 60; ++i) {
      const Row row = draw(length, shape);
      std::set<Pair> pairs;
      collect(row, pairs);
      size_t fresh = 1;
      for (const Pair& pair : pairs) fresh += !seen_.count(pair);
      if (fresh > most) {
        most = fresh;
        best = row;
      }
    }
    collect(best, seen_);
    collect(best, possible_);
    rows_.push_back(best);
  }

  // Options that exclude each other are brought together.
  Row draw(int length, int shape) {
    Row row;
    for (int levels : kLevels)
      row.push_back(static_cast<int>(random_() % static_cast<size_t>(levels)));
    if (length >= 0) row[0] = length;
    if (shape >= 0) row[1] = shape;
    if (row[3] != static_cast<int>(Fusion::kConcat)) row[4] = 0;
    if (row[9] == 0) row[11] = 0;  // the full sequence has no pool
    if (row[9] == 1) row[11] = 1;  // a summary without window has one
    if (row[11] == 0 && row[5] == static_cast<int>(Padding::kExclude)) row[5] = 0;
    return row;
  }

  static void collect(const Row& row, std::set<Pair>& pairs) {
    int first = 0;
    for (int i = 0; i < kFactors; first += kLevels[i++]) {
      int second = first + kLevels[i];
      for (int j = i + 1; j < kFactors; second += kLevels[j++])
        pairs.insert({first + row[static_cast<size_t>(i)], second + row[static_cast<size_t>(j)]});
    }
  }

  static Case made(const Row& row, size_t index) {
    const auto level = [&](size_t i) { return row[i]; };
    Case c;
    c.length = kLengths[level(0)];
    const Shape& shape = kShapes[level(1)];
    c.d_model = shape.d_model;
    c.nhead = shape.nhead;
    c.dim_feedforward = shape.dim_feedforward;
    c.layers = 1 + level(2);
    c.fusion = static_cast<Fusion>(level(3));
    const int64_t candidate_dims[] = {c.d_model / 3, c.d_model / 2 | 1, c.d_model};
    c.candidate_dim = std::min<int64_t>(candidate_dims[level(4)], c.d_model);
    c.padding = static_cast<Padding>(level(5));
    c.mask = static_cast<Mask>(level(6));
    c.layout = static_cast<Layout>(level(7));
    c.bf16 = level(8) != 0;
    const int64_t latest_k[] = {-1, 0, 1, 8, c.tokens() + 3};
    c.latest_k = latest_k[level(9)];
    c.latest_last = level(10) != 0;
    c.pool = level(11) != 0;
    c.norm_first = level(12) != 0;
    c.activation = static_cast<Activation>(1 + level(13));
    c.final_norm = level(14) != 0;
    c.parameters = static_cast<Parameters>(level(15));
    c.batch = 1 + 2 * level(16);
    c.seed = index;
    return c;
  }

  std::mt19937_64 random_;
  std::vector<Row> rows_;
  std::set<Pair> possible_, seen_;
};

// Values, guard bands, and what padded slots hold: NaN or infinity there changes no bit elsewhere,
// nor does it where padding is said by a byte.
void check_problem(Session& session, const Problem& p, bool slow_too) {
  const Golden golden(p);
  const bool padded = std::count(p.valid.begin(), p.valid.end(), uint8_t{0}) > 0;
  session.each(
      p,
      [&](const Encoder& encoder, const std::string& what) {
        const std::vector<float> y = forward(encoder, p);
        session.verdicts.within_bound(y, golden, what);
        if (!padded) return;
        Run run;
        run.poison = p.c.seed % 2 ? Poison::kNan : Poison::kInf;
        run.flagged = p.c.padding != Padding::kExclude;
        const std::vector<float> poisoned = forward(encoder, p, run);
        if (p.c.padding != Padding::kCompute) {
          session.verdicts.same_bits(y, poisoned, what + ": poisoned padding");
        } else if (p.c.latest_k < 0) {
          session.verdicts.same_bits(valid_rows(p, y), valid_rows(p, poisoned),
                                     what + ": poisoned padding");
        }
      },
      slow_too);
}

// Instruction sets that are emulated instruction by instruction take the problems that are not
// large, and every fifth of those that are.
void grid(Session& session) {
  for (const Case& c : Grid().cases()) {
    const Problem p(c);
    const int64_t work = c.batch * c.layers * c.tokens() * c.d_model;
    check_problem(session, p, work < 6000 || c.seed % 5 == 0);
  }
}

// ---- company, threads, memory ----

// Problems large enough that the dispatcher wants as many threads as it is offered.
std::vector<Case> shared_cases() {
  Case c;
  c.batch = 9;
  c.length = 100;
  c.layers = 2;
  c.mask = Mask::kHoles;
  c.padding = Padding::kCompute;
  Case summary = c;
  summary.fusion = Fusion::kConcat;
  summary.candidate_dim = 33;
  summary.padding = Padding::kZero;
  summary.latest_k = 8;
  summary.latest_last = true;
  summary.pool = true;
  summary.final_norm = true;
  summary.norm_first = true;
  summary.bf16 = true;
  summary.seed = 1;
  Case wide = c;
  wide.d_model = 160;
  wide.dim_feedforward = 64;
  wide.length = 33;
  wide.mask = Mask::kLengths;
  wide.padding = Padding::kExclude;
  wide.latest_k = 1;
  wide.pool = true;
  wide.layout = Layout::kGaps;
  wide.seed = 2;
  return {c, summary, wide};
}

// A sequence's bits depend neither on the number of threads nor on the batch it is in. The
// dispatcher has three routes: one thread, a team on each sequence (few sequences for the threads),
// and sequences handed out one by one; these runs take all of them.
void company(Session& session) {
  struct Company {
    int64_t first, count;
    int threads;
  };
  const std::vector<Company> many = {{0, 9, 2}, {0, 9, 3}, {0, 7, 1}, {2, 7, 2}, {0, 7, 3},
                                     {0, 7, 5}, {3, 3, 1}, {4, 3, 2}, {5, 3, 3}, {6, 3, 5},
                                     {8, 1, 1}, {7, 1, 2}, {6, 1, 3}, {5, 1, 5}};
  const std::vector<Company> few = {{0, 3, 2}, {0, 3, 3}, {1, 1, 1}, {2, 1, 5}};
  for (const Case& c : shared_cases()) {
    const Problem p(c);
    const int64_t width = c.rows() * c.row_width();
    for (const Target& target : session.targets) {
      const auto run_with = [&](const Encoder& encoder, const Company& company) {
        Run run;
        run.first = company.first;
        run.count = company.count;
        run.threads = company.threads;
        return forward(encoder, p, run);
      };
      session.guard(target, p, [&](const Encoder& encoder, const std::string& what) {
        const std::vector<float> all = run_with(encoder, {0, target.slow() ? 3 : 9, 1});
        for (const Company& company : target.slow() ? few : many) {
          const auto begin = all.begin() + company.first * width;
          session.verdicts.same_bits(
              {begin, begin + company.count * width}, run_with(encoder, company),
              what + ": " + std::to_string(company.count) + " sequences on " +
                  std::to_string(company.threads) + " threads");
        }
      });
    }
  }
}

// Callers do not disturb each other: three at once on one encoder, each with threads of its own.
void concurrency(Session& session) {
  Case c = shared_cases()[1];
  c.batch = 3;
  const Problem p(c);
  session.each(p, [&](const Encoder& encoder, const std::string& what) {
    const std::vector<float> expected = forward(encoder, p);
    std::vector<std::vector<float>> results(3);
    std::vector<std::thread> callers;
    for (size_t i = 0; i < results.size(); ++i) {
      callers.emplace_back([&, i] {
        Run run;
        run.threads = static_cast<int>(i) + 1;
        for (int repeat = 0; repeat < 2; ++repeat) results[i] = forward(encoder, p, run);
      });
    }
    for (std::thread& caller : callers) caller.join();
    for (const std::vector<float>& y : results)
      session.verdicts.same_bits(expected, y, what + ": three callers");
  });
}

// ---- requests ----

// How the first layer of a request's candidates is computed.
enum class Path {
  kShared,    // with what is computed once a user
  kOrdinary,  // as a sequence of its own: the options share nothing
  kGuarded,   // the same, since the user's and the candidate's terms do not fit together
};

struct Request {
  Case c;
  Path path = Path::kShared;
};

std::vector<Request> requests() {
  Case c;
  c.batch = 4;
  c.length = 60;
  c.layers = 2;
  c.fusion = Fusion::kConcat;
  c.candidate_dim = 32;
  c.padding = Padding::kExclude;
  c.mask = Mask::kEmpty;
  c.latest_k = 10;
  c.pool = true;
  Case full = c;  // the full sequence of one layer: nothing above what is shared
  full.layers = 1;
  full.length = 33;
  full.mask = Mask::kLengths;
  full.padding = Padding::kCompute;
  full.layout = Layout::kGaps;
  full.bf16 = true;
  full.latest_k = -1;
  full.pool = false;
  full.seed = 1;
  Case odd = c;
  odd.d_model = 24;
  odd.nhead = 3;
  odd.dim_feedforward = 10;
  odd.candidate_dim = 5;
  odd.length = 37;
  odd.mask = Mask::kLeft;
  odd.layout = Layout::kTransposed;
  odd.padding = Padding::kZero;
  odd.latest_k = 3;
  odd.latest_last = true;
  odd.pool = false;
  odd.parameters = Parameters::kBare;
  odd.seed = 2;
  Case norm_first = c;
  norm_first.norm_first = true;
  norm_first.mask = Mask::kHoles;
  norm_first.seed = 3;
  Case append = c;
  append.fusion = Fusion::kAppend;
  append.mask = Mask::kPrefix;
  append.padding = Padding::kZero;
  append.seed = 4;
  Case sharp = c;  // user and candidate want different keys, each by more than a float can hold
  sharp.sharpen = 100;
  sharp.layers = 1;
  sharp.seed = 5;
  return {{c},
          {full},
          {odd},
          {norm_first, Path::kOrdinary},
          {append, Path::kOrdinary},
          {sharp, Path::kGuarded}};
}

// Values, accesses, poisoned padding, the path taken; and a candidate's bits depend neither on
// threads nor on company.
void request(Session& session) {
  for (const Request& r : requests()) {
    Problem users(r.c);
    // Users in no order, most candidates of user 2, so that it comes in several pieces; none of 3.
    std::vector<int64_t> index(40, 2);
    for (size_t n = 3; n < index.size(); n += 5) index[n] = static_cast<int64_t>(n / 5 % 2);
    for (const Target& target : session.targets) {
      const size_t count = target.slow() ? 7 : index.size();
      const std::vector<int64_t> mine(index.begin(), index.begin() + static_cast<ptrdiff_t>(count));
      const Problem repeated = Problem(users).repeated(mine);
      session.guard(target, repeated, [&](const Encoder& encoder, const std::string& what) {
        const std::vector<float> y = score_request(encoder, users, repeated, mine);
        const std::vector<float> alone = forward(encoder, repeated);
        if (r.path == Path::kShared) {
          session.verdicts.within_bound(y, Golden(repeated), what);
          session.verdicts.check(y != alone, what + ": nothing was shared");
        } else {
          session.verdicts.same_bits(y, alone, what + ": the ordinary path");
        }
        if (r.c.padding != Padding::kCompute) {
          Run poisoned;
          poisoned.poison = Poison::kNan;
          session.verdicts.same_bits(y, score_request(encoder, users, repeated, mine, poisoned),
                                     what + ": poisoned padding");
        }
        const int64_t width = r.c.rows() * r.c.row_width();
        for (int threads : {1, 2, 3, 5}) {
          Run run;
          run.threads = threads;
          run.first = threads;
          run.count = threads == 5 ? 1 : static_cast<int64_t>(count) - threads;
          const auto begin = y.begin() + run.first * width;
          session.verdicts.same_bits({begin, begin + run.count * width},
                                     score_request(encoder, users, repeated, mine, run),
                                     what + ": " + std::to_string(run.count) + " candidates on " +
                                         std::to_string(threads) + " threads");
        }
      });
    }
  }
}

// The workspace that a call leaves behind, full of NaN, is no input of the next.
void workspace(Session& session) {
  Case large;
  large.length = 101;
  large.dim_feedforward = 128;
  large.norm_first = true;
  Problem dirt(large);
  for (float& v : dirt.x) v = std::numeric_limits<float>::quiet_NaN();
  for (const Shape& shape : kShapes) {
    for (int64_t length : {1, 17, 40}) {
      Case small = large;
      small.d_model = shape.d_model;
      small.nhead = shape.nhead;
      small.dim_feedforward = shape.dim_feedforward;
      small.length = length;
      small.batch = 2;
      small.layers = 2;
      small.norm_first = shape.d_model % 3 != 0;
      small.mask = Mask::kHoles;
      small.padding = shape.nhead % 2 ? Padding::kCompute : Padding::kZero;
      small.seed = static_cast<uint64_t>(length);
      const Problem p(small);
      for (const Target& target : session.targets) {
        if (target.slow() && length != 17) continue;
        const std::unique_ptr<Encoder> dirty = target.encoder(dirt);
        session.guard(target, p, [&](const Encoder& encoder, const std::string& what) {
          std::vector<float> fresh;  // in a thread of its own, whose workspace is new
          std::thread([&] { fresh = forward(encoder, p); }).join();
          forward(*dirty, dirt);
          session.verdicts.same_bits(fresh, forward(encoder, p), what + ": used workspace");
        });
      }
    }
  }
}

// The same padding said in several ways gives the same bits.
void twins(Session& session) {
  for (int64_t length : {7, 33}) {
    Case c;
    c.length = length;
    c.batch = 4;
    c.layers = 2;
    c.mask = Mask::kLengths;
    c.padding = Padding::kCompute;
    const Problem lengths(c);
    Case prefix_case = c;
    prefix_case.mask = Mask::kPrefix;
    prefix_case.layout = Layout::kTransposed;
    const Problem prefix(prefix_case);
    session.each(lengths, [&](const Encoder& encoder, const std::string& what) {
      session.verdicts.check(prefix.valid == lengths.valid && prefix.x == lengths.x,
                             what + ": the twins differ");
      session.verdicts.same_bits(forward(encoder, lengths), forward(encoder, prefix),
                                 what + ": mask for lengths");
    });
  }
}

// The AMX machine code multiplies no more tiles than the shape needs, and leaves none configured.
void tiles(Session& session) {
#if defined(SEQKERNELS_AMX_TRAP)
  Case c;
  c.length = 100;
  c.layers = 2;
  const Problem p(c);
  // A layer and strip of 16 tokens: Q, K and V 18 row tiles of 3 along d_model; per head 7 x 2
  // along head_dim for the scores and 3 x 4 along the keys for the values; 6 x 3 for the
  // out-projection; 2 x 3 and 6 x 1 for the feed-forward part. 7 strips, 2 layers.
  constexpr long kNeeded = (18 * 3 + 2 * (7 * 2 + 3 * 4) + 6 * 3 + 2 * 3 + 6 * 1) * 7 * 2;
  for (const Target& target : session.targets) {
    if (!target.trapped) continue;
    session.guard(target, p, [&](const Encoder& encoder, const std::string& what) {
      amx_trap::state().counts = {};
      forward(encoder, p);
      const amx_trap::Counts counts = amx_trap::state().counts;
      session.verdicts.check(counts.dot > 0 && counts.dot <= kNeeded,
                             what + ": " + std::to_string(counts.dot) + " tile products for " +
                                 std::to_string(kNeeded));
      session.verdicts.check(counts.configure == counts.release && !amx_trap::state().configured,
                             what + ": tiles stay configured after a call");
    });
  }
#else
  (void)session;
#endif
}

// ---- numbers at the edge ----

constexpr double kInRange = 100;  // log2 of row sums that need no second pass

// Attention so sharp that sums leave the range of the first pass, above and below.
void softmax(Session& session) {
  for (int i = 0; i < 6; ++i) {
    Case c;
    c.sharpen = i % 3 == 0 ? 3.0f : 40.0f;
    c.length = i < 3 ? 100 : 17;
    c.layers = 1 + i % 2;
    c.mask = i % 2 ? Mask::kHoles : Mask::kNone;
    c.norm_first = i == 2;
    c.seed = static_cast<uint64_t>(i);
    const Problem p(c);
    const Golden golden(p);
    if (c.sharpen > 3) {
      session.verdicts.check(
          golden.sequences[0].lowest_sum < -kInRange || golden.sequences[0].highest_sum > kInRange,
          p.c.text() + ": no row needs the second pass");
    }
    session.each(p, [&](const Encoder& encoder, const std::string& what) {
      session.verdicts.within_bound(forward(encoder, p), golden, what);
    });
  }

  for (const Target& target : session.targets) {
    check_one_sided(session.verdicts, Case(), target.name + ": one-sided: ", [&](const Problem& p) {
      return forward(*target.encoder(p), p);
    });
  }

  // Padded tokens that are computed are queries and no keys. Beside valid ones in a strip, they
  // need the second pass or not: the bits of the valid rows are the same.
  for (int64_t length : {13, 30}) {
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
    const Golden calm_golden(calm), wild_golden(wild);
    const Golden::Sequence &few = calm_golden.sequences[0], &many = wild_golden.sequences[0];
    session.verdicts.check(few.lowest_sum > -kInRange && few.highest_sum < kInRange &&
                               (many.lowest_sum < -kInRange || many.highest_sum > kInRange),
                           c.text() + ": not a mix of rows in range and out of it");
    session.each(calm, [&](const Encoder& encoder, const std::string& what) {
      const std::vector<float> y = forward(encoder, wild);
      session.verdicts.within_bound(y, wild_golden, what);
      session.verdicts.same_bits(valid_rows(calm, forward(encoder, calm)), valid_rows(wild, y),
                                 what + ": neighbours in the second pass");
    });
  }
}

// Large, tiny and constant activations.
void magnitudes(Session& session) {
  const float denormal = 1e-41f;
  for (float scale : {1e4f, 1e-4f, denormal, 0.0f}) {
    for (bool norm_first : {false, true}) {
      for (bool bf16 : {false, true}) {
        Case c;
        c.length = 33;
        c.layers = 2;
        c.norm_first = norm_first;
        c.bf16 = bf16;
        c.mask = Mask::kPrefix;
        c.batch = 3;  // the last of them whole
        // W_q and W_k follow 1e4 only: of 1 / 1e-41 they would be infinite.
        c.scale = scale == 1e4f ? scale : 1.0f;
        Problem p(c);
        if (scale != c.scale) {
          for (float& v : p.x) v = bf16 ? rounded_to_bf16(v * scale) : v * scale;
        }
        const Golden golden(p);
        session.each(p, [&](const Encoder& encoder, const std::string& what) {
          session.verdicts.within_bound(forward(encoder, p), golden,
                                        what + " x scaled by " + std::to_string(scale));
        });
      }
    }
  }
}

// ---- errors ----

void expect_error(Session& session, const std::string& what, const std::string& argument,
                  const std::function<void()>& body) {
  std::string message = "nothing was thrown";
  try {
    body();
  } catch (const std::invalid_argument& error) {
    if (std::string(error.what()).find(argument) != std::string::npos)
      message.clear();
    else
      message = "the message does not name '" + argument + "': " + error.what();
  } catch (const std::exception& error) {
    message = std::string("not std::invalid_argument: ") + error.what();
  }
  session.verdicts.check(message.empty(), what + ": " + message);
}

void errors(Session& session) {
  Case c;
  c.length = 5;
  const Problem p(c);
  const std::string isa = session.targets.front().trapped ? "portable" : session.targets[0].name;

  const auto bad_model = [&](const char* argument,
                             const std::function<void(EncoderShape&, EncoderParameters&)>& spoil) {
    EncoderShape shape = p.shape();
    EncoderParameters parameters = p.parameters();
    spoil(shape, parameters);
    expect_error(session, std::string("errors: model with bad ") + argument, argument,
                 [&] { Encoder(isa, shape, parameters); });
  };
  bad_model("nhead", [](EncoderShape& s, auto&) { s.nhead = 5; });
  bad_model("nhead", [](EncoderShape& s, auto&) { s.nhead = 0; });
  bad_model("nhead", [](EncoderShape& s, auto&) { s.nhead = -2; });
  bad_model("d_model", [](EncoderShape& s, auto&) { s.d_model = 0; });
  bad_model("dim_feedforward", [](EncoderShape& s, auto&) { s.dim_feedforward = 0; });
  bad_model("layers", [](EncoderShape& s, EncoderParameters& w) {
    s.num_layers = 0;
    w.layers.clear();
  });
  using Layer = EncoderLayerParameters;
  for (const float* Layer::* weight : {&Layer::in_proj_weight, &Layer::out_proj_weight,
                                       &Layer::linear1_weight, &Layer::linear2_weight}) {
    bad_model("layers",
              [&](EncoderShape&, EncoderParameters& w) { w.layers[0].*weight = nullptr; });
  }
  expect_error(session, "errors: unknown instruction set", "isa",
               [&] { Encoder("sse9", p.shape(), p.parameters()); });
  expect_error(session, "errors: reasons of an unknown instruction set", "isa",
               [] { isa_unsupported_reasons("sse9"); });
  for (const std::string& name : isa_names()) {
    if (isa_unsupported_reasons(name).empty()) continue;
    expect_error(session, "errors: instruction set that cannot run here", "'" + name + "'",
                 [&] { Encoder(name, p.shape(), p.parameters()); });
  }

  const auto bad_call = [&](const char* argument, const std::function<void(EncoderCall&)>& spoil) {
    for (const Target& target : session.targets) {
      const std::unique_ptr<Encoder> encoder = target.encoder(p);
      PreparedCall made = prepare(p);
      spoil(made.call);
      const std::string what = target.name + ": errors: call with bad " + argument;
      expect_error(session, what, argument, [&] { encoder->forward(made.call); });
      const Block untouched(made.out.bytes(), kCanary);
      session.verdicts.check(std::memcmp(untouched.data(), made.out.data(), made.out.bytes()) == 0,
                             what + ": work was done before the check");
    }
  };
  const std::vector<int64_t> negative = {-1}, long_one = {6};
  const std::vector<uint8_t> mask(5);
  const std::vector<float> candidate(97);
  bad_call("x:", [](EncoderCall& call) { call.batch = 0; });
  bad_call("x:", [](EncoderCall& call) { call.batch = -1; });
  bad_call("x:", [](EncoderCall& call) { call.length = 0; });
  bad_call("x:", [](EncoderCall& call) { call.length = -1; });
  bad_call("x:", [](EncoderCall& call) { call.length = int64_t{1} << 30; });
  bad_call("lengths:", [&](EncoderCall& call) { call.lengths = negative.data(); });
  bad_call("lengths:", [&](EncoderCall& call) { call.lengths = long_one.data(); });
  bad_call("key_padding_mask", [&](EncoderCall& call) {
    call.lengths = long_one.data();
    call.mask = mask.data();
  });
  bad_call("candidate:", [&](EncoderCall& call) { call.candidate = candidate.data(); });
  bad_call("candidate:", [](EncoderCall& call) { call.fusion = Fusion::kConcat; });
  bad_call("candidate:", [](EncoderCall& call) { call.fusion = Fusion::kAppend; });
  for (int64_t width : {-1, 97}) {
    bad_call("candidate:", [&](EncoderCall& call) {
      call.fusion = Fusion::kConcat;
      call.candidate = candidate.data();
      call.candidate_dim = width;
    });
  }
}

// ---- the bound itself ----

// Plausible mistakes lie outside the bound.
void defects(Session& session) {
  const std::map<Defect, const char*> planted = {{Defect::kScale, "1/sqrt(64) for head_dim 48"},
                                                 {Defect::kPaddedKey, "one padded key attended to"},
                                                 {Defect::kSwappedHeads, "heads swapped"},
                                                 {Defect::kNormDivisor, "128 for 96 in the norm"}};
  for (int64_t length : {17, 100}) {
    Case c;
    c.length = length;
    c.layers = 2;
    c.mask = Mask::kLeft;
    c.seed = static_cast<uint64_t>(length);
    const Problem p(c);
    const Golden golden(p);
    for (const auto& [defect, name] : planted) {
      Exact exact;
      const Matrix y = Reference<Exact>(p, exact, defect).sequence(0);
      const Ratios ratios = error_ratios(y.data(), golden.sequences[0]);
      session.verdicts.check(!ratios.within_bound(),
                             std::string("defects: the bound does not notice ") + name + ", L = " +
                                 std::to_string(length) + ": rms " + std::to_string(ratios.rms));
    }
  }
}

const std::vector<std::pair<std::string, void (*)(Session&)>> kGroups = {
    {"grid", grid},       {"company", company},     {"concurrency", concurrency},
    {"request", request}, {"workspace", workspace}, {"twins", twins},
    {"tiles", tiles},     {"softmax", softmax},     {"magnitudes", magnitudes},
    {"errors", errors},   {"defects", defects},
};

// ---- plants ----

// Deliberate mistakes of a caller, one access each. The first three must stop the program with
// AddressSanitizer's report, `misaligned` with UndefinedBehaviorSanitizer's, `race` with
// ThreadSanitizer's; `value` must be found by the bound, `stride` by the guard bands.
int plant(const std::string& name, const Target& target) {
  Case c;
  c.length = 17;
  c.bf16 = true;
  c.mask = name == "misaligned" ? Mask::kLengths : Mask::kNone;
  c.layout = name == "stride" ? Layout::kGaps : Layout::kTight;
  Problem p(c);
  Session session;
  if (name == "overread" || name == "overwrite") {  // one event more than was allocated
    const std::unique_ptr<Encoder> encoder = target.encoder(p);
    Case longer = c;
    ++longer.length;
    PreparedCall made = prepare(p), roomy = prepare(Problem(longer));
    if (name == "overread") {
      roomy.call.x = made.call.x;
      roomy.call.stride_b = made.call.stride_b;
    } else {
      roomy.call.out = made.call.out;
      roomy.call.out_stride_b = made.call.out_stride_b;
    }
    encoder->forward(roomy.call);
  } else if (name == "weights") {  // a matrix with a column less than it claims
    p.layers[0].linear2.resize(p.layers[0].linear2.size() - 1);
    p.layers[0].linear2.shrink_to_fit();
    target.encoder(p);
  } else if (name == "misaligned") {
    PreparedCall made = prepare(p);
    std::vector<unsigned char> bytes(sizeof(int64_t) + 1);
    made.call.lengths = reinterpret_cast<const int64_t*>(bytes.data() + 1);
    target.encoder(p)->forward(made.call);
  } else if (name == "race") {  // two callers share an output
    const std::unique_ptr<Encoder> encoder = target.encoder(p);
    const PreparedCall made = prepare(p);
    std::thread other([&] { encoder->forward(made.call); });
    encoder->forward(made.call);
    other.join();
  } else if (name == "stride") {
    PreparedCall made = prepare(p);
    --made.call.out_stride_l;  // rows reach into the gap before them
    target.encoder(p)->forward(made.call);
    try {
      made.output();
    } catch (const std::exception& error) {
      session.verdicts.fail(error.what());
    }
  } else if (name == "value") {
    const Golden golden(p);
    for (float& w : p.layers[0].norm2) w *= 1.05f;
    session.verdicts.within_bound(forward(*target.encoder(p), p), golden, target.name);
  } else {
    std::fprintf(stderr, "no plant '%s'\n", name.c_str());
    return 2;
  }
  if (session.verdicts.failures() == 0) std::printf("the plant was not noticed\n");
  return session.verdicts.failures() ? 1 : 0;
}

int run(int argc, char** argv) {
  std::string isa, only, planted;
  bool list = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto option = [&](const char* name, std::string& value) {
      const std::string prefix = std::string("--") + name + "=";
      if (argument.rfind(prefix, 0) != 0) return false;
      value = argument.substr(prefix.size());
      return true;
    };
    if (argument == "--list") {
      list = true;
    } else if (!option("isa", isa) && !option("only", only) && !option("plant", planted)) {
      std::fprintf(stderr, "unknown argument '%s'\n", argv[i]);
      return 2;
    }
  }

  Session session;
  for (const Target& target : all_targets()) {
    if (isa.empty() || target.name == isa) session.targets.push_back(target);
  }
  if (session.targets.empty()) {
    std::fprintf(stderr, "no instruction set '%s' runs here\n", isa.c_str());
    return 2;
  }
  if (list) {
    for (const Target& target : session.targets) std::printf("%s\n", target.name.c_str());
    return 0;
  }
  if (!planted.empty()) return plant(planted, session.targets.front());

  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  const Clock::time_point start = Clock::now();
  bool found = false;
  for (const auto& [name, body] : kGroups) {
    if (!only.empty() && ("," + only + ",").find("," + name + ",") == only.npos) continue;
    found = true;
    const Clock::time_point group_start = Clock::now();
    const int checks = session.verdicts.checks(), failures = session.verdicts.failures();
    body(session);
    std::printf("%-12s %5d checks %3d failures %6.1f s\n", name.c_str(),
                session.verdicts.checks() - checks, session.verdicts.failures() - failures,
                seconds_since(group_start));
    std::fflush(stdout);
  }
  if (!found) {
    std::fprintf(stderr, "no group '%s'\n", only.c_str());
    return 2;
  }
  std::string names;
  for (const Target& target : session.targets) names += " " + target.name;
  std::printf("instruction sets:%s\n", names.c_str());
  if (!session.verdicts.worst_what().empty()) {
    std::printf("error over that of bf16: rms %.2f (bound %.1f), largest %.2f (bound %.1f)\n",
                session.verdicts.worst().rms, kRmsBound, session.verdicts.worst().largest,
                kLargestBound);
    std::printf("  rms of %s\n", session.verdicts.worst_what().c_str());
  }
  std::printf("%d checks, %d failures, %.1f s\n", session.verdicts.checks(),
              session.verdicts.failures(), seconds_since(start));
  return session.verdicts.failures() ? 1 : 0;
}

}  // namespace
}  // namespace seqkernels::test

int main(int argc, char** argv) {
  return seqkernels::test::run(argc, argv);
}
