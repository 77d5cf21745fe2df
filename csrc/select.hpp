// The exact top K of 16-bit codes in linear passes, ascending. Included inside the kernels' own namespace.
constexpr int64_t SAMPLE_FROM = 4096;  // below this many codes a look at the sample does not pay

// The threshold and how many of the codes equal to it are taken, lower slots first.
struct Threshold {
    int16_t code;
    int64_t ties;
};

inline uint32_t lanes_left(int64_t left) { return left >= 32 ? 0xffffffffu : (1u << left) - 1; }

inline uint32_t within(const int16_t* p, int low, int high) {
    uint32_t from = low <= -32768 ? 0xffffffffu : above(p, static_cast<int16_t>(low - 1));
    return from & ~above(p, static_cast<int16_t>(high));
}

inline int64_t count_above(const int16_t* codes, int64_t n, int bound) {
    int64_t count = 0, i = 0;
    for (; i + 32 <= n; i += 32) count += __builtin_popcount(above(codes + i, static_cast<int16_t>(bound)));
    if (i < n) count += __builtin_popcount(above(codes + i, static_cast<int16_t>(bound)) & lanes_left(n - i));
    return count;
}

// The need-th highest of n codes, which lies in low..high: halves the range until one code is left.
inline Threshold resolve(const int16_t* codes, int64_t n, int64_t need, int low, int high) {
    int64_t over = 0;  // codes above high
    while (low < high) {
        int middle = low + (high - low) / 2;
        int64_t count = count_above(codes, n, middle);
        if (count >= need) {
            low = middle + 1;
        } else {
            high = middle;
            over = count;
        }
    }
    return {static_cast<int16_t>(low), need - over};
}

// Bounds that the threshold most likely lies within, from the codes of the sample: four standard errors of its rank
// either side. Where neighbouring tokens are so alike that it does not, one more pass finds it.
inline void bracket(const Sequence& sequence, const Scratch& s, int64_t n, int64_t need, int& low, int& high) {
    int64_t drawn = 0;
    for (int i = 0; i < sequence.sample_tiles; i++) {
        const SampleTile& tile = sequence.sample[i];
        const int16_t* codes = s.ranking + static_cast<int64_t>(tile.tile - sequence.first_tile) * TILE;
        drawn += keep_codes(s.inside + drawn, codes, tile.drawn);
    }
    if (drawn < 256) return;
    float share = static_cast<float>(need) / static_cast<float>(n), m = static_cast<float>(drawn);
    float spread = 4.0f * sqrtf(share * (1.0f - share) * m) + 4.0f;
    int64_t fewer = static_cast<int64_t>(share * m - spread), more = static_cast<int64_t>(share * m + spread);
    if (fewer >= 1) high = resolve(s.inside, drawn, fewer, low, high).code;
    if (more <= drawn) low = resolve(s.inside, drawn, more, low, high).code;
}

// The threshold of the need-th highest of n codes, 0 < need < n.
inline Threshold threshold(const Sequence& sequence, const Scratch& s, const int16_t* codes, int64_t n, int64_t need) {
    int low = -32768, high = 32767;
    if (n >= SAMPLE_FROM) bracket(sequence, s, n, need, low, high);
    while (true) {
        int64_t over = 0, kept = 0;
        for (int64_t i = 0; i < n; i += 32) {
            uint32_t lanes = lanes_left(n - i), higher = above(codes + i, static_cast<int16_t>(high));
            over += __builtin_popcount(higher & lanes);
            kept += keep_codes(s.inside + kept, codes + i, within(codes + i, low, high) & lanes);
        }
        if (over < need && need <= over + kept) return resolve(s.inside, kept, need - over, low, high);
        low = -32768;
        high = 32767;
    }
}

// Places of the codes above the threshold and of the first ties at it, from `base` on; returns the last tie's place.
inline int64_t collect(const int16_t* codes, int64_t n, Threshold cut, int32_t base, int32_t* out) {
    int64_t last_tie = -1;
    for (int64_t i = 0; i < n; i += 32) {
        uint32_t lanes = lanes_left(n - i), chosen = above(codes + i, cut.code) & lanes;
        uint32_t tied = cut.ties ? equal(codes + i, cut.code) & lanes : 0u;
        for (; tied && cut.ties; tied &= tied - 1, cut.ties--) {
            chosen |= tied & (0u - tied);
            last_tie = base + i + __builtin_ctz(tied);
        }
        if (chosen) out += keep_slots(out, static_cast<int32_t>(base + i), chosen);
    }
    return last_tie;
}

inline int32_t slot_of(const Sequence& sequence, int64_t place) {
    return sequence.slots ? sequence.slots[place] : static_cast<int32_t>(sequence.first_slot + place);
}

// Selects among the unforced tokens; returns what tells a selected slot from others.
inline Cut select_unforced(const Sequence& sequence, const Scratch& s, int32_t* out) {
    const int64_t n = sequence.count - sequence.sinks - sequence.recent;
    const int64_t need = sequence.k - sequence.sinks - sequence.recent;
    if (need <= 0) return {32767, -1};
    if (need >= n) {
        for (int64_t i = 0; i < n; i++) out[i] = slot_of(sequence, sequence.sinks + i);
        return {-32768, INT64_MAX / 2};
    }
    const int64_t origin = static_cast<int64_t>(sequence.first_tile) * TILE;
    if (!sequence.slots) {
        int64_t from = sequence.first_slot + sequence.sinks;
        const int16_t* codes = s.ranking + (from - origin);
        Threshold cut = threshold(sequence, s, codes, n, need);
        return {cut.code, collect(codes, n, cut, static_cast<int32_t>(from), out)};
    }
    const int32_t* slots = sequence.slots + sequence.sinks;
    for (int64_t i = 0; i < n; i++) s.compact[i] = s.ranking[slots[i] - origin];
    Threshold cut = threshold(sequence, s, s.compact, n, need);
    int64_t last_tie = collect(s.compact, n, cut, 0, out);
    for (int64_t i = 0; i < need; i++) out[i] = slots[out[i]];
    return {cut.code, last_tie < 0 ? -1 : slots[last_tie]};
}

// From the codes of all slots to the K selected ones and the tail's log-mass.
void select(const Step& step, int batch, int head, const Scratch& s) {
    const Sequence& sequence = step.sequences[batch];
    for (int64_t i = 0; i < sequence.sinks; i++) s.selected[i] = slot_of(sequence, i);
    Cut cut = select_unforced(sequence, s, s.selected + sequence.sinks);
    for (int64_t i = 0; i < sequence.recent; i++)
        s.selected[sequence.k - sequence.recent + i] = slot_of(sequence, sequence.count - sequence.recent + i);
    tail_mass(step, batch, s, cut);
    if (step.indices) {
        int32_t* out = step.indices + (static_cast<int64_t>(batch) * step.kv_heads + head) * step.indices_width;
        memcpy(out, s.selected, sizeof(int32_t) * static_cast<size_t>(sequence.k));
        for (int64_t i = sequence.k; i < step.indices_width; i++) out[i] = -1;
    }
    if (step.log_mass)
        for (int g = 0; g < step.group; g++)
            step.log_mass[(static_cast<int64_t>(batch) * step.kv_heads + head) * step.group + g] = s.tail_mass[g];
}
