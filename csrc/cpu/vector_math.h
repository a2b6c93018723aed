// Elementary functions on the vectors of an instruction set.

template <class Isa>
struct VectorMath {
  using V = typename Isa::V;

  // Minimax polynomials for 2^f on |f| <= 1/2, highest power first; relative error 7.5e-5
  // and 7.5e-8.
  static constexpr float kExp2Coarse[] = {5.517166853e-02f, 2.426111251e-01f, 6.932609677e-01f,
                                          9.999280572e-01f};
  static constexpr float kExp2Fine[] = {1.327647245e-03f, 9.675540961e-03f, 5.550713092e-02f,
                                        2.402212024e-01f, 6.931469440e-01f, 1.000000119e+00f};

  // 2^x = 2^n 2^f with n the nearest integer. NaN stays NaN, overflow gives inf, underflow 0 or
  // almost.
  template <int kTerms>
  static inline V exp2(V x, const float (&polynomial)[kTerms]) {
    x = Isa::clamp_exponent(x);
    const V n = Isa::round(x);
    const V f = Isa::sub(x, n);
    V p = Isa::set1(polynomial[0]);
#pragma GCC unroll 8
    for (int i = 1; i < kTerms; ++i) p = Isa::fma(p, f, Isa::set1(polynomial[i]));
    return Isa::scale_by_power(p, n);
  }
  static inline V exp2_coarse(V x) { return exp2(x, kExp2Coarse); }
  static inline V exp2_fine(V x) { return exp2(x, kExp2Fine); }

  // 1 / (1 + 2^-x)
  static inline V logistic2(V x) {
    const V power =
        Isa::max(Isa::set1(-120.0f), Isa::min(Isa::set1(120.0f), Isa::sub(Isa::zero(), x)));
    return Isa::div(Isa::set1(1.0f), Isa::add(Isa::set1(1.0f), exp2_fine(power)));
  }

  // Gauss error function, Abramowitz and Stegun 7.1.26: |error| <= 1.5e-7.
  static inline V erf(V x) {
    const V a = Isa::abs(x);
    const V t = Isa::div(Isa::set1(1.0f), Isa::fma(a, Isa::set1(0.3275911f), Isa::set1(1.0f)));
    V p = Isa::set1(1.061405429f);
    p = Isa::fma(p, t, Isa::set1(-1.453152027f));
    p = Isa::fma(p, t, Isa::set1(1.421413741f));
    p = Isa::fma(p, t, Isa::set1(-0.284496736f));
    p = Isa::mul(Isa::fma(p, t, Isa::set1(0.254829592f)), t);
    const V power = Isa::max(Isa::set1(-120.0f), Isa::mul(Isa::mul(a, a), Isa::set1(-1.44269504f)));
    return Isa::copy_sign(Isa::sub(Isa::set1(1.0f), Isa::mul(p, exp2_fine(power))), x);
  }

  static inline V relu(V x) { return Isa::max(Isa::zero(), x); }
  static inline V leaky_relu(V x, V slope) {
    return Isa::select(Isa::less(x, Isa::zero()), Isa::mul(x, slope), x);
  }
  static inline V gelu(V x) {
    const V half = Isa::mul(x, Isa::set1(0.5f));
    return Isa::fma(half, erf(Isa::mul(x, Isa::set1(0.70710678f))), half);
  }
  // x logistic(2 sqrt(2/pi) (x + 0.044715 x^3)), the same as 0.5 x (1 + tanh(...))
  static inline V gelu_tanh(V x) {
    const V inner = Isa::mul(x, Isa::fma(Isa::mul(x, x), Isa::set1(0.044715f), Isa::set1(1.0f)));
    return Isa::mul(x, logistic2(Isa::mul(inner, Isa::set1(2.0f * 0.79788456f * 1.44269504f))));
  }
};

// Calls body(activate) with the function V -> V that `kind` names, so that a loop is compiled for
// each of them.
template <class Isa, class Body>
static inline void with_activation(Activation kind, float negative_slope, Body&& body) {
  using Math = VectorMath<Isa>;
  using V = typename Isa::V;
  const V slope = Isa::set1(negative_slope);
  switch (kind) {
    case Activation::kNone:
      body([](V y) { return y; });
      break;
    case Activation::kRelu:
      body([](V y) { return Math::relu(y); });
      break;
    case Activation::kGelu:
      body([](V y) { return Math::gelu(y); });
      break;
    case Activation::kGeluTanh:
      body([](V y) { return Math::gelu_tanh(y); });
      break;
    case Activation::kLeakyRelu:
      body([slope](V y) { return Math::leaky_relu(y, slope); });
      break;
  }
}
