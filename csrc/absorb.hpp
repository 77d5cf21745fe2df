// The tail's sums: adds or takes away tokens, 64 at a time. Included inside the kernels' own namespace.
constexpr int BLOCK = 64;

// sums (rank, dim) += encoded (count, padded)^T values (count, width), N rows of the sums and C x 16 columns at a time.
template <int N, int C>
inline void add_outer(const float* encoded, int padded, const float* values, int width, int count, int dim, int row, int from,
                      float* sums) {
    V total[N][C];
    auto at = [&](int n, int c) { return sums + static_cast<int64_t>(row + n) * dim + from + 16 * c; };
    auto left = [&](int c) { return dim - from - 16 * c < 16 ? dim - from - 16 * c : 16; };
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) total[n][c] = load_part(at(n, c), left(c));
    for (int t = 0; t < count; t++) {
        V value[C];
        for (int c = 0; c < C; c++) value[c] = load(values + t * width + from + 16 * c);
        for (int n = 0; n < N; n++) {
            V weight = set1(encoded[t * padded + row + n]);
            for (int c = 0; c < C; c++) total[n][c] = fma(weight, value[c], total[n][c]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) store_part(at(n, c), total[n][c], left(c));
}

template <int N>
inline void add_rows(const float* encoded, int padded, const float* values, int width, int count, int dim, int row, float* sums) {
    constexpr int C = ACCUMULATORS / N < 4 ? ACCUMULATORS / N : 4;
    int from = 0;
    for (; from + 16 * C <= dim; from += 16 * C)
        add_outer<N, C>(encoded, padded, values, width, count, dim, row, from, sums);
    for (; from < dim; from += 16) add_outer<N, 1>(encoded, padded, values, width, count, dim, row, from, sums);
}

inline void add_columns(const float* rows, int apart, const float* weights, int count, int columns, float* sums) {
    for (int d = 0; d < columns; d += 16) {
        int left = columns - d < 16 ? columns - d : 16;
        V total = load_part(sums + d, left);
        for (int t = 0; t < count; t++) total = fma(load(rows + t * apart + d), set1(weights[t]), total);
        store_part(sums + d, total, left);
    }
}

// scratch: BLOCK x (dim + 2 padded) floats, every row rounded up to 16.
void absorb(const Absorption& work, int batch, int head, float* scratch) {
    const int dim = work.dim, width = static_cast<int>(up(dim, 16));
    const Encoder* e = work.encoder;
    const int rank = e ? e->tail_rank : 0, padded = e ? e->padded : 0;
    const int64_t item = static_cast<int64_t>(batch) * work.heads + head;
    const char* keys = work.keys.data + batch * work.keys.batch + head * work.keys.head;
    const char* values = work.values.data + batch * work.values.batch + head * work.values.head;
    const int8_t* sign = work.sign + batch * work.slots;
    float *wide = scratch, *centred = wide + BLOCK * width, *encoded = centred + BLOCK * width;
    float* products = work.sum_products + item * rank * dim;
    float weights[BLOCK];
    for (int64_t slot = 0; slot < work.slots;) {
        int count = 0;
        for (; slot < work.slots && count < BLOCK; slot++) {
            if (!sign[slot]) continue;
            weights[count] = sign[slot] > 0 ? 1.0f : -1.0f;
            for (int d = 0; d < dim; d += 16)
                store(wide + count * width + d, piece(work.values.type, values + slot * work.values.slot, d, dim));
            if (rank)
                widen(work.keys.type, keys + slot * work.keys.slot, e->mean + head * dim, dim, centred + count * width);
            count++;
        }
        add_columns(wide, width, weights, count, dim, work.sum_values + item * dim);
        if (!rank) continue;
        project(centred, count, width, e->key_map + static_cast<int64_t>(head) * dim * padded, dim, padded,
                static_cast<int>(up(rank, 16)), encoded);
        add_columns(encoded, padded, weights, count, rank, work.sum_encoded + item * rank);
        for (int t = 0; t < count; t++)
            if (weights[t] < 0.0f)
                for (int r = 0; r < rank; r++) encoded[t * padded + r] = -encoded[t * padded + r];
        int row = 0;
        for (; row + 4 <= rank; row += 4) add_rows<4>(encoded, padded, wide, width, count, dim, row, products);
        for (; row < rank; row++) add_rows<1>(encoded, padded, wide, width, count, dim, row, products);
    }
}
