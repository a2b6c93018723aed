// What the tests of the CUDA encoder share: a launch on the emulation, options in pairs, the
// program.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/encoder_pack.h"
#include "cuda/kernel_tables.h"
#include "encoder_problem.h"
#include "encoder_reference.h"
#include "encoder_verdicts.h"
#include "host_emulation/launch.h"

namespace seqkernels::test {

using cuda::EncoderDevice;
using cuda::EncoderInstance;
using cuda::EncoderParams;
using cuda::EncoderPlan;
using cuda::SplitLaunch;
using cuda::SplitParams;
using host_emulation::Counters;
using host_emulation::Schedule;

constexpr EncoderDevice kH100{227 * 1024, 132};
constexpr EncoderDevice kL4{99 * 1024, 58};

// ---- a call ----

struct Setting {
  Run run;
  Schedule schedule;
  EncoderDevice device = kH100;
  // A mistake, planted.
  std::function<void(EncoderParams&)> spoil = [](EncoderParams&) {};
  std::function<void(SplitLaunch&)> spoil_split = [](SplitLaunch&) {};
};

struct Result {
  std::vector<float> y;
  EncoderPlan plan;
  std::vector<Counters> launches;

  int64_t total(int64_t Counters::* counter) const {
    int64_t sum = 0;
    for (const Counters& c : launches) sum += c.*counter;
    return sum;
  }
  int64_t conflicts() const {
    return total(&Counters::shared_wavefronts) - total(&Counters::shared_wavefronts_ideal);
  }
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

inline Result launch(const Problem& p, const PreparedCall& made, const EncoderCall& call,
                     const Setting& setting) {
  const EncoderShape shape = p.shape();
  Result r;
  r.plan = cuda::plan_encoder(shape, call, setting.device);
  if (!r.plan.reasons.empty()) throw std::runtime_error("refused: " + r.plan.reasons[0]);
  Device packed(cuda::encoder_packed_bytes(shape));
  cuda::pack_encoder(shape, p.parameters(), packed.data.get());
  Device workspace(static_cast<size_t>(r.plan.workspace_bytes));
  const auto run = [&](auto kernel, int grid, int threads, int64_t shared_bytes, auto params) {
    if (shared_bytes > setting.device.shared_bytes)
      throw std::runtime_error("the plan takes more shared memory than the device has");
    r.launches.push_back(host_emulation::launch(
        kernel, grid, threads, static_cast<size_t>(shared_bytes), setting.schedule, params));
  };
  if (r.plan.instance >= 0) {
    EncoderParams params =
        cuda::encoder_params(shape, r.plan, call, packed.data.get(), workspace.data.get());
    setting.spoil(params);
    run(cuda::encoder_kernel_of(r.plan.instance), r.plan.grid, r.plan.threads, r.plan.shared_bytes,
        params);
  } else {
    for (SplitLaunch& l :
         cuda::split_launches(shape, r.plan, call, packed.data.get(), workspace.data.get())) {
      setting.spoil_split(l);
      run(cuda::split_kernel_of(r.plan.split, l.step), l.grid, l.threads, l.shared_bytes, l.params);
    }
  }
  r.y = made.output();
  return r;
}

inline Result forward(const Problem& p, const Setting& setting = {}) {
  const PreparedCall made = prepare(p, setting.run);
  return launch(p, made, made.call, setting);
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
// The levels of shape and length, and the number of values of x that a case may have beyond one
// sequence.
struct Grid {
  std::vector<Shape> shapes;
  std::vector<int64_t> lengths;
  bool norm_first = true;  // among the levels
  int64_t most_values = 20000;
};

// Levels of all options, drawn.
inline Case draw(std::mt19937_64& random, const Grid& grid) {
  const auto level = [&](size_t n) { return static_cast<int>(random() % n); };
  Case c;
  const auto among = [&](const auto& levels) {
    return levels[static_cast<size_t>(level(levels.size()))];
  };
  c.length = among(grid.lengths);
  const Shape shape = among(grid.shapes);
  c.d_model = shape.d_model;
  c.nhead = shape.nhead;
  c.dim_feedforward = shape.dim_feedforward;
  c.layers = 1 + level(2);
  c.batch = 1 + 2 * level(2);
  if (c.length * c.d_model * c.batch > grid.most_values) c.batch = 1;
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
  c.norm_first = grid.norm_first && level(2) != 0;
  c.activation = static_cast<Activation>(1 + level(4));
  c.final_norm = level(2) != 0;
  c.parameters = static_cast<Parameters>(level(3));
  return c;
}

// Every pair of two options' levels that options do not exclude: all of them turn up among so many
// draws. Each case is the one of many draws with the most pairs not seen yet.
inline std::vector<Case> cover_pairs(const Grid& grid) {
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
  for (int i = 0; i < 20000; ++i) collect(draw(random, grid), possible);
  std::vector<Case> cases;
  while (seen.size() < possible.size()) {
    Case best;
    size_t most = 0;
    for (int i = 0; i < 40; ++i) {
      const Case c = draw(random, grid);
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

// Values, and what padded slots hold: NaN or infinity there changes no bit elsewhere, nor does it
// where padding is said by a byte.
inline void check_problem(Session& session, const Case& c, const Setting& setting = {}) {
  const Problem p(c);
  session.guard(c, [&](const std::string& what) {
    const std::vector<float> y = forward(p, setting).y;
    session.verdicts.within_bound(y, Golden(p), what);
    if (std::count(p.valid.begin(), p.valid.end(), uint8_t{0}) == 0) return;
    Setting poisoned = setting;
    poisoned.run.poison = c.seed % 2 ? Poison::kNan : Poison::kInf;
    poisoned.run.flagged = c.padding != Padding::kExclude;
    poisoned.schedule = {Schedule::Order::kReverse};
    const std::vector<float> z = forward(p, poisoned).y;
    if (c.padding != Padding::kCompute) {
      session.verdicts.same_bits(y, z, what + ": poisoned padding");
    } else if (c.latest_k < 0) {
      session.verdicts.same_bits(valid_rows(p, y), valid_rows(p, z), what + ": poisoned padding");
    }
  });
}

// ---- the program ----

using TestGroup = std::pair<std::string, void (*)(Session&)>;

// NAME [--only=GROUP,...] [--list]
inline int run_groups(int argc, char** argv, const std::vector<TestGroup>& groups) {
  std::string only;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list") {
      for (const auto& group : groups) std::printf("%s\n", group.first.c_str());
      return 0;
    }
    if (argument.rfind("--only=", 0) != 0) {
      std::fprintf(stderr, "%s [--only=GROUP,...] [--list]\n", argv[0]);
      return 2;
    }
    only = argument.substr(6) + ",";
    only[0] = ',';  // the '='
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

}  // namespace seqkernels::test
