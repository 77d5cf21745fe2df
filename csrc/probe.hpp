// What merely reading costs: the honest roofline of a benchmark. Included inside the kernels' own namespace.

// Running XOR of lines of 64 bytes.
struct Lines {
    uint64_t lanes[8] = {};

    LOKI_INLINE void read(const char* data, int64_t bytes) {
        for (int64_t i = 0; i + 64 <= bytes; i += 64) {
            uint64_t line[8];
            memcpy(line, data + i, sizeof line);
            for (int k = 0; k < 8; k++) lanes[k] ^= line[k];
        }
    }

    uint64_t all() const {
        uint64_t x = 0;
        for (uint64_t lane : lanes) x ^= lane;
        return x;
    }
};

// Reads all whole lines, fetched ahead as well as a loop can.
uint64_t stream(const char* data, int64_t bytes) {
    Lines lines;
    for (int64_t i = 0; i + 64 <= bytes; i += 64) {
        prefetch(data + i + 4096);
        lines.read(data + i, 64);
    }
    return lines.all();
}

// Reads the rows of K and V that attention over these slots reads, in its order.
uint64_t gather(const Step& step, int batch, int head, const int32_t* slots, int64_t count) {
    const int64_t bytes = static_cast<int64_t>(step.dim) * element_bytes(step.keys.type), ahead = 64;
    const char* keys = step.keys.data + batch * step.keys.batch + head * step.keys.head;
    const char* values = step.values.data + batch * step.values.batch + head * step.values.head;
    Lines lines;
    for (int64_t t = 0; t < count; t++) {
        if (t + ahead < count)
            for (int64_t i = 0; i < bytes; i += 64) {
                prefetch_far(keys + slots[t + ahead] * step.keys.slot + i);
                prefetch_far(values + slots[t + ahead] * step.values.slot + i);
            }
        lines.read(keys + slots[t] * step.keys.slot, bytes);
        lines.read(values + slots[t] * step.values.slot, bytes);
    }
    return lines.all();
}
