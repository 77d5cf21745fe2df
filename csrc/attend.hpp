// Softmax attention over rows of K and V in tiles of tokens, online. Included inside the kernels' own namespace.
constexpr int TOKENS = 32;  // of one tile
// Tiles between the one that is computed and the one that is fetched, into L2: rows that wait in L1 for two tiles drive
// each other out, and more of them can be under way to L2.
constexpr int AHEAD = 2;

// The rows of a tile of tokens.
struct TileRows {
    const char* keys[TOKENS];
    const char* values[TOKENS];
    int count;
};

// Where an attended token's rows lie, and what is fetched while this range computes.
struct Range {
    const char *keys, *values;
    int64_t key_slot, value_slot;
    const int32_t* slots;
    int64_t first, end;
};

inline void fill_rows(const Range& range, int64_t from, TileRows& rows) {
    int64_t left = range.end - from;
    rows.count = left >= TOKENS ? TOKENS : left > 0 ? static_cast<int>(left) : 0;
    for (int t = 0; t < TOKENS; t++) {
        // What lies past the last token repeats it, at a weight of 0: no other row is ever read or fetched.
        int64_t place = from + t < range.end ? from + t : range.end - 1;
        int64_t slot = range.slots ? range.slots[place] : range.first + place;
        rows.keys[t] = range.keys + slot * range.key_slot;
        rows.values[t] = range.values + slot * range.value_slot;
    }
}

// What the next work item reads first, fetched at an even pace while this one attends.
struct Stream {
    const Ahead *range, *end;
    int64_t at = 0;

    int64_t lines() const {
        int64_t all = 0;
        for (const Ahead* r = range; r < end; r++) all += (r->bytes + 63) / 64;
        return all;
    }
    void advance(int64_t lines) {
        for (; lines > 0 && range < end; lines--) {
            prefetch_far(range->data + at);
            at += 64;
            if (at < range->bytes) continue;
            range++;
            at = 0;
        }
    }
};

template <Type T, bool WHOLE, int N>
inline void score_heads(const float* query, int dim, int width, const TileRows& rows, const TileRows& next, int row_bytes,
                        bool fetch, float* scores) {
    constexpr int U = ACCUMULATORS / N;  // tokens whose sums are reduced together
    for (int t = 0; t < rows.count; t += U) {
        V total[N * U];
        for (int i = 0; i < N * U; i++) total[i] = zero();
        if (fetch)
            for (int u = 0; u < U; u++)
                for (int i = 0; i < row_bytes; i += 64) prefetch_far(next.keys[t + u] + i);
        for (int d = 0; d < dim; d += 16) {
            V key[U];
            for (int u = 0; u < U; u++) key[u] = piece<T, WHOLE>(rows.keys[t + u], d, dim);
            for (int n = 0; n < N; n++) {
                V q = load(query + n * width + d);
                for (int u = 0; u < U; u++) total[n * U + u] = fma(q, key[u], total[n * U + u]);
            }
        }
        alignas(64) float sums[N * U];
        sum_each(total, sums);
        for (int n = 0; n < N; n++)
            for (int u = 0; u < U; u++) scores[n * TOKENS + t + u] = sums[n * U + u];
    }
}

template <Type T, bool WHOLE, int N, int C>
inline void weigh_columns(const float* weights, int from, int dim, int width, const TileRows& rows, const TileRows& next,
                          bool fetch, float* values) {
    V total[N][C];
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) total[n][c] = load(values + n * width + from + 16 * c);
    constexpr int LINE = T == Type::float32 ? 16 : 32;
    for (int t = 0; t < rows.count; t++) {
        if (fetch && (from % LINE == 0 || C * 16 >= LINE))
            for (int i = 0; i < C * 16; i += LINE)
                prefetch_far(next.values[t] + (from + i) * (64 / LINE));
        V value[C];
        for (int c = 0; c < C; c++) value[c] = piece<T, WHOLE>(rows.values[t], from + 16 * c, dim);
        for (int n = 0; n < N; n++) {
            V weight = set1(weights[n * TOKENS + t]);
            for (int c = 0; c < C; c++) total[n][c] = fma(weight, value[c], total[n][c]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) store(values + n * width + from + 16 * c, total[n][c]);
}

template <Type T, bool WHOLE, int N>
inline void weigh_heads(const float* weights, int dim, int width, const TileRows& rows, const TileRows& next, bool fetch,
                        float* values) {
    constexpr int C = ACCUMULATORS / N < 4 ? ACCUMULATORS / N : 4;
    int from = 0;
    for (; from + 16 * C <= dim; from += 16 * C)
        weigh_columns<T, WHOLE, N, C>(weights, from, dim, width, rows, next, fetch, values);
    for (; from < dim; from += 16) weigh_columns<T, WHOLE, N, 1>(weights, from, dim, width, rows, next, fetch, values);
}

// Scores to weights: raises the maximum where it grew, rescaling what is summed, and adds to the sum of weights.
template <bool PAIRS>
inline void soften(float scale, float cap, int count, int width, float* scores, uint16_t* pairs, float& maximum, float& sum_,
                   float* values) {
    V most = set1(maximum), each[TOKENS / 16];
    for (int t = 0; t < TOKENS; t += 16) {
        V s = mul(load(scores + t), set1(scale));
        if (cap > 0.0f) s = mul(capped(s, cap), set1(LOG2_E));
        int left = count - t;
        if (left < 16) s = pick(left > 0 ? (1u << left) - 1 : 0u, s, set1(LOWEST));
        each[t / 16] = s;
        most = vmax(s, most);
    }
    float top = largest(most);
    if (top > maximum) {
        float shrink = exp2f(maximum - top);
        maximum = top;
        sum_ *= shrink;
        for (int d = 0; d < width; d += 16) store(values + d, mul(load(values + d), set1(shrink)));
    }
    V total = zero();
    for (int t = 0; t < TOKENS; t += 16) {
        V e = exp2(sub(each[t / 16], set1(top)));
        int left = count - t;
        if (left < 16) e = pick(left > 0 ? (1u << left) - 1 : 0u, e, zero());
        if constexpr (PAIRS) {
            store_bf16(pairs + t, e);
            // The denominator sums the weights as they are used.
            e = load_bf16(pairs + t);
        } else {
            store(scores + t, e);
        }
        total = add(total, e);
    }
    sum_ += sum(total);
}

template <Type T, bool WHOLE>
struct Rowwise {
    static constexpr bool PAIRS = false;

    static void score(int group, const float* query, int dim, int width, const TileRows& rows, const TileRows& next,
                      float* scores) {
        const int bytes = dim * static_cast<int>(sizeof(typename Element<T>::type));
        int h = 0;
        for (; h + 4 <= group; h += 4)
            score_heads<T, WHOLE, 4>(query + h * width, dim, width, rows, next, bytes, h == 0, scores + h * TOKENS);
        for (; h + 2 <= group; h += 2)
            score_heads<T, WHOLE, 2>(query + h * width, dim, width, rows, next, bytes, h == 0, scores + h * TOKENS);
        for (; h < group; h++)
            score_heads<T, WHOLE, 1>(query + h * width, dim, width, rows, next, bytes, h == 0, scores + h * TOKENS);
    }

    static void weigh(int group, const float* weights, const uint16_t*, int dim, int width, const TileRows& rows,
                      const TileRows& next, float* values) {
        int h = 0;
        for (; h + 4 <= group; h += 4)
            weigh_heads<T, WHOLE, 4>(weights + h * TOKENS, dim, width, rows, next, h == 0, values + h * width);
        for (; h + 2 <= group; h += 2)
            weigh_heads<T, WHOLE, 2>(weights + h * TOKENS, dim, width, rows, next, h == 0, values + h * width);
        for (; h < group; h++)
            weigh_heads<T, WHOLE, 1>(weights + h * TOKENS, dim, width, rows, next, h == 0, values + h * width);
    }
};

constexpr int MAX_GROUP = 64;  // query heads that share a KV head

template <typename Way>
inline void attend_range(const Step& step, const float* query, Range range, int64_t begin, const State& state,
                         Stream stream) {
    const int dim = step.dim, width = static_cast<int>(up(dim, 32)), group = step.group;
    const float scale = step.soft_cap > 0.0f ? step.scale : step.scale * LOG2_E;
    alignas(64) float scores[MAX_GROUP * TOKENS];
    alignas(64) uint16_t pairs[Way::PAIRS ? MAX_GROUP * TOKENS : 1];
    TileRows rows[AHEAD + 1];
    if (range.end <= begin) return;
    const int64_t tiles = (range.end - begin + TOKENS - 1) / TOKENS;
    const int64_t lines = stream.lines() / tiles + 1;
    for (int i = 0; i < AHEAD; i++) fill_rows(range, begin + i * TOKENS, rows[i]);
    for (int64_t i = 0; i < tiles; i++) {
        const TileRows& now = rows[i % (AHEAD + 1)];
        TileRows& next = rows[(i + AHEAD) % (AHEAD + 1)];
        fill_rows(range, begin + (i + AHEAD) * TOKENS, next);
        Way::score(group, query, dim, width, now, next, scores);
        stream.advance(lines);
        for (int g = 0; g < group; g++)
            soften<Way::PAIRS>(scale, step.soft_cap, now.count, width, scores + g * TOKENS,
                               pairs + (Way::PAIRS ? g * TOKENS : 0), state.maximum[g], state.sum[g],
                               state.values + g * width);
        Way::weigh(group, scores, pairs, dim, width, now, next, state.values);
    }
}

#ifdef LOKI_BF16_DOT
#include "attend_bf16.hpp"
#endif

template <Type T>
inline void attend_type(const Step& step, int batch, int head, const Scratch& s, const Range& range, int64_t begin,
                        const State& state, Stream stream) {
    const int width = static_cast<int>(up(step.dim, 32));
    const int64_t row_bytes = static_cast<int64_t>(step.dim) * element_bytes(T);
    const char* query = step.query + (static_cast<int64_t>(batch) * step.kv_heads + head) * step.group * row_bytes;
#ifdef LOKI_BF16_DOT
    if constexpr (T == Type::bfloat16) {
        Pairwise::copy_query(query, step.group, step.dim, width, s.query);
        attend_range<Pairwise>(step, s.query, range, begin, state, stream);
        Pairwise::restore_order(step.group, width, state.values);
        return;
    }
#endif
    for (int g = 0; g < step.group; g++)
        for (int d = 0; d < width; d += 16)
            store(s.query + g * width + d, d < step.dim ? piece<T, false>(query + g * row_bytes, d, step.dim) : zero());
    if (step.dim % 16 == 0)
        attend_range<Rowwise<T, true>>(step, s.query, range, begin, state, stream);
    else
        attend_range<Rowwise<T, false>>(step, s.query, range, begin, state, stream);
}

void attend(const Step& step, int batch, int head, const Scratch& s, const int32_t* slots, int64_t first, int64_t begin,
            int64_t end, const State& state, const Ahead* next, int ranges) {
    const int width = static_cast<int>(up(step.dim, 32));
    for (int g = 0; g < step.group; g++) {
        state.maximum[g] = LOWEST;
        state.sum[g] = 0.0f;
    }
    memset(state.values, 0, sizeof(float) * static_cast<size_t>(step.group) * static_cast<size_t>(width));
    const Range range = {step.keys.data + batch * step.keys.batch + head * step.keys.head,
                         step.values.data + batch * step.values.batch + head * step.values.head,
                         step.keys.slot, step.values.slot, slots, first, end};
    const Stream stream = {next, next + ranges};
    if (step.keys.type == Type::float32) attend_type<Type::float32>(step, batch, head, s, range, begin, state, stream);
    else if (step.keys.type == Type::bfloat16) attend_type<Type::bfloat16>(step, batch, head, s, range, begin, state, stream);
    else attend_type<Type::float16>(step, batch, head, s, range, begin, state, stream);
}
