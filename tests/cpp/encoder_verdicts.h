// The verdicts on an encoder's results: the bound on its error, and equal bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "encoder_problem.h"
#include "encoder_reference.h"

namespace seqkernels::test {

// The bound on the error, in multiples of what bf16 does to the reference (encoder_reference.h:
// each stored value off by at most half of bf16's epsilon). Both errors have the same origin and
// pass the same layer norms, softmaxes and logits, which multiply it by anything from 0 to 100; a
// tolerance that ignores them is blind for one problem and wrong for the next. Their ratio is about
// 1: a kernel rounds fewer values than the reference perturbs (it keeps sums, and on some
// instruction sets all activations, in fp32), but approximates exp2 and erf, and rounding errors of
// one sign may add up. Measured, it is at most 1.5 over all problems here. The mistakes of the
// group `defects` give 6 to 240.
constexpr double kRmsBound = 2.5, kLargestBound = 3;

struct Ratios {
  double rms = 0, largest = 0;
  bool within_bound() const { return rms <= kRmsBound && largest <= kLargestBound; }
};

// Of the errors of y [rows, row width] to those of the perturbed reference; infinite for NaN.
template <class Value>
Ratios error_ratios(const Value* y, const Golden::Sequence& golden) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  double sum = 0, largest = 0;
  for (const double value : golden.value) {
    const double error = std::abs(*y++ - value);
    if (!(error < kInfinity)) return {kInfinity, kInfinity};
    sum += error * error;
    largest = std::max(largest, error);
  }
  if (largest == 0) return {};
  if (golden.largest == 0) return {kInfinity, kInfinity};
  return {std::sqrt(sum / static_cast<double>(golden.value.size())) / golden.rms,
          largest / golden.largest};
}

class Verdicts {
 public:
  void quiet() { quiet_ = true; }
  void fail(const std::string& what) {
    ++failures_;
    if (failures_ <= 20 && !quiet_) std::fprintf(stderr, "FAIL %s\n", what.c_str());
  }
  void check(bool holds, const std::string& what) {
    ++checks_;
    if (!holds) fail(what);
  }

  // y [B, rows, row width]
  void within_bound(const std::vector<float>& y, const Golden& golden, const std::string& what) {
    const float* at = y.data();
    for (const Golden::Sequence& sequence : golden.sequences) {
      const Ratios ratios = error_ratios(at, sequence);
      at += sequence.value.size();
      if (ratios.rms > worst_.rms) worst_what_ = what;
      worst_.rms = std::max(worst_.rms, ratios.rms);
      worst_.largest = std::max(worst_.largest, ratios.largest);
      check(ratios.within_bound(),
            what + ": sequence " + std::to_string(&sequence - golden.sequences.data()) +
                " exceeds the bound on the error: rms " + std::to_string(ratios.rms) +
                ", largest " + std::to_string(ratios.largest) + " times that of bf16");
    }
  }

  void same_bits(const std::vector<float>& a, const std::vector<float>& b,
                 const std::string& what) {
    size_t i = 0;
    while (i < a.size() && i < b.size() && std::memcmp(&a[i], &b[i], 4) == 0) ++i;
    check(i == a.size() && i == b.size(), what + ": bits differ at index " + std::to_string(i));
  }

  int failures() const { return failures_; }
  int checks() const { return checks_; }
  Ratios worst() const { return worst_; }
  const std::string& worst_what() const { return worst_what_; }

 private:
  bool quiet_ = false;
  int failures_ = 0, checks_ = 0;
  Ratios worst_;
  std::string worst_what_;  // where the rms is
};

// Rows of a full sequence that belong to valid tokens.
inline std::vector<float> valid_rows(const Problem& p, const std::vector<float>& y) {
  std::vector<float> rows;
  const int64_t d = p.c.d_model;
  for (int64_t b = 0; b < p.c.batch; ++b) {
    for (int64_t t = 0; t < p.c.tokens(); ++t) {
      const auto at = y.begin() + (b * p.c.tokens() + t) * d;
      if (p.is_valid(b, t)) rows.insert(rows.end(), at, at + d);
    }
  }
  return rows;
}

// Attention whose P V leaves the range of fp32 although the rows' sums do not: large weights and
// large values, small weights and small values. run(problem) gives the kernel's output.
template <class Run>
void check_one_sided(Verdicts& verdicts, Case c, const std::string& what, Run run) {
  c.parameters = Parameters::kBare;  // nothing stands beside small values
  for (float side : {1.0f, -1.0f}) {
    c.scale = side > 0 ? 1.0f : 1e-24f;
    double sum = 0;  // log2 of the row's that is farthest from 1
    for (c.sharpen = 1.5f; sum < 85; c.sharpen *= 1.03f) {
      Exact exact;
      const Problem tried = one_sided(c, side, 1.0f);
      Reference<Exact> reference(tried, exact);
      reference.sequence(0);
      sum = side > 0 ? reference.highest_sum() : -reference.lowest_sum();
    }
    c.sharpen /= 1.03f;
    const Problem p = one_sided(c, side, side > 0 ? 1e15f : 1.0f);
    verdicts.check(sum < 95, what + p.c.text() + ": the search went too far");
    verdicts.within_bound(run(p), Golden(p), what + p.c.text());
  }
}

}  // namespace seqkernels::test
