// Low-rank scores of tiles of 16 tokens: integer dot products in registers. Included inside the kernels' own namespace.

// The query's codes in the order in which a tile's words unpack: four dims at a time against 16 tokens' bytes.
inline void arrange_quads(const int8_t* codes, const Planes& planes, int32_t* quads) {
    auto quad = [&](int from, int apart) {
        uint32_t word = 0;
        for (int i = 0; i < 4; i++) word |= static_cast<uint32_t>(static_cast<uint8_t>(codes[from + apart * i])) << 8 * i;
        *quads++ = static_cast<int32_t>(word);
    };
    int dim = 0;
    for (int w = 0; w < planes.words8; w++, dim += 4) quad(dim, 1);
    for (int w = 0; w < planes.words4; w++, dim += 8)
        for (int x = 0; x < 2; x++) quad(dim + x, 2);
    for (int w = 0; w < planes.words2; w++, dim += 16)
        for (int x = 0; x < 4; x++) quad(dim + x, 4);
}

// Twice the constant that turns products with stored codes into products with levels: -128, -8 or -1.5 of each dim's q.
inline int32_t doubled_constant(const int8_t* codes, const Planes& planes) {
    int dim = 0, twice = 0;
    for (int i = 0; i < 4 * planes.words8; i++) twice -= 2 * BIAS8 * codes[dim++];
    for (int i = 0; i < 8 * planes.words4; i++) twice -= 16 * codes[dim++];
    for (int i = 0; i < 16 * planes.words2; i++) twice -= 3 * codes[dim++];
    return twice;
}

// Products of N heads with TILES neighbouring tiles: out[head][tile]. Each word is unpacked once for all heads, each
// query quad broadcast once for all tiles.
template <int N, int TILES>
LOKI_INLINE void products(const uint8_t* tile, const Planes& planes, int64_t tile_bytes, const int32_t* quads, int width,
                     const int32_t* starts, I (*out)[TILES]) {
    for (int n = 0; n < N; n++)
        for (int t = 0; t < TILES; t++) out[n][t] = set1(starts[n]);
    for (int w = 0; w < planes.words8; w++, tile += 64, quads++)
        for (int t = 0; t < TILES; t++) {
            Bytes x = load_bytes(tile + t * tile_bytes);
            for (int n = 0; n < N; n++) out[n][t] = dot8(out[n][t], x, quads[n * width]);
        }
    for (int w = 0; w < planes.words4; w++, tile += 64, quads += 2)
        for (int t = 0; t < TILES; t++) {
            Bytes x = load_bytes(tile + t * tile_bytes), low = bits_of<0, 15>(x), high = bits_of<4, 15>(x);
            for (int n = 0; n < N; n++)
                out[n][t] = dot_pair(out[n][t], low, quads[n * width], high, quads[n * width + 1]);
        }
    for (int w = 0; w < planes.words2; w++, tile += 64, quads += 4)
        for (int t = 0; t < TILES; t++) {
            Bytes x = load_bytes(tile + t * tile_bytes);
            Bytes a = bits_of<0, 3>(x), b = bits_of<2, 3>(x), c = bits_of<4, 3>(x), d = bits_of<6, 3>(x);
            for (int n = 0; n < N; n++) {
                const int32_t* q = quads + n * width;
                out[n][t] = dot_pair(dot_pair(out[n][t], a, q[0], b, q[1]), c, q[2], d, q[3]);
            }
        }
}

// The scored tiles of one (sequence, KV head) and the query's side of the product.
struct Scorer {
    const uint8_t* packed;
    Planes planes;
    int64_t tile_bytes;
    int width, group;
    const Scratch* scratch;

    const uint8_t* tile(int64_t index) const { return packed + index * tile_bytes; }
};

inline Scorer scorer_of(const Step& step, int batch, int head, const Scratch& scratch) {
    const Encoder& e = *step.encoder;
    const uint8_t* packed = step.packed + batch * step.packed_batch + head * step.packed_head;
    return {packed, e.planes, static_cast<int64_t>(TILE) * e.bytes_per_token, e.rank / 4, step.group, &scratch};
}

// Scores of a tile for heads from..from+N-1, as floats in units of the attention score.
template <int N>
inline void scores_of(const Scorer& scorer, int64_t tile, int from, float* out) {
    I sums[N][1];
    const Scratch& s = *scorer.scratch;
    products<N, 1>(scorer.tile(tile), scorer.planes, scorer.tile_bytes, s.quads + from * scorer.width, scorer.width,
                   s.integer_start + from, sums);
    for (int n = 0; n < N; n++) {
        // The constant's odd half, where there is one.
        V half = set1(s.start[from + n]);
        store(out + 16 * n, mul(add(to_float(sums[n][0]), half), set1(s.step[from + n])));
    }
}

inline void scores_of(const Scorer& scorer, int64_t tile, float* out) {
    int h = 0;
    for (; h + 4 <= scorer.group; h += 4) scores_of<4>(scorer, tile, h, out + 16 * h);
    for (; h < scorer.group; h++) scores_of<1>(scorer, tile, h, out + 16 * h);
}

template <int N, int TILES>
LOKI_INLINE void raise(const Scorer& scorer, int64_t tile, int from, V* best) {
    I sums[N][TILES];
    const Scratch& s = *scorer.scratch;
    products<N, TILES>(scorer.tile(tile), scorer.planes, scorer.tile_bytes, s.quads + from * scorer.width, scorer.width,
                       s.integer_start + from, sums);
    for (int n = 0; n < N; n++) {
        V slope = set1(s.slope[from + n]), start = set1(s.start[from + n]);
        for (int t = 0; t < TILES; t++) {
            V value = fma(to_float(sums[n][t]), slope, start);
            best[t] = vmax(value, best[t]);
        }
    }
}

// 16-bit codes of TILES tiles: the maximum over heads of what slope and start make of the products.
template <int TILES>
LOKI_INLINE void rank_tiles(const Scorer& scorer, int64_t tile, int16_t* out) {
    V best[TILES];
    for (int t = 0; t < TILES; t++) best[t] = set1(LOWEST);
    int h = 0;
    for (; h + 4 <= scorer.group; h += 4) raise<4, TILES>(scorer, tile, h, best);
    for (; h + 2 <= scorer.group; h += 2) raise<2, TILES>(scorer, tile, h, best);
    for (; h < scorer.group; h++) raise<1, TILES>(scorer, tile, h, best);
    for (int t = 0; t < TILES; t++) {
        V clamped = vmin(vmax(best[t], set1(-32768.0f)), set1(32767.0f));
        store_short(out + TILE * t, clamped);
    }
}

constexpr int TILES_AT_ONCE = ACCUMULATORS >= 16 ? 2 : 1;
constexpr int64_t SCORE_AHEAD = 4096;  // bytes of low-rank keys fetched ahead of the scan

void score(const Step& step, int batch, int head, const Scratch& scratch, int32_t first_tile, int32_t end_tile) {
    const Scorer scorer = scorer_of(step, batch, head, scratch);
    const int32_t base = step.sequences[batch].first_tile;
    const int64_t lines = scorer.tile_bytes / 64 * TILES_AT_ONCE;
    int32_t tile = first_tile;
    for (; tile + TILES_AT_ONCE <= end_tile; tile += TILES_AT_ONCE) {
        const char* ahead = reinterpret_cast<const char*>(scorer.tile(tile)) + SCORE_AHEAD;
        for (int64_t i = 0; i < lines; i++) prefetch(ahead + 64 * i);
        rank_tiles<TILES_AT_ONCE>(scorer, tile, scratch.ranking + static_cast<int64_t>(tile - base) * TILE);
    }
    for (; tile < end_tile; tile++) rank_tiles<1>(scorer, tile, scratch.ranking + static_cast<int64_t>(tile - base) * TILE);
}
