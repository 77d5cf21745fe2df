// The sample: each head's log-mass before the scan, the tail's after it. Included inside the kernels' own namespace.

// log sum w exp(s) over the lanes of sample tiles; MASKS(i, first, second) gives lanes of weight 1 and of weight `ratio`.
template <typename Masks>
inline float weighted_log_sum(const float* scores, int64_t apart, int tiles, float ratio, Masks masks) {
    V most = set1(LOWEST);
    for (int i = 0; i < tiles; i++) {
        uint32_t once, weighted;
        masks(i, once, weighted);
        most = vmax(pick(once | weighted, load(scores + i * apart), set1(LOWEST)), most);
    }
    float top = largest(most);
    if (top <= LOWEST) return -INFINITY;
    V plain = zero(), scaled = zero();
    for (int i = 0; i < tiles; i++) {
        uint32_t once, weighted;
        masks(i, once, weighted);
        V e = exp2(mul(sub(load(scores + i * apart), set1(top)), set1(LOG2_E)));
        plain = add(plain, pick(once, e, zero()));
        scaled = add(scaled, pick(weighted, e, zero()));
    }
    return top + logf(sum(plain) + ratio * sum(scaled));
}

// Slope and start of each head's code: score, less 3/4 of its L, in steps of 1/2048 of the widest head's deviation.
inline void set_codes(const Step& step, const Scratch& s) {
    float widest = 0.0f, least = INFINITY;
    for (int g = 0; g < step.group; g++) {
        widest = s.deviation[g] > widest ? s.deviation[g] : widest;
        least = s.mass[g] < least ? s.mass[g] : least;
    }
    float unit = widest > 0.0f ? 2048.0f / widest : 0.0f;
    for (int g = 0; g < step.group; g++) {
        s.slope[g] = s.step[g] * unit;
        float shift = step.group > 1 ? 0.75f * (least - s.mass[g]) : 0.0f;
        s.start[g] = s.start[g] * s.slope[g] + shift * unit;
    }
}

// Scores the sample and the forced tokens, estimates every head's L and prepares the scan.
void begin_scores(const Step& step, int batch, int head, const Scratch& s) {
    const Encoder& e = *step.encoder;
    const Sequence& sequence = step.sequences[batch];
    for (int g = 0; g < step.group; g++) {
        arrange_quads(s.codes + g * e.rank, e.planes, s.quads + g * (e.rank / 4));
        int32_t twice = doubled_constant(s.codes + g * e.rank, e.planes);
        // Rounded down, so that what is left is a half or nothing.
        int32_t odd = twice & 1;
        s.integer_start[g] = (twice - odd) / 2;
        s.start[g] = 0.5f * static_cast<float>(odd);
        s.mass[g] = 0.0f;
    }
    const Scorer scorer = scorer_of(step, batch, head, s);
    const int64_t apart = static_cast<int64_t>(step.group) * TILE;
    for (int i = 0; i < sequence.sample_tiles; i++) scores_of(scorer, sequence.sample[i].tile, s.sample + i * apart);
    if (step.group > 1) {
        int64_t unforced = sequence.count - sequence.sinks - sequence.recent;
        float ratio = sequence.drawn ? static_cast<float>(unforced) / static_cast<float>(sequence.drawn) : 0.0f;
        for (int g = 0; g < step.group; g++)
            s.mass[g] = weighted_log_sum(s.sample + g * TILE, apart, sequence.sample_tiles, ratio,
                                         [&](int i, uint32_t& once, uint32_t& weighted) {
                                             once = sequence.sample[i].forced;
                                             weighted = sequence.sample[i].drawn;
                                         });
    }
    set_codes(step, s);
}

// Slots are selected where their code is above the threshold, or equal to it and the slot not after the last tie.
struct Cut {
    int16_t code;
    int64_t last_tie;
};

// The lanes of a sample tile that are drawn and not selected.
inline uint32_t unselected_lanes(const SampleTile& tile, const Sequence& sequence, const Scratch& s, const Cut& cut) {
    const int16_t* codes = s.ranking + static_cast<int64_t>(tile.tile - sequence.first_tile) * TILE;
    int64_t ties = cut.last_tie - static_cast<int64_t>(tile.tile) * TILE + 1;
    uint32_t tied = ties <= 0 ? 0u : ties >= TILE ? 0xffffu : (1u << ties) - 1;
    return tile.drawn & ~(above(codes, cut.code) | (equal(codes, cut.code) & tied)) & 0xffffu;
}

// t of every head: the sampled tokens that were not selected stand for all that were not.
inline void tail_mass(const Step& step, int batch, const Scratch& s, const Cut& cut) {
    const Sequence& sequence = step.sequences[batch];
    const int64_t apart = static_cast<int64_t>(step.group) * TILE;
    int64_t left = 0;
    for (int i = 0; i < sequence.sample_tiles; i++) {
        s.lanes[i] = static_cast<uint16_t>(unselected_lanes(sequence.sample[i], sequence, s, cut));
        left += __builtin_popcount(s.lanes[i]);
    }
    for (int g = 0; g < step.group; g++) {
        s.tail_mass[g] = -INFINITY;
        if (!left) continue;
        float* scores = s.sample + g * TILE;
        if (step.soft_cap > 0.0f)
            for (int i = 0; i < sequence.sample_tiles; i++)
                store(scores + i * apart, capped(add(load(scores + i * apart), set1(s.offset[g])), step.soft_cap));
        float mass = weighted_log_sum(scores, apart, sequence.sample_tiles, 0.0f,
                                      [&](int i, uint32_t& once, uint32_t& weighted) {
                                          once = s.lanes[i];
                                          weighted = 0;
                                      });
        float share = static_cast<float>(sequence.count - sequence.k) / static_cast<float>(left);
        s.tail_mass[g] = mass + logf(share) + (step.soft_cap > 0.0f ? 0.0f : s.offset[g]);
    }
}
