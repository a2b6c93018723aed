// 16 fp32 lanes in AVX-512. Included by the sources compiled for it, inside their own namespace.

struct Avx512 {
  using V = __m512;   // 16 fp32
  using W = __m512i;  // 16 words of 32 bits: one row of an operand
  using Mask = __mmask16;
  static constexpr int kLanes = 16;

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float a) { return _mm512_set1_ps(a); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static V load_bf16(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  // Round to nearest, ties to even; NaN stays NaN.
  static void store_bf16(uint16_t* p, V a) {
    const W bits = _mm512_castps_si512(a);
    const W odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const W rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));  // to even
    const W quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const W chosen = _mm512_mask_blend_epi32(ordered(a), quiet, rounded);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
  }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V sqrt(V a) { return _mm512_sqrt_ps(a); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static V min(V a, V b) { return _mm512_min_ps(a, b); }

  static Mask less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask ordered(V a) { return _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q); }
  static Mask between(V a, V low, V high) {
    return static_cast<Mask>(_mm512_cmp_ps_mask(a, low, _CMP_GE_OQ) &
                             _mm512_cmp_ps_mask(a, high, _CMP_LE_OQ));
  }
  static Mask first_lanes(int n) { return static_cast<Mask>(n >= 16 ? 0xffff : (1u << n) - 1); }
  static Mask mask_not(Mask a) { return static_cast<Mask>(~a); }
  static Mask mask_and(Mask a, Mask b) { return static_cast<Mask>(a & b); }
  static Mask mask_or(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static bool any(Mask a) { return a != 0; }
  static V select(Mask m, V yes, V no) { return _mm512_mask_blend_ps(m, no, yes); }

  static V clamp_exponent(V x) { return x; }  // scale_by_power takes any exponent
  static V round(V x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static V scale_by_power(V p, V n) { return _mm512_scalef_ps(p, n); }
  static V abs(V x) { return _mm512_abs_ps(x); }
  static V copy_sign(V magnitude, V sign) {
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_castps_si512(magnitude), _mm512_castps_si512(sign),
                                  _mm512_set1_epi32(static_cast<int>(0x80000000u)), 0xd8));
  }

  static W load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store_words(uint32_t* p, W w) { _mm512_storeu_si512(p, w); }

  // dst[c][r] = src[r][c] for 16 x 16 words; strides in words.
  static void transpose(const uint32_t* src, ptrdiff_t src_stride, uint32_t* dst,
                        ptrdiff_t dst_stride) {
    W r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = load_words(src + i * src_stride);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
      t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
      t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
      t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store_words(dst + (i)*dst_stride, _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
      store_words(dst + (8 + i) * dst_stride, _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
      store_words(dst + (4 + i) * dst_stride, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
      store_words(dst + (12 + i) * dst_stride, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
    }
  }
};
