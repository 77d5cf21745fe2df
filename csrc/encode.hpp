// Keys and queries into their low-rank codes: core.encoder in IEEE float32. Included inside the kernels' own namespace.

// N rows of x (dim numbers each) times a map (dim, padded), C x 16 columns at a time.
template <int N, int C>
inline void project_columns(const float* x, int stride, const float* map, int dim, int padded, float* out) {
    V total[N][C];
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) total[n][c] = zero();
    for (int d = 0; d < dim; d++) {
        V column[C];
        for (int c = 0; c < C; c++) column[c] = load(map + static_cast<int64_t>(d) * padded + 16 * c);
        for (int n = 0; n < N; n++) {
            V factor = set1(x[n * stride + d]);
            for (int c = 0; c < C; c++) total[n][c] = fma(factor, column[c], total[n][c]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) store(out + n * padded + 16 * c, total[n][c]);
}

template <int N>
inline void project_rows(const float* x, int stride, const float* map, int dim, int padded, int columns, float* out) {
    constexpr int C = N == 1 ? 4 : (ACCUMULATORS + N - 1) / N;
    int from = 0;
    for (; from + 16 * C <= columns; from += 16 * C) project_columns<N, C>(x, stride, map + from, dim, padded, out + from);
    for (; from < columns; from += 16) project_columns<N, 1>(x, stride, map + from, dim, padded, out + from);
}

// out (rows, padded) = x (rows, dim) map, the first `columns` of its columns (rounded up to 16).
inline void project(const float* x, int rows, int stride, const float* map, int dim, int padded, int columns, float* out) {
    int n = 0;
    for (; n + 4 <= rows; n += 4)
        project_rows<4>(x + n * stride, stride, map, dim, padded, columns, out + static_cast<int64_t>(n) * padded);
    for (; n < rows; n++)
        project_rows<1>(x + n * stride, stride, map, dim, padded, columns, out + static_cast<int64_t>(n) * padded);
}

// The row, less the mean where one is given, as float32.
inline void widen(Type type, const char* row, const float* mean, int dim, float* out) {
    for (int d = 0; d < dim; d += 16) {
        V x = piece(type, row, d, dim);
        int left = dim - d < 16 ? dim - d : 16;
        if (mean) x = sub(x, load_part(mean + d, left));
        store_part(out + d, x, left);
    }
}

// What quantising needs of each dim: clamp(round(x / step + shift), low, high) + bias is what is stored.
struct Levels {
    float shift[MAX_DIM], low[MAX_DIM], high[MAX_DIM], bias[MAX_DIM];
};

inline void fill_levels(const Planes& planes, int padded, Levels& levels) {
    const int end8 = 4 * planes.words8, end4 = end8 + 8 * planes.words4;
    for (int i = 0; i < padded; i++) {
        bool two = i >= end4;
        float most = i < end8 ? 127.0f : 7.0f;
        levels.shift[i] = two ? 1.5f : 0.0f;
        levels.low[i] = two ? 0.0f : -most;
        levels.high[i] = two ? 3.0f : most;
        levels.bias[i] = two ? 0.0f : most + 1.0f;
    }
}

inline void quantize(const float* encoded, const float* steps, const Levels& levels, int padded, int32_t* stored) {
    for (int i = 0; i < padded; i += 16) {
        V x = add(div(load(encoded + i), load(steps + i)), load(levels.shift + i));
        // The bound comes second: a key that is no number becomes the lowest code.
        x = round_even(vmin(vmax(x, load(levels.low + i)), load(levels.high + i)));
        store_int(stored + i, add(x, load(levels.bias + i)));
    }
}

// A token's bytes as core.planes packs them (but for the bias), its 4-byte words 64 bytes apart in the tile.
inline void pack(const int32_t* stored, const Planes& planes, uint8_t* lane) {
    for (int w = 0; w < planes.words8; w++, lane += 64, stored += 4)
        for (int i = 0; i < 4; i++) lane[i] = static_cast<uint8_t>(stored[i]);
    for (int w = 0; w < planes.words4; w++, lane += 64, stored += 8)
        for (int i = 0; i < 4; i++) lane[i] = static_cast<uint8_t>(stored[2 * i] | stored[2 * i + 1] << 4);
    for (int w = 0; w < planes.words2; w++, lane += 64, stored += 16)
        for (int i = 0; i < 4; i++) {
            const int32_t* u = stored + 4 * i;
            lane[i] = static_cast<uint8_t>(u[0] | u[1] << 2 | u[2] << 4 | u[3] << 6);
        }
}

void encode_keys(const KeyEncoding& work, int batch, int head, int64_t start, int64_t stop) {
    const Encoder& e = *work.encoder;
    const float* map = e.key_map + static_cast<int64_t>(head) * e.dim * e.padded;
    const char* keys = work.keys.data + batch * work.keys.batch + head * work.keys.head;
    uint8_t* packed = work.packed + batch * work.packed_batch + head * work.packed_head;
    Levels levels;
    fill_levels(e.planes, e.padded, levels);
    float centred[4 * MAX_DIM], encoded[4 * MAX_DIM];
    int32_t stored[MAX_DIM];
    for (int64_t slot = start; slot < stop; slot += 4) {
        int rows = static_cast<int>(stop - slot < 4 ? stop - slot : 4);
        for (int n = 0; n < rows; n++)
            widen(work.keys.type, keys + (slot + n) * work.keys.slot, e.mean + head * e.dim, e.dim, centred + n * e.dim);
        project(centred, rows, e.dim, map, e.dim, e.padded, e.padded, encoded);
        for (int n = 0; n < rows; n++) {
            quantize(encoded + n * e.padded, e.steps + head * e.padded, levels, e.padded, stored);
            int64_t tile = (slot + n) / TILE, lane = (slot + n) % TILE;
            pack(stored, e.planes, packed + tile * TILE * e.bytes_per_token + 4 * lane);
        }
    }
}

// Int8 codes of an encoded query at its maximum, the steps of the key dims folded in; returns one level's width.
inline float quantize_query(const float* encoded, const float* steps, int rank, int padded, int8_t* codes) {
    float folded[MAX_DIM];
    int32_t rounded[MAX_DIM];
    V most = zero();
    for (int i = 0; i < padded; i += 16) {
        V x = mul(load(encoded + i), load(steps + i));
        store(folded + i, x);
        most = vmax(vabs(x), most);
    }
    float step = largest(most) / 127.0f;
    bool usable = step > 0.0f && step < 1e30f;
    for (int i = 0; i < padded; i += 16) {
        V x = usable ? div(load(folded + i), set1(step)) : zero();
        store_int(rounded + i, vmin(vmax(x, set1(-127.0f)), set1(127.0f)));
    }
    for (int i = 0; i < rank; i++) codes[i] = static_cast<int8_t>(rounded[i]);
    return usable ? step : 0.0f;
}

void encode_query(const Step& step, int batch, int head, const Scratch& scratch) {
    const Encoder& e = *step.encoder;
    const int64_t row_bytes = static_cast<int64_t>(e.dim) * element_bytes(step.keys.type);
    const float *mean = e.mean + head * e.dim, *deviations = e.deviations + head * e.padded;
    for (int from = 0; from < step.group; from += 4) {
        float wide[4 * MAX_DIM];
        int rows = step.group - from < 4 ? step.group - from : 4;
        for (int n = 0; n < rows; n++) {
            int64_t row = (static_cast<int64_t>(batch) * step.kv_heads + head) * step.group + from + n;
            widen(step.keys.type, step.query + row * row_bytes, nullptr, e.dim, wide + n * e.dim);
            V product = zero();
            for (int d = 0; d < e.dim; d += 16) {
                int left = e.dim - d < 16 ? e.dim - d : 16;
                product = fma(load_part(wide + n * e.dim + d, left), load_part(mean + d, left), product);
            }
            scratch.offset[from + n] = step.scale * sum(product) + step.scale * step.scale * e.kappa[head];
        }
        project(wide, rows, e.dim, e.query_map + static_cast<int64_t>(head) * e.dim * e.padded, e.dim, e.padded, e.padded,
                scratch.encoded + from * e.padded);
    }
    for (int g = 0; g < step.group; g++) {
        const float* encoded = scratch.encoded + g * e.padded;
        V squares = zero();
        for (int i = 0; i < e.padded; i += 16) {
            V x = mul(load(encoded + i), load(deviations + i));
            squares = fma(x, x, squares);
        }
        scratch.deviation[g] = step.scale * sqrtf(sum(squares));
        scratch.step[g] =
            step.scale * quantize_query(encoded, e.steps + head * e.padded, e.rank, e.padded, scratch.codes + g * e.rank);
    }
}
