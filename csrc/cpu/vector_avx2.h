// 8 fp32 lanes in AVX2 with FMA. Included by the source compiled for it, inside its own namespace.

struct Avx2 {
  using V = __m256;     // 8 fp32
  using Mask = __m256;  // all bits of a lane, or none
  static constexpr int kLanes = 8;

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float a) { return _mm256_set1_ps(a); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static V load_bf16(const uint16_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  // Round to nearest, ties to even; NaN stays NaN.
  static void store_bf16(uint16_t* p, V a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i chosen = _mm256_castps_si256(
        select(ordered(a), _mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet)));
    const __m256i halves = _mm256_srli_epi32(chosen, 16);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
  }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V sqrt(V a) { return _mm256_sqrt_ps(a); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  static V min(V a, V b) { return _mm256_min_ps(a, b); }  // b where either is NaN

  static Mask less(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Mask ordered(V a) { return _mm256_cmp_ps(a, a, _CMP_ORD_Q); }
  static Mask between(V a, V low, V high) {
    return _mm256_and_ps(_mm256_cmp_ps(a, low, _CMP_GE_OQ), _mm256_cmp_ps(a, high, _CMP_LE_OQ));
  }
  static Mask first_lanes(int n) {
    return _mm256_castsi256_ps(
        _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
  }
  static Mask mask_not(Mask a) {
    return _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(-1)));
  }
  static Mask mask_and(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static Mask mask_or(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static bool any(Mask a) { return _mm256_movemask_ps(a) != 0; }
  static V select(Mask m, V yes, V no) { return _mm256_blendv_ps(no, yes, m); }

  // The range in which 2^x is taken: its ends already round to 0 and overflow to inf.
  static V clamp_exponent(V x) { return min(set1(128.0f), max(set1(-126.0f), x)); }
  static V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V scale_by_power(V p, V n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static V abs(V x) { return _mm256_andnot_ps(set1(-0.0f), x); }
  static V copy_sign(V magnitude, V sign) {
    return _mm256_or_ps(_mm256_andnot_ps(set1(-0.0f), magnitude), _mm256_and_ps(set1(-0.0f), sign));
  }

  // dst[c][r] = src[r][c] for 8 x 8 words; strides in words.
  static void transpose(const uint32_t* src, ptrdiff_t src_stride, uint32_t* dst,
                        ptrdiff_t dst_stride) {
    V r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = load(reinterpret_cast<const float*>(src + i * src_stride));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(reinterpret_cast<float*>(dst + i * dst_stride),
            _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
      store(reinterpret_cast<float*>(dst + (4 + i) * dst_stride),
            _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
    }
  }
};
