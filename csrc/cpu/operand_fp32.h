// Operands of one fp32 a word, for instruction sets without bf16 products: activations stay fp32
// throughout.

template <class Vector>
struct Fp32Operand : Vector {
  using V = typename Vector::V;
  using Element = float;
  static constexpr int kPair = 1;

  static V load_operand(const uint32_t* p) {
    return Vector::load(reinterpret_cast<const float*>(p));
  }
  static V broadcast_operand(const uint32_t* p) {
    return Vector::set1(*reinterpret_cast<const float*>(p));
  }
  static V dot(V c, V a, V b) { return Vector::fma(a, b, c); }

  // Two rows of the K dimension.
  static void store_pair(uint32_t* p, V first, V second) {
    Vector::store(reinterpret_cast<float*>(p), first);
    Vector::store(reinterpret_cast<float*>(p) + Vector::kLanes, second);
  }
  static void load_pair(const uint32_t* p, V& first, V& second) {
    first = Vector::load(reinterpret_cast<const float*>(p));
    second = Vector::load(reinterpret_cast<const float*>(p) + Vector::kLanes);
  }
  static inline V exp2_for_operand(V x) { return VectorMath<Fp32Operand>::exp2_fine(x); }

  static void elements_from_fp32(const float* src, int64_t n, float* dst) {
    __builtin_memcpy(dst, src, static_cast<size_t>(n) * 4);
  }
  static void elements_from_bf16(const uint16_t* src, int64_t n, float* dst) {
    for (int64_t i = 0; i < n; ++i) dst[i] = widen_bf16(src[i]);
  }
  static void bf16_from_fp32(const float* src, int64_t n, uint16_t* dst) {
    for (int64_t i = 0; i < n; ++i) dst[i] = round_to_bf16(src[i]);
  }
};
