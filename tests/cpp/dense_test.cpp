// The native linear layer and batch norm on a grid of hard problems, on every instruction set that
// runs here. Meant to be built with sanitizers: the program checks values, they check accesses.
//
//   dense_test [--isa=NAME] [--plant=DEFECT] [--list]
//
// Every array lies in heap memory of exactly its size. A plant is a deliberate mistake, which must
// make the program fail. The program needs nothing but the native core.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "packed.h"
#include "seqkernels/linear.h"
#include "seqkernels/resilient_batch_norm.h"

#if defined(__x86_64__) && defined(__linux__)
#include "amx_trap.h"
#define SEQKERNELS_AMX_TRAP
#endif

namespace seqkernels::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Target {
  std::string name;
  bool trapped = false;

  void run(const LinearShape& shape, const LinearParameters& p, const LinearCall& call) const {
    if (trapped) {
      Linear(cpu::linear_amx_bf16(), shape, p).forward(call);
    } else {
      Linear(name, shape, p).forward(call);
    }
  }
};

std::vector<Target> all_targets() {
  std::vector<Target> targets;
  bool has_amx = false, runs_amx = false, runs_bf16 = false;
  for (const std::string& name : isa_names()) {
    const bool runs = isa_unsupported_reasons(name).empty();
    if (runs) targets.push_back({name});
    has_amx |= name == "amx_bf16";
    runs_amx |= runs && name == "amx_bf16";
    runs_bf16 |= runs && name == "avx512_bf16";
  }
#if defined(SEQKERNELS_AMX_TRAP)
  if (has_amx && !runs_amx && runs_bf16) {
    amx_trap::install();
    targets.push_back({"amx_bf16(trapped)", true});
  }
#endif
  return targets;
}

struct Verdicts {
  int checks = 0, failures = 0;
  void check(bool holds, const std::string& what) {
    ++checks;
    if (holds) return;
    ++failures;
    if (failures <= 20) std::fprintf(stderr, "FAIL %s\n", what.c_str());
  }
};

// ---- values ----

float round_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (!std::isfinite(x)) return x;
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Values exact in bf16.
std::vector<float> draw(std::mt19937& g, size_t n, float scale, float shift = 0) {
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& v : values) v = round_bf16(scale * normal(g) + shift);
  return values;
}

// Rows of floats or bf16 with a gap of NaN between them.
struct Array {
  bool bf16;
  int64_t rows, columns, stride;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;

  Array(bool bf16_, int64_t rows_, int64_t columns_, int64_t gap)
      : bf16(bf16_), rows(rows_), columns(columns_), stride(columns_ + gap) {
    const size_t n = rows == 0 ? 0 : static_cast<size_t>((rows - 1) * stride + columns);
    if (bf16) {
      narrow.assign(n, 0x7fc1);
    } else {
      wide.assign(n, kNaN);
    }
  }
  void* data() { return bf16 ? static_cast<void*>(narrow.data()) : wide.data(); }
  float at(int64_t r, int64_t c) const {
    const size_t i = static_cast<size_t>(r * stride + c);
    if (!bf16) return wide[i];
    const uint32_t bits = static_cast<uint32_t>(narrow[i]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  void set(int64_t r, int64_t c, float x) {
    const size_t i = static_cast<size_t>(r * stride + c);
    if (!bf16) {
      wide[i] = x;
      return;
    }
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    narrow[i] = static_cast<uint16_t>(bits >> 16);
  }
  bool gaps_untouched() const {
    for (int64_t r = 0; r + 1 < rows; ++r) {
      for (int64_t c = columns; c < stride; ++c) {
        const size_t i = static_cast<size_t>(r * stride + c);
        if (bf16 ? narrow[i] != 0x7fc1 : !std::isnan(wide[i])) return false;
      }
    }
    return true;
  }
};

struct Norm {
  std::vector<float> mean, var, weight, bias;
  float min_var = 0, max_abs = kInfinity;

  Norm(std::mt19937& g, size_t channels, int kind) {  // 0 none, 1 exact, 2 bounded
    if (kind == 0) return;
    mean = draw(g, channels, 1);
    var = draw(g, channels, 1);
    for (float& v : var) v = round_bf16(std::abs(v) + 0.25f);
    weight = draw(g, channels, 1);
    bias = draw(g, channels, 1);
    if (kind == 2) {
      min_var = 0.5f;
      max_abs = 1.5f;
    }
  }
  ChannelNorm view() const {
    if (mean.empty()) return {};
    return {{true, 1e-5f, min_var, max_abs}, {mean.data(), var.data(), weight.data(), bias.data()}};
  }
  bool present() const { return !mean.empty(); }
  bool bounded() const { return view().bounded(); }
  double scale(size_t c) const {
    return present() ? std::abs(weight[c]) / std::sqrt(std::max(var[c], min_var) + 1e-5) : 1.0;
  }
  double apply(double x, size_t c) const {
    if (!present()) return x;
    const bool usable = std::isfinite(mean[c]) && std::isfinite(var[c]) && var[c] >= 0;
    double z = (x - mean[c]) / std::sqrt((bounded() ? std::max(var[c], min_var) : var[c]) + 1e-5);
    if (bounded()) {
      if (!usable || std::isnan(z)) z = 0;
      z = std::clamp(z, -static_cast<double>(max_abs), static_cast<double>(max_abs));
    }
    return z * weight[c] + bias[c];
  }
};

double activate(Activation kind, double x) {
  switch (kind) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x > 0 ? x : 0;
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kLeakyRelu:
      return x < 0 ? 0.2 * x : x;
  }
  return kNaN;
}

// ---- the linear layer ----

struct LinearCase {
  int64_t rows, in, out, gap = 0;
  bool bf16 = false;
  int input_norm = 0, output_norm = 0;
  Activation activation = Activation::kNone;
  int threads = 1;
  bool fp32_operands = false;

  std::string text() const {
    return std::to_string(rows) + "x" + std::to_string(in) + "x" + std::to_string(out) +
           (bf16 ? " bf16" : " fp32") + (fp32_operands ? " of fp32" : "") + " norms " +
           std::to_string(input_norm) + std::to_string(output_norm) + " activation " +
           std::to_string(static_cast<int>(activation)) + " threads " + std::to_string(threads);
  }
};

void check_linear(const Target& target, const LinearCase& c, Verdicts& verdicts,
                  const std::string& plant = "") {
  std::mt19937 g(static_cast<unsigned>(c.rows * 131 + c.in * 17 + c.out));
  std::vector<float> weight =
      draw(g, static_cast<size_t>(c.out * c.in), 1 / std::sqrt(static_cast<float>(c.in)));
  const std::vector<float> bias = draw(g, static_cast<size_t>(c.out), 1);
  const Norm before(g, static_cast<size_t>(c.in), c.input_norm);
  const Norm behind(g, static_cast<size_t>(c.out), c.output_norm);
  Array x(c.bf16, c.rows, c.in, c.gap), out(c.bf16, c.rows, c.out, c.gap);
  for (int64_t r = 0; r < c.rows; ++r) {
    const std::vector<float> row = draw(g, static_cast<size_t>(c.in), 1.5f, 0.5f);
    for (int64_t k = 0; k < c.in; ++k) x.set(r, k, row[static_cast<size_t>(k)]);
  }
  if (c.fp32_operands) {
    for (float& w : weight) w *= 1.001f;  // what bf16 does not hold
  }
  const std::vector<float> true_weight = weight;
  if (plant == "value") weight[0] += 1;
  if (plant == "weights") {
    weight.pop_back();
    weight.shrink_to_fit();
  }

  LinearShape shape;
  shape.in_features = c.in;
  shape.out_features = c.out;
  shape.input_norm = before.view();
  shape.output_norm = behind.view();
  shape.activation = c.activation;
  shape.negative_slope = 0.2f;
  shape.precision = c.fp32_operands ? Precision::kFp32 : Precision::kBf16;
  LinearParameters p;
  p.weight = weight.data();
  p.bias = bias.data();
  p.input_norm = before.view();
  p.output_norm = behind.view();
  LinearCall call;
  call.x = x.data();
  call.out = out.data();
  call.is_bf16 = c.bf16;
  call.rows = c.rows + (plant == "overread" || plant == "overwrite" ? 1 : 0);
  call.x_stride = plant == "overwrite" ? 0 : x.stride;
  call.out_stride = plant == "overread" ? 0 : plant == "stride" ? out.stride - 1 : out.stride;
  call.num_threads = c.threads;
  target.run(shape, p, call);

  bool right = true;
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t f = 0; f < c.out; ++f) {
      const size_t channel = static_cast<size_t>(f);
      double sum = bias[channel], size = 0;
      for (int64_t k = 0; k < c.in; ++k) {
        const double term = before.apply(x.at(r, k), static_cast<size_t>(k)) *
                            true_weight[static_cast<size_t>(f * c.in + k)];
        sum += term;
        size += std::abs(term);
      }
      const double y = activate(c.activation, behind.apply(sum, channel));
      // Each term is off by half of bf16's last bit where a norm was in front of bf16 operands.
      const bool rounded = before.present() && !c.fp32_operands;
      const double terms = size * (rounded ? std::ldexp(1, -8) : std::ldexp(1, -18));
      const double last_bit = c.bf16 ? std::ldexp(1, -8) : std::ldexp(1, -17);
      const double bound = 1.2 * terms * behind.scale(channel) + last_bit * std::abs(y) + 1e-5;
      if (!(std::abs(out.at(r, f) - y) <= bound)) right = false;
    }
  }
  verdicts.check(right, target.name + ": linear " + c.text() + ": exceeds the bound");
  verdicts.check(out.gaps_untouched(),
                 target.name + ": linear " + c.text() + ": wrote outside the rows");
}

void linear_grid(const Target& target, Verdicts& verdicts) {
  const int64_t rows[] = {1, 2, 3, 7, 8, 15, 16, 17, 33, 70};
  const int64_t sizes[][2] = {{1, 1}, {3, 5}, {33, 17}, {32, 16}, {64, 48}, {70, 50}, {96, 129}};
  int i = 0;
  for (const auto& [in, out] : sizes) {
    for (int norms = 0; norms < 9; ++norms, ++i) {
      LinearCase c{rows[i % 10], in, out};
      c.gap = i % 3;
      c.bf16 = i % 2 != 0;
      c.input_norm = norms / 3;
      c.output_norm = norms % 3;
      c.activation = static_cast<Activation>(i % 5);
      c.threads = 1 + i % 3;
      check_linear(target, c, verdicts);
      c.fp32_operands = true;
      if (!target.trapped) check_linear(target, c, verdicts);
    }
  }
  for (const bool bf16 : {false, true}) {  // one row takes strips of its own
    LinearCase one{1, 70, 300};
    one.bf16 = bf16;
    check_linear(target, one, verdicts);
    one.fp32_operands = true;
    if (!target.trapped) check_linear(target, one, verdicts);
  }
  LinearCase threads{300, 200, 300};
  threads.threads = 3;
  check_linear(target, threads, verdicts);
}

// ---- batch norm ----

struct NormCase {
  int64_t outer, inner, channels, gap = 0;
  bool channels_last = true, bf16 = false, bounded = true;
  Activation activation = Activation::kNone;
  int threads = 1;

  std::string text() const {
    return std::to_string(outer) + "x" + std::to_string(inner) + "x" + std::to_string(channels) +
           (channels_last ? " channels last" : "") + (bf16 ? " bf16" : " fp32") +
           (bounded ? " bounded" : " exact") + " threads " + std::to_string(threads);
  }
};

void check_norm(const std::string& isa, const NormCase& c, Verdicts& verdicts,
                const std::string& plant = "") {
  std::mt19937 g(static_cast<unsigned>(c.outer * 131 + c.inner * 17 + c.channels));
  Norm norm(g, static_cast<size_t>(c.channels), c.bounded ? 2 : 1);
  if (c.bounded && c.channels > 3) {
    norm.var[0] = kNaN;
    norm.var[1] = -1;
    norm.mean[2] = kInfinity;
    norm.var[3] = 0;
  }
  const int64_t rows = c.outer * (c.channels_last ? c.inner : c.channels);
  const int64_t width = c.channels_last ? c.channels : c.inner;
  Array x(c.bf16, rows, width, c.gap), out(c.bf16, rows, width, c.gap);
  for (int64_t r = 0; r < rows; ++r) {
    const std::vector<float> row = draw(g, static_cast<size_t>(width), 2);
    for (int64_t i = 0; i < width; ++i) x.set(r, i, row[static_cast<size_t>(i)]);
  }
  if (c.bounded) {
    x.set(0, 0, kNaN);
    x.set(rows - 1, width - 1, -kInfinity);
  }
  Norm given = norm;
  if (plant == "value") given.bias[0] += 1;
  if (plant == "weights") {
    given.mean.pop_back();
    given.mean.shrink_to_fit();
  }

  ResilientBatchNormCall call;
  call.x = x.data();
  call.out = out.data();
  call.is_bf16 = c.bf16;
  call.channels_last = c.channels_last;
  call.outer = c.outer;
  call.inner = c.inner;
  call.channels = c.channels;
  const int64_t block = rows / c.outer;
  call.x_stride_row = x.stride;
  call.x_stride_outer = block * x.stride;
  call.out_stride_row = out.stride - (plant == "stride" ? 1 : 0);
  call.out_stride_outer = block * out.stride;
  if (plant == "overread" || plant == "overwrite") {
    ++call.inner;
    if (plant == "overread") call.out_stride_row = 0;
    if (plant == "overwrite") call.x_stride_row = 0;
  }
  call.norm = given.view();
  call.activation = c.activation;
  call.negative_slope = 0.2f;
  call.num_threads = c.threads;
  run_resilient_batch_norm(runnable_isa(isa), call);

  bool right = true;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; ++i) {
      const size_t channel = static_cast<size_t>(c.channels_last ? i : r % c.channels);
      const double y = activate(c.activation, norm.apply(x.at(r, i), channel));
      const double last_bit = c.bf16 ? std::ldexp(1, -8) : std::ldexp(1, -18);
      if (!(std::abs(out.at(r, i) - y) <= last_bit * std::abs(y) + 1e-5)) right = false;
    }
  }
  verdicts.check(right, isa + ": batch norm " + c.text() + ": exceeds the bound");
  verdicts.check(out.gaps_untouched(),
                 isa + ": batch norm " + c.text() + ": wrote outside the rows");
}

void norm_grid(const std::string& isa, Verdicts& verdicts) {
  const int64_t shapes[][3] = {{1, 1, 1},   {1, 37, 3},  {1, 200, 5}, {1, 9, 16},
                               {1, 7, 35},  {1, 3, 700}, {4, 5, 6},   {3, 1, 33},
                               {2, 100, 4}, {5, 3, 64},  {1, 40, 16}, {2, 2100, 2}};
  int i = 0;
  for (const auto& [outer, inner, channels] : shapes) {
    for (int variant = 0; variant < 8; ++variant, ++i) {
      NormCase c{outer, inner, channels};
      c.gap = variant % 2 == 0 ? 0 : i % 4;
      c.channels_last = outer == 1 || variant % 2 == 0;
      c.bf16 = variant / 2 % 2 != 0;
      c.bounded = variant / 4 != 0;
      c.activation = static_cast<Activation>(i % 5);
      c.threads = 1 + i % 3;
      check_norm(isa, c, verdicts);
    }
  }
  NormCase threads{1, 3000, 64};
  threads.threads = 3;
  check_norm(isa, threads, verdicts);
}

// ---- refusals ----

template <class Body>
void expect_refusal(Verdicts& verdicts, const std::string& told, Body body) {
  try {
    body();
    verdicts.check(false, "not refused: " + told);
  } catch (const std::invalid_argument& error) {
    const std::string said = error.what();
    verdicts.check(said.find(told) != said.npos, "'" + said + "' does not say '" + told + "'");
  }
}

void refusals(Verdicts& verdicts) {
  const float one = 1;
  LinearShape shape;
  shape.in_features = shape.out_features = 1;
  LinearParameters p;
  expect_refusal(verdicts, "linear: weight: expected a matrix",
                 [&] { Linear("portable", shape, p); });
  p.weight = &one;
  p.output_norm.mean = &one;
  shape.output_norm.present = true;
  expect_refusal(verdicts, "output_norm: expected mean and variance",
                 [&] { Linear("portable", shape, p); });
  shape.output_norm.present = false;
  shape.in_features = 0;
  expect_refusal(verdicts, "weight: expected [F >= 1", [&] { Linear("portable", shape, p); });
  shape.in_features = 1;
  expect_refusal(verdicts, "isa: expected one of", [&] { Linear("sse9", shape, p); });
  LinearCall negative;
  negative.rows = -1;
  expect_refusal(verdicts, "x: expected rows >= 0",
                 [&] { Linear("portable", shape, p).forward(negative); });
  ResilientBatchNormCall call;
  const int isa = runnable_isa("portable");
  expect_refusal(verdicts, "channels: expected at least 1",
                 [&] { run_resilient_batch_norm(isa, call); });
  call.channels = 1;
  expect_refusal(verdicts, "mean, var: expected both",
                 [&] { run_resilient_batch_norm(isa, call); });
  call.norm.mean = call.norm.var = &one;
  call.norm.eps = -1;
  expect_refusal(verdicts, "not negative", [&] { run_resilient_batch_norm(isa, call); });
}

int run(int argc, char** argv) {
  std::string isa, planted;
  bool list = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list") {
      list = true;
    } else if (argument.rfind("--isa=", 0) == 0) {
      isa = argument.substr(6);
    } else if (argument.rfind("--plant=", 0) == 0) {
      planted = argument.substr(8);
    } else {
      std::fprintf(stderr, "unknown argument '%s'\n", argv[i]);
      return 2;
    }
  }
  std::vector<Target> targets;
  for (const Target& target : all_targets()) {
    if (isa.empty() || target.name == isa) targets.push_back(target);
  }
  if (targets.empty()) {
    std::fprintf(stderr, "no instruction set '%s' runs here\n", isa.c_str());
    return 2;
  }
  if (list) {
    for (const Target& target : targets) std::printf("%s\n", target.name.c_str());
    return 0;
  }

  Verdicts verdicts;
  if (!planted.empty()) {
    const size_t colon = planted.find(':');
    const std::string op = planted.substr(0, colon), mistake = planted.substr(colon + 1);
    const char* known[] = {"overread", "overwrite", "weights", "stride", "value"};
    if (colon == planted.npos ||
        std::find(std::begin(known), std::end(known), mistake) == std::end(known)) {
      std::fprintf(stderr, "no plant '%s'\n", planted.c_str());
      return 2;
    }
    if (op == "linear") {
      LinearCase c{17, 40, 20};
      c.gap = mistake == "stride" ? 2 : 0;
      check_linear(targets.front(), c, verdicts, mistake);
    } else {
      NormCase c{1, 17, 300};
      c.gap = mistake == "stride" ? 2 : 0;
      c.bounded = false;
      check_norm(targets.front().name, c, verdicts, mistake);
    }
    if (verdicts.failures == 0) std::printf("the plant was not noticed\n");
    return verdicts.failures ? 1 : 0;
  }
  std::string names;
  for (const Target& target : targets) {
    linear_grid(target, verdicts);
    if (!target.trapped) norm_grid(target.name, verdicts);
    names += " " + target.name;
  }
  refusals(verdicts);
  std::printf("instruction sets:%s\n", names.c_str());
  std::printf("%d checks, %d failures\n", verdicts.checks, verdicts.failures);
  return verdicts.failures ? 1 : 0;
}

}  // namespace
}  // namespace seqkernels::test

int main(int argc, char** argv) {
  return seqkernels::test::run(argc, argv);
}
