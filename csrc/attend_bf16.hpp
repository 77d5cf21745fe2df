// Attention over bfloat16 rows by dot products of pairs: two dims of a key, two tokens of V. AVX-512 BF16 alone.
//
// V's rows are interleaved two by two with one unpack each way, so that a pair of weights multiplies a pair of tokens:
// half the operations of widening. The unpack works in 128-bit lanes, so sums are kept in its order until the end.
struct Pairwise {
    static constexpr bool PAIRS = true;

    static __m512bh pairs_of(__m512i x) { return reinterpret_cast<__m512bh>(x); }
    static __m512i raw(const char* p) { return _mm512_loadu_si512(p); }

    // 32 elements of a row from `from` on; zero beyond its end, which is not read.
    template <bool WHOLE>
    static __m512i piece(const char* row, int from, int dim) {
        if (WHOLE || from + 32 <= dim) return raw(row + 2 * from);
        return _mm512_maskz_loadu_epi16((1u << (dim - from)) - 1, row + 2 * from);
    }

    static void copy_query(const char* query, int group, int dim, int width, float* out) {
        char* to = reinterpret_cast<char*>(out);
        memset(to, 0, static_cast<size_t>(group) * static_cast<size_t>(width) * 2);
        for (int g = 0; g < group; g++) memcpy(to + 2 * g * width, query + 2 * g * dim, static_cast<size_t>(dim) * 2);
    }

    template <int N, bool WHOLE>
    static void score_heads(const char* query, int dim, int width, const TileRows& rows, const TileRows& next, bool fetch,
                            float* scores) {
        constexpr int U = ACCUMULATORS / N;
        for (int t = 0; t < rows.count; t += U) {
            __m512 total[N * U];
            for (int i = 0; i < N * U; i++) total[i] = _mm512_setzero_ps();
            for (int d = 0; d < dim; d += 32) {
                __m512bh key[U];
                for (int u = 0; u < U; u++) key[u] = pairs_of(piece<WHOLE>(rows.keys[t + u], d, dim));
                if (fetch)
                    for (int u = 0; u < U; u++) prefetch_far(next.keys[t + u] + 2 * d);
                for (int n = 0; n < N; n++) {
                    __m512bh q = pairs_of(raw(query + 2 * (n * width + d)));
                    for (int u = 0; u < U; u++) total[n * U + u] = _mm512_dpbf16_ps(total[n * U + u], q, key[u]);
                }
            }
            V sums[N * U];
            for (int i = 0; i < N * U; i++) sums[i] = {total[i]};
            alignas(64) float out[N * U];
            sum_each(sums, out);
            for (int n = 0; n < N; n++)
                for (int u = 0; u < U; u++) scores[n * TOKENS + t + u] = out[n * U + u];
        }
    }

    // C x 32 dims of the weighted sum, for N heads.
    template <int N, int C, bool WHOLE>
    static void weigh_columns(const uint16_t* weights, int from, int dim, int width, const TileRows& rows,
                              const TileRows& next, bool fetch, float* values) {
        __m512 total[N][2 * C];
        for (int n = 0; n < N; n++)
            for (int c = 0; c < 2 * C; c++) total[n][c] = _mm512_loadu_ps(values + n * width + from + 16 * c);
        for (int t = 0; t < rows.count; t += 2) {
            if (fetch)
                for (int u = 0; u < 2; u++)
                    for (int c = 0; c < C; c++) prefetch_far(next.values[t + u] + 2 * (from + 32 * c));
            __m512bh value[2 * C];
            for (int c = 0; c < C; c++) {
                __m512i x = piece<WHOLE>(rows.values[t], from + 32 * c, dim);
                __m512i y = piece<WHOLE>(rows.values[t + 1], from + 32 * c, dim);
                value[2 * c] = pairs_of(_mm512_unpacklo_epi16(x, y));
                value[2 * c + 1] = pairs_of(_mm512_unpackhi_epi16(x, y));
            }
            for (int n = 0; n < N; n++) {
                int32_t both;
                memcpy(&both, weights + n * TOKENS + t, sizeof both);
                __m512bh weight = pairs_of(_mm512_set1_epi32(both));
                for (int c = 0; c < 2 * C; c++) total[n][c] = _mm512_dpbf16_ps(total[n][c], weight, value[c]);
            }
        }
        for (int n = 0; n < N; n++)
            for (int c = 0; c < 2 * C; c++) _mm512_storeu_ps(values + n * width + from + 16 * c, total[n][c]);
    }

    template <int N>
    static void score_some(const char* query, int dim, int width, const TileRows& rows, const TileRows& next, bool fetch,
                           float* scores) {
        if (dim % 32 == 0) score_heads<N, true>(query, dim, width, rows, next, fetch, scores);
        else score_heads<N, false>(query, dim, width, rows, next, fetch, scores);
    }

    template <int N>
    static void weigh_some(const uint16_t* weights, int dim, int width, const TileRows& rows, const TileRows& next,
                           bool fetch, float* values) {
        int from = 0;
        for (; from + 64 <= dim; from += 64) weigh_columns<N, 2, true>(weights, from, dim, width, rows, next, fetch, values);
        for (; from < dim; from += 32) weigh_columns<N, 1, false>(weights, from, dim, width, rows, next, fetch, values);
    }

    static void score(int group, const float* query, int dim, int width, const TileRows& rows, const TileRows& next,
                      float* scores) {
        const char* q = reinterpret_cast<const char*>(query);
        int h = 0;
        for (; h + 4 <= group; h += 4)
            score_some<4>(q + 2 * h * width, dim, width, rows, next, h == 0, scores + h * TOKENS);
        for (; h + 2 <= group; h += 2)
            score_some<2>(q + 2 * h * width, dim, width, rows, next, h == 0, scores + h * TOKENS);
        for (; h < group; h++) score_some<1>(q + 2 * h * width, dim, width, rows, next, h == 0, scores + h * TOKENS);
    }

    static void weigh(int group, const float*, const uint16_t* weights, int dim, int width, const TileRows& rows,
                      const TileRows& next, float* values) {
        int h = 0;
        for (; h + 4 <= group; h += 4)
            weigh_some<4>(weights + h * TOKENS, dim, width, rows, next, h == 0, values + h * width);
        for (; h + 2 <= group; h += 2)
            weigh_some<2>(weights + h * TOKENS, dim, width, rows, next, h == 0, values + h * width);
        for (; h < group; h++) weigh_some<1>(weights + h * TOKENS, dim, width, rows, next, h == 0, values + h * width);
    }

    // Of each 32 dims the low unpack holds 0-3, 8-11, 16-19 and 24-27, the high one the rest.
    static void restore_order(int group, int width, float* values) {
        for (int64_t i = 0; i < static_cast<int64_t>(group) * width; i += 32) {
            float mixed[32];
            memcpy(mixed, values + i, sizeof mixed);
            for (int lane = 0; lane < 4; lane++)
                for (int half = 0; half < 2; half++)
                    memcpy(values + i + 8 * lane + 4 * half, mixed + 16 * half + 4 * lane, 4 * sizeof(float));
        }
    }
};
