// The CUDA batch norm, run on the host, beside a computation in fp64.
//
//   cuda_resilient_batch_norm_test [--plant=DEFECT] [--list]
//
// The rule: in fp32 each step of the formula may round, so y is within a few ulp of what the last
// product and sum consist of; a bf16 result is that, rounded once more. Every array lies in heap
// memory of exactly its size, rows have gaps that must stay as they are, and every problem gives
// the same bits in every order and on devices of every size. A plant is a deliberate mistake, which
// must make the program fail.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernel_tables.h"
#include "host_emulation/launch.h"

namespace seqkernels::test {
namespace {

using host_emulation::Counters;
using host_emulation::Schedule;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Verdicts {
  int checks = 0, failures = 0;
  void check(bool holds, const std::string& what) {
    ++checks;
    if (holds) return;
    ++failures;
    if (failures <= 20) std::fprintf(stderr, "FAIL %s\n", what.c_str());
  }
};

const std::pair<const char*, Schedule> kSchedules[] = {
    {"forward", {Schedule::Order::kForward}},
    {"reverse", {Schedule::Order::kReverse}},
    {"seed 1", {Schedule::Order::kRandom, 1}},
    {"seed 2", {Schedule::Order::kRandom, 2}},
};

// ---- values ----

double round_to_bf16(double x) {
  if (!std::isfinite(x) || x == 0) return x;
  const double step = std::ldexp(1.0, std::max(std::ilogb(x), -126) - 7);
  const double rounded = std::nearbyint(x / step) * step;
  return std::fabs(rounded) > 0x1.fep127 ? std::copysign(HUGE_VAL, x) : rounded;
}

struct Shape {
  bool channels_last;
  int64_t outer, inner, channels;  // as in ResilientBatchNormCall
  int64_t gap;                     // between rows
  int64_t outer_gap;               // between blocks of rows

  int64_t rows() const { return channels_last ? inner : channels; }  // of a block
  int64_t width() const { return channels_last ? channels : inner; }
  int64_t row_stride() const { return width() + gap; }
  int64_t outer_stride() const { return rows() * row_stride() + outer_gap; }
  int64_t size() const {  // the last row has no gap behind it
    if (outer == 0 || inner == 0) return 0;
    return (outer - 1) * outer_stride() + (rows() - 1) * row_stride() + width();
  }
  std::string text() const {
    return std::string(channels_last ? "[outer, inner, C] " : "[outer, C, inner] ") +
           std::to_string(outer) + " " + std::to_string(inner) + " " + std::to_string(channels) +
           " gaps " + std::to_string(gap) + " " + std::to_string(outer_gap);
  }
};

// As a device allocates.
template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{256};
  Aligned() = default;
  template <class U>
  explicit Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlignment)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kAlignment); }
  bool operator==(const Aligned&) const = default;
};

// Values in heap memory that ends where they do, and begins `shift` values before them.
struct Array {
  bool bf16;
  size_t shift;
  std::vector<uint16_t, Aligned<uint16_t>> narrow;
  std::vector<float, Aligned<float>> wide;

  Array(bool bf16_, int64_t size, size_t shift_) : bf16(bf16_), shift(shift_) {
    const size_t n = static_cast<size_t>(size) + shift;
    if (bf16) {
      narrow.assign(n, 0x7fc1);
    } else {
      wide.assign(n, kNaN);
    }
  }
  void* data() { return bf16 ? static_cast<void*>(narrow.data() + shift) : wide.data() + shift; }
  float at(int64_t i) const {
    const size_t at = static_cast<size_t>(i) + shift;
    return bf16 ? std::bit_cast<float>(static_cast<uint32_t>(narrow[at]) << 16) : wide[at];
  }
  void set(int64_t i, float x) {
    const size_t at = static_cast<size_t>(i) + shift;
    if (bf16) {
      narrow[at] = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16);
    } else {
      wide[at] = x;
    }
  }
  bool untouched(int64_t i) const {
    const size_t at = static_cast<size_t>(i) + shift;
    return bf16 ? narrow[at] == 0x7fc1 : std::isnan(wide[at]);
  }
  bool operator==(const Array& other) const {
    return narrow == other.narrow &&
           std::equal(wide.begin(), wide.end(), other.wide.begin(), other.wide.end(),
                      [](float a, float b) {
                        return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
                      });
  }
};

struct Problem {
  Shape shape;
  bool bf16;
  Array x;
  std::vector<float> mean, var, weight, bias;
  float eps = 1e-5f, min_var = 0, max_abs = kInfinity;
  Activation activation = Activation::kNone;
  float slope = 0.1f;

  Problem(const Shape& s, bool bf16_, uint32_t seed, size_t shift = 0)
      : shape(s), bf16(bf16_), x(bf16_, s.size(), shift) {
    std::mt19937 g(seed);
    std::normal_distribution<float> normal;
    const size_t channels = static_cast<size_t>(s.channels);
    for (size_t c = 0; c < channels; ++c) {
      mean.push_back(2 * normal(g));
      var.push_back(std::exp(normal(g)));
      weight.push_back(normal(g));
      bias.push_back(normal(g));
    }
    each([&](int64_t i, int64_t c) {
      const size_t channel = static_cast<size_t>(c);
      set(i, mean[channel] + 2 * std::sqrt(var[channel]) * normal(g));
    });
  }
  void bound() {
    min_var = 0.01f;
    max_abs = 2.5f;
  }

  void set(int64_t i, float value) {
    x.set(i, bf16 ? static_cast<float>(round_to_bf16(value)) : value);
  }

  // visit(place, channel)
  template <class Visit>
  void each(Visit&& visit) const {
    for (int64_t o = 0; o < shape.outer; ++o) {
      for (int64_t r = 0; r < shape.rows(); ++r) {
        for (int64_t i = 0; i < shape.width(); ++i) {
          visit(o * shape.outer_stride() + r * shape.row_stride() + i, shape.channels_last ? i : r);
        }
      }
    }
  }

  ResilientBatchNormCall call(Array& out) {
    ResilientBatchNormCall c;
    c.x = x.data();
    c.is_bf16 = bf16;
    c.channels_last = shape.channels_last;
    c.outer = shape.outer;
    c.inner = shape.inner;
    c.channels = shape.channels;
    c.x_stride_outer = c.out_stride_outer = shape.outer_stride();
    c.x_stride_row = c.out_stride_row = shape.row_stride();
    c.norm = {{true, eps, min_var, max_abs},
              {mean.data(), var.data(), weight.empty() ? nullptr : weight.data(),
               bias.empty() ? nullptr : bias.data()}};
    c.activation = activation;
    c.negative_slope = slope;
    c.out = out.data();
    return c;
  }
};

Counters run(const ResilientBatchNormCall& call, int multiprocessors, const Schedule& schedule) {
  const cuda::ResilientBatchNormPlan plan = cuda::plan_resilient_batch_norm(call, multiprocessors);
  return host_emulation::launch(cuda::resilient_batch_norm_kernel_of(plan), plan.grid,
                                cuda::ResilientBatchNormPlan::kThreads, 0, schedule, plan.params);
}

// ---- the formula in fp64 ----

struct Expected {
  double y;
  double error;  // of fp32
};

double activated(double y, Activation kind, double slope) {
  switch (kind) {
    case Activation::kNone:
      return y;
    case Activation::kRelu:
      return y < 0 ? 0.0 : y;
    case Activation::kGelu:
      return 0.5 * y * std::erfc(-y * std::sqrt(0.5));
    case Activation::kGeluTanh:
      return 0.5 * y * (1 + std::tanh(std::sqrt(2 / M_PI) * (y + 0.044715 * y * y * y)));
    case Activation::kLeakyRelu:
      return y < 0 ? slope * y : y;
  }
  return kNaN;
}

Expected expected(const Problem& p, float x, size_t channel) {
  constexpr double kUlp = 0x1p-24;
  const double mean = p.mean[channel], var = p.var[channel];
  const double weight = p.weight.empty() ? 1 : p.weight[channel];
  const double bias = p.bias.empty() ? 0 : p.bias[channel];
  const bool bounded = p.min_var > 0 || p.max_abs < kInfinity;
  double z = (x - mean) / std::sqrt((bounded ? std::max<double>(var, p.min_var) : var) + p.eps);
  if (bounded) {
    if (!std::isfinite(mean) || !std::isfinite(var) || var < 0 || std::isnan(z)) z = 0;
    z = std::clamp<double>(z, -p.max_abs, p.max_abs);
  }
  const double before = weight * z + bias;
  const double y = activated(before, p.activation, p.slope);
  double error = kUlp * (8 * std::fabs(weight * z) + std::fabs(before));
  if (p.activation == Activation::kGelu || p.activation == Activation::kGeluTanh) {
    error = 1.2 * error + 8 * kUlp * std::fabs(before);
  }
  return {y, error + 0x1p-148};
}

// Beyond fp32, and beyond bf16, is infinite.
double overflowed(double y) {
  return std::fabs(y) > std::numeric_limits<float>::max() ? std::copysign(HUGE_VAL, y) : y;
}

bool within(const Expected& e, float y, bool bf16) {
  if (std::isnan(e.y)) return std::isnan(y);
  if (std::isnan(y)) return false;
  if (std::isinf(e.y)) return y == e.y;
  double low = overflowed(e.y - e.error), high = overflowed(e.y + e.error);
  if (bf16) {
    low = round_to_bf16(low);
    high = round_to_bf16(high);
  }
  return low <= y && y <= high;
}

// ---- checks ----

struct Devices {
  std::vector<int> multiprocessors = {1, 3};
};

// One problem in every order and on each device; `note` names it.
void check_problem(Verdicts& verdicts, Problem& p, const std::string& note, size_t out_shift = 0) {
  const std::string what = note + ", " + p.shape.text() + (p.bf16 ? " bf16" : " fp32");
  Array first(p.bf16, p.shape.size(), out_shift);
  bool is_first = true;
  for (const int multiprocessors : Devices().multiprocessors) {
    for (const auto& [name, schedule] : kSchedules) {
      Array out(p.bf16, p.shape.size(), out_shift);
      const ResilientBatchNormCall call = p.call(out);
      const std::string wrong = cuda::check_resilient_batch_norm(call);
      if (!wrong.empty()) {
        verdicts.check(false, what + ": " + wrong);
        return;
      }
      try {
        const Counters counters = run(call, multiprocessors, schedule);
        verdicts.check(counters.global_restored_bytes == 0, what + ": stored twice");
      } catch (const host_emulation::EmulationError& e) {
        verdicts.check(false, what + ", " + name + ": " + e.what());
        return;
      }
      if (is_first) {
        first = out;
        is_first = false;
      }
      verdicts.check(out == first, what + ", " + name + ": other bits");
    }
  }
  std::vector<bool> written(static_cast<size_t>(p.shape.size()));
  std::string worst;
  p.each([&](int64_t i, int64_t channel) {
    written[static_cast<size_t>(i)] = true;
    const Expected e = expected(p, p.x.at(i), static_cast<size_t>(channel));
    if (worst.empty() && !within(e, first.at(i), p.bf16)) {
      worst = "value " + std::to_string(i) + " of channel " + std::to_string(channel) + ", x " +
              std::to_string(p.x.at(i)) + ": expected " + std::to_string(e.y) + " within " +
              std::to_string(e.error) + ", got " + std::to_string(first.at(i));
    }
  });
  verdicts.check(worst.empty(), what + ": " + worst);
  bool kept = true;
  for (size_t i = 0; i < written.size(); ++i) {
    kept &= written[i] || first.untouched(static_cast<int64_t>(i));
  }
  verdicts.check(kept, what + ": wrote outside the rows");
}

void check_shapes(Verdicts& verdicts) {
  const std::vector<Shape> shapes = {
      {true, 1, 1, 1, 0, 0},    {true, 1, 5, 3, 0, 0},     {true, 1, 7, 8, 0, 0},
      {true, 1, 33, 97, 0, 0},  {true, 1, 19, 100, 0, 0},  {true, 1, 50, 128, 0, 0},
      {true, 1, 9, 20, 4, 0},   {true, 1, 9, 21, 3, 0},    {true, 1, 9, 13, 1, 0},
      {true, 1, 3, 2600, 0, 0}, {true, 3, 5, 24, 0, 0},    {true, 3, 5, 24, 8, 40},
      {true, 2, 3, 7, 0, 0},    {true, 2, 3, 7, 1, 5},     {false, 4, 1, 3, 0, 0},
      {false, 3, 7, 5, 0, 0},   {false, 3, 8, 6, 0, 0},    {false, 2, 100, 9, 0, 0},
      {false, 2, 100, 9, 4, 8}, {false, 2, 64, 5, 8, 0},   {false, 3, 11, 4, 2, 1},
      {false, 2, 5, 3, 0, 7},   {false, 1, 1300, 2, 4, 0}, {true, 3, 150, 24, 8, 40},
      {false, 4, 52, 90, 4, 8}};
  uint32_t seed = 0;
  for (const Shape& shape : shapes) {
    for (const bool bf16 : {false, true}) {
      for (const bool bounded : {false, true}) {
        Problem p(shape, bf16, ++seed);
        if (bounded) p.bound();
        p.activation = static_cast<Activation>(seed % 5);
        if (seed % 7 == 3) p.weight.clear();
        if (seed % 7 == 5) p.bias.clear();
        check_problem(verdicts, p, bounded ? "bounded" : "exact");
      }
    }
  }
}

void check_alignment(Verdicts& verdicts) {
  for (const bool bf16 : {false, true}) {
    for (const size_t x_shift : {0, 1, 2}) {
      for (const size_t out_shift : {0, 1, 4}) {
        Problem p({true, 1, 11, 48, 0, 0}, bf16, 7, x_shift);
        check_problem(verdicts, p, "shifted", out_shift);
      }
    }
    // Constants beside each other, but not at 16 bytes.
    Problem p({true, 1, 11, 16, 0, 0}, bf16, 9);
    for (std::vector<float>* v : {&p.mean, &p.var, &p.weight, &p.bias}) v->insert(v->begin(), kNaN);
    Array out(bf16, p.shape.size(), 0), plain(bf16, p.shape.size(), 0);
    ResilientBatchNormCall call = p.call(out);
    for (const float** q : {&call.norm.mean, &call.norm.var, &call.norm.weight, &call.norm.bias}) {
      ++*q;
    }
    run(call, 1, Schedule{});
    for (std::vector<float>* v : {&p.mean, &p.var, &p.weight, &p.bias}) v->erase(v->begin());
    run(p.call(plain), 1, Schedule{});
    verdicts.check(out == plain, "shifted constants");
  }
}

void check_activations(Verdicts& verdicts) {
  for (const bool bf16 : {false, true}) {
    for (int kind = 0; kind < 5; ++kind) {
      Problem p({true, 1, 40, 16, 0, 0}, bf16, 11);
      p.activation = static_cast<Activation>(kind);
      std::fill(p.bias.begin(), p.bias.end(), 0.0f);
      for (size_t c = 0; c < 16; ++c) {  // from the origin to far tails
        p.mean[c] = 0;
        p.var[c] = 1;
        p.weight[c] = std::ldexp(1.0f, static_cast<int>(c) - 10);
      }
      check_problem(verdicts, p, "activation " + std::to_string(kind));
    }
  }
}

// Channels of hard statistics, each with rows of hard values.
void check_hard_values(Verdicts& verdicts) {
  const float variances[] = {0, 1e-12f, 1e-40f, 1e30f, kInfinity, kNaN, -1, -0.0f, 3e38f, 1, 4};
  const float means[] = {0, 1e6f, -1e30f, kInfinity, kNaN, 1e-40f};
  const float values[] = {0, -0.0f, kNaN, kInfinity, -kInfinity, 1e30f, -1e30f, 1e6f, 1e-40f, 1};
  const int64_t channels = std::size(variances) * std::size(means);
  const int64_t rows = std::size(values) + 1;
  for (const bool bf16 : {false, true}) {
    for (const bool channels_last : {false, true}) {
      for (int setting = 0; setting < 5; ++setting) {
        const Shape shape = channels_last ? Shape{true, 1, rows, channels, 0, 0}
                                          : Shape{false, 1, rows, channels, setting, 0};
        Problem p(shape, bf16, 13);
        for (size_t c = 0; c < static_cast<size_t>(channels); ++c) {
          p.var[c] = variances[c % std::size(variances)];
          p.mean[c] = means[c / std::size(variances)];
          p.weight[c] = c % 3 == 0 ? 1.0f : -0.5f;
        }
        std::vector<int64_t> seen(static_cast<size_t>(channels));
        p.each([&](int64_t i, int64_t c) {
          const size_t nth = static_cast<size_t>(seen[static_cast<size_t>(c)]++);
          // The last row is the mean itself.
          p.set(i, nth < std::size(values) ? values[nth] : p.mean[static_cast<size_t>(c)]);
        });
        if (setting == 1) p.bound();
        if (setting == 2) p.max_abs = 3;
        if (setting == 3) p.min_var = 1e-6f;
        if (setting == 4) {
          p.bound();
          p.min_var = p.eps = 0;
        }
        for (int kind = 0; kind < 5; ++kind) {
          p.activation = static_cast<Activation>(kind);
          check_problem(
              verdicts, p,
              "hard values " + std::to_string(setting) + " activation " + std::to_string(kind));
        }
      }
    }
  }
}

// A large mean is taken off before anything is rounded.
void check_offset(Verdicts& verdicts) {
  Problem p({true, 1, 60, 12, 0, 0}, false, 17);
  std::mt19937 g(17);
  std::normal_distribution<float> normal;
  for (float& m : p.mean) m = 1e6f + 100 * normal(g);
  p.each([&](int64_t i, int64_t c) { p.set(i, p.mean[static_cast<size_t>(c)] + normal(g)); });
  check_problem(verdicts, p, "offset 1e6");
}

// |y| is at most the same expression of max_abs, |weight| and |bias|, evaluated in fp32.
void check_bound(Verdicts& verdicts) {
  std::mt19937 g(19);
  for (const bool bf16 : {false, true}) {
    Problem p({true, 1, 200, 24, 0, 0}, bf16, 19);
    p.bound();
    p.each([&](int64_t i, int64_t) {
      const uint32_t bits = static_cast<uint32_t>(g());
      p.x.set(i, std::bit_cast<float>(bits));  // any bits
    });
    for (size_t c = 0; c < 12; ++c) {
      p.mean[c] = std::bit_cast<float>(static_cast<uint32_t>(g()));
      p.var[c] = std::bit_cast<float>(static_cast<uint32_t>(g()));
    }
    Array out(bf16, p.shape.size(), 0);
    run(p.call(out), 1, Schedule{});
    bool holds = true;
    p.each([&](int64_t i, int64_t c) {
      const size_t channel = static_cast<size_t>(c);
      const float product = p.max_abs * std::fabs(p.weight[channel]);
      float limit = product + std::fabs(p.bias[channel]);
      if (bf16) limit = static_cast<float>(round_to_bf16(limit));
      holds &= std::fabs(out.at(i)) <= limit;
    });
    verdicts.check(holds, bf16 ? "bound, bf16" : "bound, fp32");
  }
}

// Input and output each once, in whole sectors, and the constants.
void check_traffic(Verdicts& verdicts) {
  const Shape shapes[] = {{true, 1, 600, 128, 0, 0}, {true, 1, 300, 97, 0, 0},
                          {false, 8, 100, 40, 0, 0}, {false, 4, 504, 20, 8, 0},
                          {true, 4, 60, 96, 32, 0},  {true, 1, 8, 4096, 0, 0}};
  for (const Shape& shape : shapes) {
    for (const bool bf16 : {false, true}) {
      Problem p(shape, bf16, 23);
      Array out(bf16, shape.size(), 0);
      const double useful =
          2.0 * static_cast<double>(shape.outer * shape.inner * shape.channels) * (bf16 ? 2 : 4);
      for (const auto& [name, schedule] : kSchedules) {
        const Counters c = run(p.call(out), 2, schedule);
        const double constants = 16.0 * static_cast<double>(shape.channels);
        const double moved = static_cast<double>(c.dram_load_bytes + c.dram_store_bytes);
        const std::string what = "traffic, " + shape.text() + (bf16 ? " bf16, " : " fp32, ") + name;
        verdicts.check(moved <= 1.1 * useful + constants,
                       what + ": " + std::to_string(moved / useful) + " of input and output");
        // Whole sectors: a warp asks for no more of them than its bytes fill.
        verdicts.check(static_cast<double>(c.global_store_sectors) * 32 <= 1.1 * useful / 2,
                       what + ": stores in " + std::to_string(c.global_store_sectors) + " sectors");
        verdicts.check(c.global_store_bytes * 2 == static_cast<int64_t>(useful), what + ": bytes");
      }
    }
  }
}

// The plan, for sizes no test could run.
void check_plans(Verdicts& verdicts) {
  ResilientBatchNormCall call;
  alignas(16) static const float constants[4] = {1, 1, 1, 1};
  alignas(16) static float values[4];
  call.x = call.out = values;
  call.norm.mean = call.norm.var = constants;
  const auto expect = [&](const std::string& what, bool vectorized, bool one_per_row, int grid) {
    const cuda::ResilientBatchNormPlan plan = cuda::plan_resilient_batch_norm(call, 132);
    verdicts.check(
        plan.vectorized == vectorized && plan.one_per_row == one_per_row && plan.grid == grid,
        "plan of " + what + ": " + std::to_string(plan.vectorized) + " " +
            std::to_string(plan.one_per_row) + " " + std::to_string(plan.grid));
    const cuda::ResilientBatchNormParams& p = plan.params;
    verdicts.check(
        p.beside >= 1 && p.step_row >= 1 &&
            p.step_row * p.beside <= int64_t{plan.grid} * cuda::ResilientBatchNormPlan::kThreads &&
            p.step_outer * p.inner + p.step_inner == p.step_row,
        "plan of " + what + ": steps");
  };
  const auto rows = [&](int64_t inner, int64_t channels) {
    call.channels_last = true;
    call.outer = 1;
    call.inner = inner;
    call.channels = channels;
    call.x_stride_row = call.out_stride_row = channels;
    call.x_stride_outer = call.out_stride_outer = inner * channels;
  };
  rows(int64_t{1} << 33, 512);  // more than 2^40 values
  expect("many rows", true, false, 528);
  rows(int64_t{1} << 33, 511);
  expect("many odd rows", true, false, 528);
  rows(1, 0x7fffffff);
  expect("one row of the most channels", true, false, 528);
  rows(2, 0x7fffffff);  // four of them would be beyond 32 bits
  expect("two rows of the most channels", false, false, 528);
  rows(1, 4);
  expect("four values", true, false, 1);
  call.channels_last = false;
  call.outer = 3;
  call.channels = 1000;
  call.inner = 3000000;  // channels of one n beyond 32 bits
  call.x_stride_row = call.out_stride_row = call.inner;
  call.x_stride_outer = call.out_stride_outer = call.inner * call.channels;
  expect("long rows of positions", true, true, 528);
  call.inner = 100;
  call.x_stride_row = call.out_stride_row = 100;
  call.x_stride_outer = call.out_stride_outer = 100 * call.channels;
  expect("short rows of positions", true, false, 293);
}

void check_errors(Verdicts& verdicts) {
  float value = 1, result = 0;
  ResilientBatchNormCall good;
  good.x = &value;
  good.out = &result;
  good.inner = good.channels = 1;
  good.norm.mean = good.norm.var = &value;
  const auto expect = [&](const std::string& text, auto&& change) {
    ResilientBatchNormCall call = good;
    change(call);
    const std::string got = cuda::check_resilient_batch_norm(call);
    verdicts.check(text.empty() ? got.empty() : got.find(text) != std::string::npos,
                   "errors: expected '" + text + "', got '" + got + "'");
  };
  using Call = ResilientBatchNormCall;
  expect("", [](Call&) {});
  expect("", [](Call& c) {
    c.inner = 0;
    c.x = c.out = nullptr;
  });
  expect("channels: expected 1 to 2147483647, got 0", [](Call& c) { c.channels = 0; });
  expect("outer, inner: expected sizes, got 1 and -1", [](Call& c) { c.inner = -1; });
  expect("mean, var: expected both", [](Call& c) { c.norm.var = nullptr; });
  expect("eps, min_var, max_abs", [](Call& c) { c.norm.eps = -1; });
  expect("eps, min_var, max_abs", [](Call& c) { c.norm.max_abs = kNaN; });
  expect("x, out: expected both", [](Call& c) { c.x = nullptr; });
  expect("out: expected memory apart from x, got x itself", [&](Call& c) { c.out = &value; });
  expect("activation: expected 0 to 4, got 9",
         [](Call& c) { c.activation = static_cast<Activation>(9); });
}

// ---- planted mistakes ----

int run_planted(const std::string& plant) {
  Verdicts verdicts;
  Problem p({true, 1, 9, 24, 4, 0}, false, 31);
  Array out(false, p.shape.size(), 0);
  ResilientBatchNormCall call = p.call(out);
  if (plant == "value") {
    p.bias[0] += 1;
  } else if (plant == "stride") {
    --call.out_stride_row;
  } else if (plant == "overread") {
    ++call.inner;
    call.out_stride_row = 0;
  } else if (plant == "overwrite") {
    ++call.inner;
    call.x_stride_row = 0;
  } else if (plant == "weights") {
    p.var.pop_back();
    p.var.shrink_to_fit();
    call.norm.var = p.var.data();
  } else {
    std::fprintf(stderr, "no plant '%s'\n", plant.c_str());
    return 2;
  }
  run(call, 1, Schedule{});
  if (plant == "value") p.bias[0] -= 1;
  bool kept = true, right = true;
  std::vector<bool> written(static_cast<size_t>(p.shape.size()));
  p.each([&](int64_t i, int64_t c) {
    written[static_cast<size_t>(i)] = true;
    right &= within(expected(p, p.x.at(i), static_cast<size_t>(c)), out.at(i), false);
  });
  for (size_t i = 0; i < written.size(); ++i) {
    kept &= written[i] || out.untouched(static_cast<int64_t>(i));
  }
  verdicts.check(right, plant + ": exceeds the bound");
  verdicts.check(kept, plant + ": wrote outside the rows");
  if (verdicts.failures == 0) std::printf("the plant was not noticed\n");
  return verdicts.failures == 0 ? 0 : 1;
}

// ---- the program ----

struct Group {
  const char* name;
  void (*run)(Verdicts&);
};

const Group kGroups[] = {
    {"shapes", check_shapes},           {"alignment", check_alignment},
    {"activations", check_activations}, {"hard values", check_hard_values},
    {"offset", check_offset},           {"bound", check_bound},
    {"traffic", check_traffic},         {"plans", check_plans},
    {"errors", check_errors},
};

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("--plant=", 0) == 0) return run_planted(argument.substr(8));
    if (argument != "--list") {
      std::fprintf(stderr, "unknown argument '%s'\n", argv[i]);
      return 2;
    }
    for (const Group& group : kGroups) std::printf("%s\n", group.name);
    return 0;
  }
  Verdicts total;
  for (const Group& group : kGroups) {
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
  return seqkernels::test::main(argc, argv);
}
