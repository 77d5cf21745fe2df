// Conversions of single numbers, bit by bit. Included inside the kernels' own namespace.
inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float float_of_bf16(uint16_t half) { return float_of_bits(static_cast<uint32_t>(half) << 16); }
inline uint16_t rounded_bf16(float value) {
    uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline float float_of_f16(uint16_t half) {
    uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // Below 2^-14 a half is a whole number of 2^-24.
    if (rest < 0x400u) return (sign ? -1.0f : 1.0f) * static_cast<float>(rest) * 0x1p-24f;
    return float_of_bits(sign | ((rest << 13) + 0x38000000u));
}
inline uint16_t rounded_f16(float value) {
    uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (rest < 0x38800000u) return static_cast<uint16_t>(sign | static_cast<uint32_t>(rintf(float_of_bits(rest) * 0x1p24f)));
    return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13));
}
