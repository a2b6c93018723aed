// Operands of two bf16 a word over AVX-512 vectors; needs AVX512-BF16 for the conversions and the
// product.

struct Bf16Avx512 : Avx512 {
  using Element = uint16_t;
  static constexpr int kPair = 2;

  static W load_operand(const uint32_t* p) { return load_words(p); }
  static W broadcast_operand(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static V dot(V c, W a, W b) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  // Rounds two rows of the K dimension to bf16 and interleaves them into one row of words.
  static void store_pair(uint32_t* p, V first, V second) {
    const W interleave =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const W halves = reinterpret_cast<W>(_mm512_cvtne2ps_pbh(second, first));
    store_words(p, _mm512_permutexvar_epi16(interleave, halves));
  }
  static void load_pair(const uint32_t* p, V& first, V& second) {
    const W w = load_words(p);
    first = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    second =
        _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // The result is rounded to bf16, which costs up to 4e-3: the coarse polynomial's 7.5e-5 is not
  // seen.
  static inline V exp2_for_operand(V x) { return VectorMath<Bf16Avx512>::exp2_coarse(x); }

  static void store_bf16(uint16_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
  }
  static void bf16_from_fp32(const float* src, int64_t n, uint16_t* dst) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store_bf16(dst + i, load(src + i));
    for (; i < n; ++i) dst[i] = round_to_bf16(src[i]);
  }
  static void elements_from_fp32(const float* src, int64_t n, uint16_t* dst) {
    bf16_from_fp32(src, n, dst);
  }
  static void elements_from_bf16(const uint16_t* src, int64_t n, uint16_t* dst) {
    __builtin_memcpy(dst, src, static_cast<size_t>(n) * 2);
  }
};
