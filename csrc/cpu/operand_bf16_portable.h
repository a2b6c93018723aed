// Operands of two bf16 a word over generic vectors: what the emulated tiles read.

template <class Vector>
struct Bf16Portable : Vector {
  using V = typename Vector::V;
  using Element = uint16_t;
  static constexpr int kPair = 2;

  static void store_pair(uint32_t* p, V first, V second) {
    for (int i = 0; i < Vector::kLanes; ++i) {
      p[i] = round_to_bf16(first[i]) | static_cast<uint32_t>(round_to_bf16(second[i])) << 16;
    }
  }
  static void load_pair(const uint32_t* p, V& first, V& second) {
    for (int i = 0; i < Vector::kLanes; ++i) {
      first[i] = widen_bf16(static_cast<uint16_t>(p[i] & 0xffff));
      second[i] = widen_bf16(static_cast<uint16_t>(p[i] >> 16));
    }
  }
  static inline V exp2_for_operand(V x) { return VectorMath<Bf16Portable>::exp2_coarse(x); }

  static void bf16_from_fp32(const float* src, int64_t n, uint16_t* dst) {
    for (int64_t i = 0; i < n; ++i) dst[i] = round_to_bf16(src[i]);
  }
  static void elements_from_fp32(const float* src, int64_t n, uint16_t* dst) {
    bf16_from_fp32(src, n, dst);
  }
  static void elements_from_bf16(const uint16_t* src, int64_t n, uint16_t* dst) {
    __builtin_memcpy(dst, src, static_cast<size_t>(n) * 2);
  }
};
