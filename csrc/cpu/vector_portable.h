// fp32 lanes in the compiler's generic vectors: any processor. Included by each source that uses
// it, inside its own namespace.

template <class T, int kCount>
struct GenericVector {
  typedef T Type __attribute__((vector_size(kCount * sizeof(T))));
};

template <int kCount>
struct Portable {
  using V = typename GenericVector<float, kCount>::Type;
  using Mask = typename GenericVector<int32_t, kCount>::Type;  // all bits of a lane, or none
  static constexpr int kLanes = kCount;

  static V zero() { return V{}; }
  static V set1(float a) { return V{} + a; }
  static V load(const float* p) {
    V a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  static void store(float* p, V a) { __builtin_memcpy(p, &a, sizeof a); }
  static V load_bf16(const uint16_t* p) {
    V a;
    for (int i = 0; i < kLanes; ++i) a[i] = widen_bf16(p[i]);
    return a;
  }
  static void store_bf16(uint16_t* p, V a) {
    for (int i = 0; i < kLanes; ++i) p[i] = round_to_bf16(a[i]);
  }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V sqrt(V a) {
    for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
  }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }  // b where either is NaN
  static V min(V a, V b) { return a < b ? a : b; }  // b where either is NaN

  static Mask less(V a, V b) { return a < b; }
  static Mask ordered(V a) { return a == a; }
  static Mask between(V a, V low, V high) { return (a >= low) & (a <= high); }
  static Mask first_lanes(int n) {
    Mask m;
    for (int i = 0; i < kLanes; ++i) m[i] = i < n ? -1 : 0;
    return m;
  }
  static Mask mask_not(Mask a) { return ~a; }
  static Mask mask_and(Mask a, Mask b) { return a & b; }
  static Mask mask_or(Mask a, Mask b) { return a | b; }
  static bool any(Mask a) {
    int32_t all = 0;
    for (int i = 0; i < kLanes; ++i) all |= a[i];
    return all != 0;
  }
  static V select(Mask m, V yes, V no) { return m ? yes : no; }

  // The range in which 2^x is taken: its ends already round to 0 and overflow to inf. NaN becomes
  // inf, which the check of the row sum notices as well; it must not reach the conversion to an
  // integer.
  static V clamp_exponent(V x) { return max(min(x, set1(128.0f)), set1(-126.0f)); }
  // Adding 1.5 * 2^23 leaves no fraction bits; |x| <= 2^22.
  static V round(V x) { return (x + 12582912.0f) - 12582912.0f; }
  static V scale_by_power(V p, V n) {
    const Mask exponent = (__builtin_convertvector(n, Mask) + 127) << 23;
    V power;
    __builtin_memcpy(&power, &exponent, sizeof power);
    return p * power;
  }
  static V abs(V x) { return x < 0.0f ? -x : x; }
  static V copy_sign(V magnitude, V sign) { return sign < 0.0f ? -magnitude : magnitude; }

  static void transpose(const uint32_t* src, ptrdiff_t src_stride, uint32_t* dst,
                        ptrdiff_t dst_stride) {
    for (int r = 0; r < kLanes; ++r) {
      for (int c = 0; c < kLanes; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
    }
  }
};
