// AVX-512 with VNNI, BF16 and VBMI2: sixteen floats are one register. Included inside the kernels' own namespace.
struct V { __m512 x; };
struct I { __m512i x; };
struct Bytes { __m512i x; };  // 16 tokens x 4 bytes
constexpr int ACCUMULATORS = 16;
constexpr int BIAS8 = 128;  // what an 8-bit code has added as the dot product sees it

inline V zero() { return {_mm512_setzero_ps()}; }
inline V set1(float a) { return {_mm512_set1_ps(a)}; }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a.x); }
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline V load_part(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store_part(float* p, V a, int n) { _mm512_mask_storeu_ps(p, first(n), a.x); }
inline V add(V a, V b) { return {_mm512_add_ps(a.x, b.x)}; }
inline V sub(V a, V b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline V mul(V a, V b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline V div(V a, V b) { return {_mm512_div_ps(a.x, b.x)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
inline V vmax(V a, V b) { return {_mm512_max_ps(a.x, b.x)}; }
inline V vmin(V a, V b) { return {_mm512_min_ps(a.x, b.x)}; }
inline V vabs(V a) { return {_mm512_abs_ps(a.x)}; }
inline V round_even(V a) { return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V times_power_of_2(V a, V n) { return {_mm512_scalef_ps(a.x, n.x)}; }
inline V pick(uint32_t bits, V a, V b) { return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), b.x, a.x)}; }
inline V if_less(V x, V y, V a, V b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.x, y.x, _CMP_LT_OQ), b.x, a.x)};
}
inline float sum(V a) { return _mm512_reduce_add_ps(a.x); }
inline float largest(V a) { return _mm512_reduce_max_ps(a.x); }

inline __m512 widen_bf16(__m256i a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
}
inline V load_bf16(const uint16_t* p) { return {widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline V load_bf16_part(const uint16_t* p, int n) { return {widen_bf16(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline V load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline V load_f16_part(const uint16_t* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline void store_bf16(uint16_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.x)));
}
inline void store_f16(uint16_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT));
}

inline I set1(int32_t a) { return {_mm512_set1_epi32(a)}; }
inline V to_float(I a) { return {_mm512_cvtepi32_ps(a.x)}; }
inline void store_int(int32_t* p, V a) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(a.x)); }
inline void store_short(int16_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a.x)));
}

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
template <int SHIFT, int MASK>
inline Bytes bits_of(Bytes a) {
    return {_mm512_and_si512(_mm512_srli_epi16(a.x, SHIFT), _mm512_set1_epi8(MASK))};
}
// In assembly because GCC copies every accumulator around the intrinsic in a loop, a third of the scan's instructions.
inline I dot8(I sum, Bytes a, int32_t q) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum.x) : "v"(a.x), "v"(_mm512_set1_epi32(q)));
    return sum;
}
inline I dot_pair(I sum, Bytes a, int32_t p, Bytes b, int32_t q) { return dot8(dot8(sum, a, p), b, q); }

// 16 vectors into one vector of their sums, in 45 operations instead of 16 horizontal sums.
inline void sum_each(const V* a, float* out) {
    __m512 b[8], c[4];
    for (int i = 0; i < 8; i++)
        b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].x, a[2 * i + 1].x),
                             _mm512_unpackhi_ps(a[2 * i].x, a[2 * i + 1].x));
    for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
        c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    __m512 d[2];
    for (int i = 0; i < 2; i++)
        d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88),
                                        _mm512_shuffle_f32x4(d[0], d[1], 0xdd)));
}

// Of 32 codes, those above and at a threshold; and stores of the chosen ones, which may write 32 entries past the last.
inline uint32_t above(const int16_t* p, int16_t t) {
    return _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(p), _mm512_set1_epi16(t));
}
inline uint32_t equal(const int16_t* p, int16_t t) {
    return _mm512_cmpeq_epi16_mask(_mm512_loadu_si512(p), _mm512_set1_epi16(t));
}
inline int keep_codes(int16_t* out, const int16_t* p, uint32_t mask) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(mask, _mm512_loadu_si512(p)));
    return __builtin_popcount(mask);
}
inline int keep_slots(int32_t* out, int32_t base, uint32_t mask) {
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i low = _mm512_add_epi32(order, _mm512_set1_epi32(base));
    int count = __builtin_popcount(mask & 0xffff);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), low));
    __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(16));
    _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask >> 16), high));
    return count + __builtin_popcount(mask >> 16);
}
