// What merely reading costs: the honest roofline of a benchmark. Included inside the kernels' own namespace.
//
// Both probes read as attention does, but for the arithmetic: whole lines by the widest loads there are, several rows in
// flight, fetched ahead at an even pace. How far ahead is the caller's to try: the best distance is the machine's.
typedef uint64_t Line __attribute__((vector_size(64), aligned(1), may_alias));

inline uint64_t folded(const Line& lanes) {
    uint64_t all = 0;
    for (int i = 0; i < 8; i++) all ^= lanes[i];
    return all;
}

// XOR of all whole lines, each fetched `ahead` bytes before it is read.
uint64_t stream(const char* data, int64_t bytes, int64_t ahead) {
    Line a = {}, b = {}, c = {}, d = {};
    int64_t i = 0;
    for (; i + 256 <= bytes; i += 256) {
        const Line* at = reinterpret_cast<const Line*>(data + i);
        for (int64_t k = 0; k < 256; k += 64) prefetch(data + i + ahead + k);
        a ^= at[0];
        b ^= at[1];
        c ^= at[2];
        d ^= at[3];
    }
    for (; i + 64 <= bytes; i += 64) a ^= *reinterpret_cast<const Line*>(data + i);
    a ^= b ^ c ^ d;
    return folded(a);
}

// Rows slots[begin, end) of K or of V, four at a time, while those `ahead` tokens later are fetched.
LOKI_INLINE void read_rows(const char* data, int64_t stride, int64_t row_bytes, const int32_t* slots, int64_t begin,
                           int64_t end, int64_t ahead, int64_t last, Line sums[4]) {
    for (int64_t t = begin; t < end; t += 4) {
        const char *now[4], *next[4];
        for (int u = 0; u < 4; u++) {
            int64_t place = t + u < end ? t + u : end - 1, later = place + ahead < last ? place + ahead : last - 1;
            now[u] = data + slots[place] * stride;
            next[u] = data + slots[later] * stride;
        }
        const int rows = end - t < 4 ? static_cast<int>(end - t) : 4;
        for (int64_t i = 0; i + 64 <= row_bytes; i += 64) {
            for (int u = 0; u < 4; u++) prefetch_far(next[u] + i);
            if (rows == 4)
                for (int u = 0; u < 4; u++) sums[u] ^= *reinterpret_cast<const Line*>(now[u] + i);
            else
                for (int u = 0; u < rows; u++) sums[u] ^= *reinterpret_cast<const Line*>(now[u] + i);
        }
    }
}

// XOR of the whole lines of the rows of K and V that attention over these slots reads, tile by tile as it does.
uint64_t gather(const Step& step, int batch, int head, const int32_t* slots, int64_t begin, int64_t end, int64_t ahead) {
    const int64_t bytes = static_cast<int64_t>(step.dim) * element_bytes(step.keys.type);
    const char* keys = step.keys.data + batch * step.keys.batch + head * step.keys.head;
    const char* values = step.values.data + batch * step.values.batch + head * step.values.head;
    Line sums[4] = {};
    for (int64_t t = begin; t < end; t += TOKENS) {
        const int64_t stop = end - t < TOKENS ? end : t + TOKENS;
        read_rows(keys, step.keys.slot, bytes, slots, t, stop, ahead, end, sums);
        read_rows(values, step.values.slot, bytes, slots, t, stop, ahead, end, sums);
    }
    sums[0] ^= sums[1] ^ sums[2] ^ sums[3];
    return folded(sums[0]);
}
