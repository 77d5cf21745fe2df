// Plain C++: sixteen numbers are an array that the compiler may vectorise. Included inside the kernels' own namespace.
struct V { float x[16]; };
struct I { int32_t x[16]; };
struct Bytes { uint8_t x[64]; };  // 16 tokens x 4 bytes
constexpr int ACCUMULATORS = 4;
constexpr int BIAS8 = 128;

#define LOKI_EACH(EXPRESSION)                             \
    V r;                                                  \
    for (int i = 0; i < 16; i++) r.x[i] = (EXPRESSION);   \
    return r
inline V set1(float a) { LOKI_EACH(a); }
inline V zero() { return set1(0.0f); }
inline V load(const float* p) { LOKI_EACH(p[i]); }
inline V load_part(const float* p, int n) { LOKI_EACH(i < n ? p[i] : 0.0f); }
inline V add(V a, V b) { LOKI_EACH(a.x[i] + b.x[i]); }
inline V sub(V a, V b) { LOKI_EACH(a.x[i] - b.x[i]); }
inline V mul(V a, V b) { LOKI_EACH(a.x[i] * b.x[i]); }
inline V div(V a, V b) { LOKI_EACH(a.x[i] / b.x[i]); }
inline V fma(V a, V b, V c) { LOKI_EACH(a.x[i] * b.x[i] + c.x[i]); }
// As the x86 instructions: where one operand is no number, the second is the result.
inline V vmax(V a, V b) { LOKI_EACH(a.x[i] > b.x[i] ? a.x[i] : b.x[i]); }
inline V vmin(V a, V b) { LOKI_EACH(a.x[i] < b.x[i] ? a.x[i] : b.x[i]); }
inline V vabs(V a) { LOKI_EACH(a.x[i] < 0.0f ? -a.x[i] : a.x[i]); }
// Adding 3 x 2^22 leaves no bits for a fraction, so the sum rounds half to even. For sizes under 2^22.
inline float round_even(float a) { return (a + 12582912.0f) - 12582912.0f; }
inline V round_even(V a) { LOKI_EACH(round_even(a.x[i])); }
inline V pick(uint32_t bits, V a, V b) { LOKI_EACH(bits >> i & 1 ? a.x[i] : b.x[i]); }
inline V if_less(V x, V y, V a, V b) { LOKI_EACH(x.x[i] < y.x[i] ? a.x[i] : b.x[i]); }
inline V to_float(I a) { LOKI_EACH(static_cast<float>(a.x[i])); }
inline V load_bf16(const uint16_t* p) { LOKI_EACH(float_of_bf16(p[i])); }
inline V load_bf16_part(const uint16_t* p, int n) { LOKI_EACH(i < n ? float_of_bf16(p[i]) : 0.0f); }
inline V load_f16(const uint16_t* p) { LOKI_EACH(float_of_f16(p[i])); }
inline V load_f16_part(const uint16_t* p, int n) { LOKI_EACH(i < n ? float_of_f16(p[i]) : 0.0f); }
inline V times_power_of_2(V a, V n) {
    LOKI_EACH(a.x[i] * float_of_bits(static_cast<uint32_t>(static_cast<int32_t>(n.x[i]) + 127) << 23));
}
#undef LOKI_EACH

inline void store(float* p, V a) {
    for (int i = 0; i < 16; i++) p[i] = a.x[i];
}
inline void store_part(float* p, V a, int n) {
    for (int i = 0; i < n; i++) p[i] = a.x[i];
}
inline void store_bf16(uint16_t* p, V a) {
    for (int i = 0; i < 16; i++) p[i] = rounded_bf16(a.x[i]);
}
inline void store_f16(uint16_t* p, V a) {
    for (int i = 0; i < 16; i++) p[i] = rounded_f16(a.x[i]);
}
inline void store_int(int32_t* p, V a) {
    for (int i = 0; i < 16; i++) p[i] = static_cast<int32_t>(round_even(a.x[i]));
}
inline void store_short(int16_t* p, V a) {
    for (int i = 0; i < 16; i++) p[i] = static_cast<int16_t>(round_even(a.x[i]));
}
inline float sum(V a) {
    float total = 0.0f;
    for (int i = 0; i < 16; i++) total += a.x[i];
    return total;
}
inline float largest(V a) {
    float most = a.x[0];
    for (int i = 1; i < 16; i++) most = a.x[i] > most ? a.x[i] : most;
    return most;
}
inline void sum_each(const V* a, float* out) {
    for (int i = 0; i < ACCUMULATORS; i++) out[i] = sum(a[i]);
}

inline I set1(int32_t a) {
    I r;
    for (int i = 0; i < 16; i++) r.x[i] = a;
    return r;
}
inline Bytes load_bytes(const uint8_t* p) {
    Bytes r;
    memcpy(r.x, p, sizeof r.x);
    return r;
}
template <int SHIFT, int MASK>
inline Bytes bits_of(Bytes a) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.x[i] = static_cast<uint8_t>(a.x[i] >> SHIFT & MASK);
    return r;
}
inline int byte_of(int32_t quad, int i) { return static_cast<int8_t>(static_cast<uint32_t>(quad) >> 8 * i & 255); }
inline I dot8(I sum, Bytes a, int32_t q) {
    const int p[4] = {byte_of(q, 0), byte_of(q, 1), byte_of(q, 2), byte_of(q, 3)};
    for (int i = 0; i < 16; i++)
        sum.x[i] += a.x[4 * i] * p[0] + a.x[4 * i + 1] * p[1] + a.x[4 * i + 2] * p[2] + a.x[4 * i + 3] * p[3];
    return sum;
}
inline I dot_pair(I sum, Bytes a, int32_t p, Bytes b, int32_t q) { return dot8(dot8(sum, a, p), b, q); }

inline uint32_t above(const int16_t* p, int16_t t) {
    uint32_t mask = 0;
    for (int i = 0; i < 32; i++) mask |= static_cast<uint32_t>(p[i] > t) << i;
    return mask;
}
inline uint32_t equal(const int16_t* p, int16_t t) {
    uint32_t mask = 0;
    for (int i = 0; i < 32; i++) mask |= static_cast<uint32_t>(p[i] == t) << i;
    return mask;
}
#include "keep_scalar.hpp"
