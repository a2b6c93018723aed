// What a call of an op says beside its tensors. seqkernels/options.py has the same records, with
// the same fields in the same order: that of the op's schema.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace seqkernels {

// GELU exact (erf) and by tanh; kLeakyRelu has a slope beside it.
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kLeakyRelu = 4 };
enum class Fusion : int { kNone = 0, kConcat = 1, kAppend = 2 };
// kStock: kZero or kCompute, as torch decides for each batch.
enum class Padding : int { kZero = 0, kCompute = 1, kExclude = 2, kStock = 3 };
enum class Order : int { kLatestFirst = 0, kLatestLast = 1 };
enum class Pool : int { kNone = 0, kMax = 1 };
enum class Precision : int { kBf16 = 0, kFp32 = 1 };

// The names of an enumeration's values, in their order.
template <class E>
constexpr auto names_of();
template <>
constexpr auto names_of<Activation>() {
  return std::array{"none", "relu", "gelu", "gelu_tanh", "leaky_relu"};
}
template <>
constexpr auto names_of<Fusion>() {
  return std::array{"none", "concat", "append"};
}
template <>
constexpr auto names_of<Padding>() {
  return std::array{"zero", "compute", "exclude", "stock"};
}
template <>
constexpr auto names_of<Order>() {
  return std::array{"latest_first", "latest_last"};
}
template <>
constexpr auto names_of<Pool>() {
  return std::array{"none", "max"};
}
template <>
constexpr auto names_of<Precision>() {
  return std::array{"bf16", "fp32"};
}

// Code that is no switch over all activations asserts that it knows so many.
constexpr int kActivations = static_cast<int>(names_of<Activation>().size());

// The value with this name; `field` names it in the error.
template <class E>
E value_of(const char* field, std::string_view name) {
  constexpr auto names = names_of<E>();
  std::string known;
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<E>(i);
    known += std::string(i ? ", " : "") + names[i];
  }
  throw std::invalid_argument(std::string(field) + ": expected one of " + known + ", got '" +
                              std::string(name) + "'");
}

// What of an encoder's options packed weights and every call share.
struct EncoderModelOptions {
  int nhead = 0;
  Activation activation = Activation::kRelu;
  float negative_slope = 0.01f;
  bool norm_first = false;
  float layer_norm_eps = 1e-5f;
  float final_norm_eps = 1e-5f;

  bool operator==(const EncoderModelOptions&) const = default;
};

// What a call alone reads.
struct EncoderCallOptions {
  Fusion fusion = Fusion::kNone;
  Padding padding = Padding::kZero;
  Order order = Order::kLatestFirst;
  int64_t latest_k =
      -1;  // -1: the full sequence [B, T, D]; else the summary [B, latest_k * D (+ D)]
  Pool pool = Pool::kNone;

  bool operator==(const EncoderCallOptions&) const = default;
  bool latest_last() const { return order == Order::kLatestLast; }
  bool pool_max() const { return pool == Pool::kMax; }
};

struct EncoderOptions : EncoderModelOptions, EncoderCallOptions {
  // visit(name, field) for each field.
  template <class Self, class Visit>
  static void each(Self& self, Visit&& visit) {
    visit("nhead", self.nhead);
    visit("activation", self.activation);
    visit("negative_slope", self.negative_slope);
    visit("norm_first", self.norm_first);
    visit("layer_norm_eps", self.layer_norm_eps);
    visit("final_norm_eps", self.final_norm_eps);
    visit("fusion", self.fusion);
    visit("padding", self.padding);
    visit("order", self.order);
    visit("latest_k", self.latest_k);
    visit("pool", self.pool);
  }
};

// eps, min_var and, where there is a bound, max_abs; nothing: there is no norm.
using NormNumbers = std::vector<double>;

struct LinearOptions {
  NormNumbers input_norm;
  NormNumbers output_norm;
  Activation activation = Activation::kNone;
  float negative_slope = 0.01f;
  Precision precision = Precision::kBf16;

  template <class Self, class Visit>
  static void each(Self& self, Visit&& visit) {
    visit("input_norm", self.input_norm);
    visit("output_norm", self.output_norm);
    visit("activation", self.activation);
    visit("negative_slope", self.negative_slope);
    visit("precision", self.precision);
  }
};

struct ResilientBatchNormOptions {
  double eps = 1e-5;
  double min_var = 0.0;
  std::optional<double> max_abs;
  Activation activation = Activation::kNone;
  float negative_slope = 0.01f;

  template <class Self, class Visit>
  static void each(Self& self, Visit&& visit) {
    visit("eps", self.eps);
    visit("min_var", self.min_var);
    visit("max_abs", self.max_abs);
    visit("activation", self.activation);
    visit("negative_slope", self.negative_slope);
  }
};

}  // namespace seqkernels
