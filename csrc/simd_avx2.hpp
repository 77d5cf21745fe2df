// AVX2 with FMA and F16C: sixteen floats are two registers. Included inside the kernels' own namespace.
struct V { __m256 a, b; };
struct I { __m256i a, b; };
struct Bytes { __m256i a, b; };  // 16 tokens x 4 bytes
constexpr int ACCUMULATORS = 4;
constexpr int BIAS8 = 0;  // 8-bit codes are multiplied as signed numbers: see dot8

#define LOKI_EACH(OP, X, Y) {OP(X.a, Y.a), OP(X.b, Y.b)}
inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
inline V load_part(const float* p, int n) {
    alignas(32) float room[16] = {};
    memcpy(room, p, sizeof(float) * static_cast<size_t>(n));
    return load(room);
}
inline void store_part(float* p, V v, int n) {
    alignas(32) float room[16];
    store(room, v);
    memcpy(p, room, sizeof(float) * static_cast<size_t>(n));
}
inline V add(V x, V y) { return LOKI_EACH(_mm256_add_ps, x, y); }
inline V sub(V x, V y) { return LOKI_EACH(_mm256_sub_ps, x, y); }
inline V mul(V x, V y) { return LOKI_EACH(_mm256_mul_ps, x, y); }
inline V div(V x, V y) { return LOKI_EACH(_mm256_div_ps, x, y); }
inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline V vmax(V x, V y) { return LOKI_EACH(_mm256_max_ps, x, y); }
inline V vmin(V x, V y) { return LOKI_EACH(_mm256_min_ps, x, y); }
inline V vabs(V x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline V round_even(V x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 power_of_2(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline V times_power_of_2(V x, V n) { return {_mm256_mul_ps(x.a, power_of_2(n.a)), _mm256_mul_ps(x.b, power_of_2(n.b))}; }
inline __m256 lanes(uint32_t bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each), each));
}
inline V pick(uint32_t bits, V x, V y) {
    return {_mm256_blendv_ps(y.a, x.a, lanes(bits)), _mm256_blendv_ps(y.b, x.b, lanes(bits >> 8))};
}
inline V if_less(V x, V y, V p, V q) {
    return {_mm256_blendv_ps(q.a, p.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(q.b, p.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
inline float sum(V v) {
    __m256 x = _mm256_add_ps(v.a, v.b);
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float largest(V v) {
    __m256 x = _mm256_max_ps(v.a, v.b);
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

inline __m256 widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline __m128i eight(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline V load_bf16(const uint16_t* p) { return {widen_bf16(eight(p)), widen_bf16(eight(p + 8))}; }
inline V load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(eight(p)), _mm256_cvtph_ps(eight(p + 8))}; }
inline V load_bf16_part(const uint16_t* p, int n) {
    uint16_t room[16] = {};
    memcpy(room, p, sizeof(uint16_t) * static_cast<size_t>(n));
    return load_bf16(room);
}
inline V load_f16_part(const uint16_t* p, int n) {
    uint16_t room[16] = {};
    memcpy(room, p, sizeof(uint16_t) * static_cast<size_t>(n));
    return load_f16(room);
}
inline void store_bf16(uint16_t* p, V v) {
    float room[16];
    store(room, v);
    for (int i = 0; i < 16; i++) p[i] = rounded_bf16(room[i]);
}
inline void store_f16(uint16_t* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}

inline I set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline V to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline void store_int(int32_t* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(v.a));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), _mm256_cvtps_epi32(v.b));
}
inline void store_short(int16_t* p, V v) {
    __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
}

inline Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
template <int SHIFT, int MASK>
inline Bytes bits_of(Bytes x) {
    __m256i mask = _mm256_set1_epi8(MASK);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, SHIFT), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, SHIFT), mask)};
}
// maddubs adds two products in 16 bits and saturates: 255 x 127 x 2 would not fit, so an 8-bit code is taken as a
// signed number of at most 127, its sign moved to the query's.
inline __m256i signed_dot(__m256i sum, __m256i biased, __m256i q) {
    __m256i x = _mm256_xor_si256(biased, _mm256_set1_epi8(-128));
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(q, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I dot8(I sum, Bytes x, int32_t q) {
    __m256i y = _mm256_set1_epi32(q);
    return {signed_dot(sum.a, x.a, y), signed_dot(sum.b, x.b, y)};
}
// 4 products of at most 15 x 127 fit in 16 bits.
inline __m256i small_dot(__m256i sum, __m256i x, __m256i p, __m256i y, __m256i q) {
    __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(x, p), _mm256_maddubs_epi16(y, q));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I dot_pair(I sum, Bytes x, int32_t p, Bytes y, int32_t q) {
    __m256i u = _mm256_set1_epi32(p), v = _mm256_set1_epi32(q);
    return {small_dot(sum.a, x.a, u, y.a, v), small_dot(sum.b, x.b, u, y.b, v)};
}

inline void sum_each(const V* x, float* out) {
    __m256 half[4];
    for (int i = 0; i < 4; i++) half[i] = _mm256_add_ps(x[i].a, x[i].b);
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

inline uint32_t one_bit_each(__m256i low, __m256i high) {
    __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}
inline __m256i sixteen(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline uint32_t above(const int16_t* p, int16_t t) {
    __m256i y = _mm256_set1_epi16(t);
    return one_bit_each(_mm256_cmpgt_epi16(sixteen(p), y), _mm256_cmpgt_epi16(sixteen(p + 16), y));
}
inline uint32_t equal(const int16_t* p, int16_t t) {
    __m256i y = _mm256_set1_epi16(t);
    return one_bit_each(_mm256_cmpeq_epi16(sixteen(p), y), _mm256_cmpeq_epi16(sixteen(p + 16), y));
}
#undef LOKI_EACH
#include "keep_scalar.hpp"
