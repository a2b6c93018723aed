// The encoder in fp64, written from its formula, one sequence at a time:
//     a = softmax(q k^T / sqrt(head_dim)) v over the valid keys (0 where there is none)
//     x = norm1(x + W_o a + b_o)            x = norm2(x + W_2 act(W_1 x + b_1) + b_2)
// or, with norm_first, x += W_o a(norm1(x)) + b_o and x += W_2 act(W_1 norm2(x) + b_1) + b_2.
//
// Matrices and inputs are rounded to bf16 first, as a kernel may do. Every value that a bf16 run
// would store goes through `store`: the identity gives the golden result, Perturbed one example of
// what bf16 does to it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "encoder_problem.h"

namespace seqkernels::test {

struct Exact {
  double operator()(double value) { return value; }
};

// A relative error of the size that rounding to bf16 makes, at most half of its epsilon 2^-8. As in
// rounding, the same value has the same error: `run` chooses which.
struct Perturbed {
  static constexpr double kRoundoff = 0x1p-9;
  uint64_t run;
  double operator()(double value) const {
    uint64_t bits;
    std::memcpy(&bits, &value, 8);
    bits = (bits ^ run) * 0x9e3779b97f4a7c15;  // the finalizer of splitmix64
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    const double unit = static_cast<double>(bits >> 11) * 0x1p-53;  // in [0, 1)
    return value * (1 + kRoundoff * (2 * unit - 1));
  }
};

// Wrong on purpose: what the bound on the error has to notice.
enum class Defect { kNone, kScale, kPaddedKey, kSwappedHeads, kNormDivisor };

using Matrix = std::vector<double>;  // row by row

// c [m, n] = a [m, k] b [k, n]. Not instrumented: it reads what this program alone allocates, and
// most of the reference's time is spent here.
__attribute__((noinline, no_sanitize("address", "undefined", "thread"))) inline void multiply(
    size_t m, size_t k, size_t n, const double* a, const double* b, double* c) {
  std::fill(c, c + m * n, 0.0);
  for (size_t i = 0; i < m; ++i) {
    for (size_t j = 0; j < k; ++j) {
      const double factor = a[i * k + j];
      for (size_t l = 0; l < n; ++l) c[i * n + l] += factor * b[j * n + l];
    }
  }
}

template <class Store>
class Reference {
 public:
  Reference(const Problem& problem, Store& store, Defect defect = Defect::kNone)
      : p_(problem), c_(problem.c), store_(store), defect_(defect) {}

  // [rows, row width] of sequence b
  Matrix sequence(int64_t b) {
    load(b);
    for (const LayerArrays& w : p_.layers) layer(w);
    return finish();
  }

  // Over all layers, heads and queries of the last sequence with valid keys: log2 of sum
  // exp(score).
  double lowest_sum() const { return lowest_; }
  double highest_sum() const { return highest_; }

 private:
  size_t d() const { return static_cast<size_t>(c_.d_model); }
  size_t tokens() const { return static_cast<size_t>(c_.tokens()); }

  void load(int64_t b) {
    const size_t length = static_cast<size_t>(c_.length), e = static_cast<size_t>(c_.event_dim());
    const size_t wide = static_cast<size_t>(c_.candidate_width()), index = static_cast<size_t>(b);
    const bool append = c_.fusion == Fusion::kAppend;
    valid_.clear();
    x_.clear();
    const auto push = [&](const std::vector<float>& from, size_t at, size_t count) {
      for (size_t i = at; i < at + count; ++i) x_.push_back(store_(rounded_to_bf16(from[i])));
    };
    if (append && !c_.latest_last) push(p_.candidate, index * wide, wide);
    for (size_t l = 0; l < length; ++l) {
      push(p_.x, (index * length + l) * e, e);
      if (c_.fusion == Fusion::kConcat) push(p_.candidate, index * wide, wide);
    }
    if (append && c_.latest_last) push(p_.candidate, index * wide, wide);
    for (size_t t = 0; t < tokens(); ++t) valid_.push_back(p_.is_valid(b, static_cast<int64_t>(t)));
    lowest_ = 1e300;
    highest_ = -1e300;
  }

  // y [T, rows of weight] = x W^T + bias
  Matrix linear(const Matrix& x, const float* weight, const float* bias, size_t rows, size_t k) {
    Matrix transposed(k * rows), y(tokens() * rows);
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < k; ++j) transposed[j * rows + r] = rounded_to_bf16(weight[r * k + j]);
    }
    multiply(tokens(), k, rows, x.data(), transposed.data(), y.data());
    for (size_t i = 0; i < y.size(); ++i) y[i] = store_(y[i] + (bias ? bias[i % rows] : 0.0f));
    return y;
  }

  static const float* pointer(const std::vector<float>& v, size_t offset = 0) {
    return v.empty() ? nullptr : v.data() + offset;
  }

  Matrix norm(const Matrix& x, const std::vector<float>& weight, const std::vector<float>& bias,
              double eps) {
    Matrix y(x.size());
    const double n = static_cast<double>(d());
    for (size_t t = 0; t < tokens(); ++t) {
      const double* row = x.data() + t * d();
      double mean = 0, variance = 0;
      for (size_t i = 0; i < d(); ++i) mean += row[i] / n;
      for (size_t i = 0; i < d(); ++i) variance += (row[i] - mean) * (row[i] - mean);
      variance /= defect_ == Defect::kNormDivisor ? n + 32 : n;
      for (size_t i = 0; i < d(); ++i) {
        const double z = (row[i] - mean) / std::sqrt(variance + eps);
        y[t * d() + i] =
            store_(z * (weight.empty() ? 1 : weight[i]) + (bias.empty() ? 0 : bias[i]));
      }
    }
    return y;
  }

  double activate(double x) const {
    switch (c_.activation) {
      case Activation::kNone:
        break;
      case Activation::kRelu:
        return std::max(x, 0.0);
      case Activation::kGelu:
        return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
      case Activation::kGeluTanh:
        return 0.5 * x *
               (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
      case Activation::kLeakyRelu:
        return x < 0 ? x * static_cast<double>(p_.shape().negative_slope) : x;
    }
    throw std::logic_error("no such activation");
  }

  Matrix attention(const LayerArrays& w, const Matrix& x) {
    const size_t t_count = tokens(), heads = static_cast<size_t>(c_.nhead), width = d() / heads;
    Matrix part[3];
    for (size_t i = 0; i < 3; ++i) {
      part[i] = linear(x, w.in_proj.data() + i * d() * d(), pointer(w.in_bias, i * d()), d(), d());
    }
    std::vector<size_t> keys;
    for (size_t t = 0; t < t_count; ++t) {
      if (valid_[t]) keys.push_back(t);
    }
    if (defect_ == Defect::kPaddedKey && keys.size() < t_count) {
      keys.push_back(static_cast<size_t>(std::find(valid_.begin(), valid_.end(), uint8_t{0}) -
                                         valid_.begin()));
    }
    Matrix out(t_count * d(), 0.0);
    if (keys.empty()) return out;
    const double scale =
        1 / std::sqrt(defect_ == Defect::kScale ? 64.0 : static_cast<double>(width));
    Matrix q(t_count * width), k(width * keys.size()), v(keys.size() * width);
    Matrix s(t_count * keys.size()), o(t_count * width);
    for (size_t h = 0; h < heads; ++h) {
      for (size_t t = 0; t < t_count; ++t) {
        for (size_t i = 0; i < width; ++i) q[t * width + i] = part[0][t * d() + h * width + i];
      }
      for (size_t j = 0; j < keys.size(); ++j) {
        for (size_t i = 0; i < width; ++i) {
          k[i * keys.size() + j] = part[1][keys[j] * d() + h * width + i];
          v[j * width + i] = part[2][keys[j] * d() + h * width + i];
        }
      }
      multiply(t_count, width, keys.size(), q.data(), k.data(), s.data());
      for (size_t t = 0; t < t_count; ++t) softmax(s.data() + t * keys.size(), keys.size(), scale);
      multiply(t_count, keys.size(), width, s.data(), v.data(), o.data());
      const size_t to = defect_ == Defect::kSwappedHeads ? (h + 1) % heads : h;
      for (size_t t = 0; t < t_count; ++t) {
        for (size_t i = 0; i < width; ++i) out[t * d() + to * width + i] = store_(o[t * width + i]);
      }
    }
    return out;
  }

  void softmax(double* row, size_t count, double scale) {
    double top = -1e300, sum = 0;
    for (size_t j = 0; j < count; ++j) top = std::max(top, row[j] *= scale);
    for (size_t j = 0; j < count; ++j) sum += std::exp(row[j] - top);
    const double logarithm = top / std::log(2.0) + std::log2(sum);
    lowest_ = std::min(lowest_, logarithm);
    highest_ = std::max(highest_, logarithm);
    for (size_t j = 0; j < count; ++j) row[j] = store_(std::exp(row[j] - top) / sum);
  }

  Matrix feed_forward(const LayerArrays& w, const Matrix& x) {
    const size_t f = static_cast<size_t>(c_.dim_feedforward);
    Matrix hidden = linear(x, w.linear1.data(), pointer(w.bias1), f, d());
    for (double& h : hidden) h = store_(activate(h));
    return linear(hidden, w.linear2.data(), pointer(w.bias2), d(), f);
  }

  void add(const Matrix& y) {
    for (size_t i = 0; i < x_.size(); ++i) x_[i] = store_(x_[i] + y[i]);
  }

  void layer(const LayerArrays& w) {
    const double eps = p_.shape().layer_norm_eps;
    const auto attend = [&](const Matrix& x) {
      return linear(attention(w, x), w.out_proj.data(), pointer(w.out_bias), d(), d());
    };
    if (c_.norm_first) {
      add(attend(norm(x_, w.norm1, w.norm1_bias, eps)));
      add(feed_forward(w, norm(x_, w.norm2, w.norm2_bias, eps)));
    } else {
      add(attend(x_));
      x_ = norm(x_, w.norm1, w.norm1_bias, eps);
      add(feed_forward(w, x_));
      x_ = norm(x_, w.norm2, w.norm2_bias, eps);
    }
  }

  Matrix finish() {
    for (size_t t = 0; t < tokens(); ++t) {
      if (c_.padding == Padding::kCompute || valid_[t]) continue;
      std::fill_n(x_.begin() + static_cast<ptrdiff_t>(t * d()), d(), 0.0);
    }
    if (c_.final_norm) x_ = norm(x_, p_.final_norm, p_.final_norm_bias, p_.shape().final_norm_eps);
    if (c_.latest_k < 0) return x_;

    const int64_t count = c_.tokens();
    int64_t start = 0;
    if (c_.latest_last) {
      int64_t last = count - 1;
      for (int64_t t = 0; t < count; ++t) {
        if (valid_[static_cast<size_t>(t)]) last = t;
      }
      start = last - c_.latest_k + 1;
    } else {
      const auto found = std::find(valid_.begin(), valid_.end(), uint8_t{1});
      start = found == valid_.end() ? 0 : found - valid_.begin();
    }
    Matrix out;
    for (int64_t t = start; t < start + c_.latest_k; ++t) {
      for (size_t i = 0; i < d(); ++i)
        out.push_back(t < 0 || t >= count ? 0.0 : x_[static_cast<size_t>(t) * d() + i]);
    }
    for (size_t i = 0; c_.pool && i < d(); ++i) {
      double best = -1e300;
      bool any = false;
      for (size_t t = 0; t < tokens(); ++t) {
        if (c_.padding == Padding::kExclude && !valid_[t]) continue;
        best = std::max(best, x_[t * d() + i]);
        any = true;
      }
      out.push_back(any ? best : 0.0);
    }
    return out;
  }

  const Problem& p_;
  const Case& c_;
  Store& store_;
  const Defect defect_;
  Matrix x_;                    // [T, D]
  std::vector<uint8_t> valid_;  // [T]
  double lowest_ = 0, highest_ = 0;
};

// What a problem should give, and how far bf16 may stray from it.
struct Golden {
  struct Sequence {
    Matrix value;                 // [rows, row width]
    double rms = 0, largest = 0;  // of the errors in the worst of the perturbed runs
    double lowest_sum = 0, highest_sum = 0;
  };
  std::vector<Sequence> sequences;

  explicit Golden(const Problem& p) {
    for (int64_t b = 0; b < p.c.batch; ++b) {
      Exact exact;
      Reference<Exact> reference(p, exact);
      Sequence s;
      s.value = reference.sequence(b);
      s.lowest_sum = reference.lowest_sum();
      s.highest_sum = reference.highest_sum();
      // Few values are few errors, and all of them may be small by chance: then more runs. So are
      // those of sharp attention, where one key takes all: rare, and as large as the output.
      constexpr size_t kErrors = 4000, kMostRuns = 12;
      const size_t fewest_runs = p.c.sharpen > 3 ? kMostRuns : 2;
      const size_t count = std::max<size_t>(s.value.size(), 1);
      const size_t runs = std::clamp(kErrors / count, fewest_runs, kMostRuns);
      for (size_t run = 0; run < runs; ++run) {
        Perturbed perturbed{run + 1};
        const Matrix y = Reference<Perturbed>(p, perturbed).sequence(b);
        double sum = 0;
        for (size_t i = 0; i < y.size(); ++i) {
          const double error = std::abs(y[i] - s.value[i]);
          sum += error * error;
          s.largest = std::max(s.largest, error);
        }
        s.rms = std::max(s.rms, std::sqrt(sum / static_cast<double>(count)));
      }
      sequences.push_back(std::move(s));
    }
  }
};

}  // namespace seqkernels::test
