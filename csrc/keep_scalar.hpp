// Compaction bit by bit, for instruction sets that cannot compress a vector.
inline int keep_codes(int16_t* out, const int16_t* p, uint32_t mask) {
    int count = 0;
    for (; mask; mask &= mask - 1) out[count++] = p[__builtin_ctz(mask)];
    return count;
}
inline int keep_slots(int32_t* out, int32_t base, uint32_t mask) {
    int count = 0;
    for (; mask; mask &= mask - 1) out[count++] = base + __builtin_ctz(mask);
    return count;
}
