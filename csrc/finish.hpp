// The tail's value, and the merge of what ranges of tokens, the tail and a sink contribute. Included like the others.

// u of every head of the group (core.tail.tail_value) from the sums of one sequence and KV head.
void tail_value(const Step& step, int batch, int head, const Scratch& s) {
    const int dim = step.dim;
    const float share = 1.0f / step.sequences[batch].covered;
    const int64_t item = static_cast<int64_t>(batch) * step.kv_heads + head;
    const float* values = step.sum_values + item * dim;
    const int rank = step.tail == Tail::linear ? step.encoder->tail_rank : 0;
    const float* encoded = step.sum_encoded + item * rank;
    const float* products = step.sum_products + item * rank * dim;
    for (int g = 0; g < step.group; g++) {
        float weights[MAX_DIM], about = 0.0f;
        float reach = step.scale / (s.deviation[g] > 1.0f ? s.deviation[g] : 1.0f);
        for (int r = 0; r < rank; r++) {
            weights[r] = reach * s.encoded[g * step.encoder->padded + r] * share;
            about += weights[r] * encoded[r];
        }
        // mean + sum_r w_r (products_r - encoded_r mean), every w_r over the number of tokens.
        for (int d = 0; d < dim; d += 16) {
            int left = dim - d < 16 ? dim - d : 16;
            V total = mul(load_part(values + d, left), set1(share * (1.0f - about)));
            for (int r = 0; r < rank; r++)
                total = fma(set1(weights[r]), load_part(products + static_cast<int64_t>(r) * dim + d, left), total);
            store_part(s.tail_values + g * dim + d, total, left);
        }
    }
}

inline void store_output(Type type, char* out, int d, int left, V value) {
    if (type == Type::float32) return store_part(reinterpret_cast<float*>(out) + d, value, left);
    uint16_t room[16];
    if (type == Type::bfloat16) store_bf16(room, value);
    else store_f16(room, value);
    memcpy(out + 2 * d, room, static_cast<size_t>(left) * 2);
}

// What the selected slots hold of the attention mass by the tail's estimate, learned sinks left out; NaN without a tail.
inline float kept_share(const State* parts, int count, int g, float tail) {
    if (!(tail > LOWEST)) return NAN;
    // A maximum of its own: below a large sink both masses would vanish.
    float top = tail, selected = 0.0f;
    for (int p = 0; p < count; p++) top = parts[p].maximum[g] > top ? parts[p].maximum[g] : top;
    for (int p = 0; p < count; p++)
        if (parts[p].maximum[g] > LOWEST) selected += parts[p].sum[g] * exp2f(parts[p].maximum[g] - top);
    return selected / (selected + exp2f(tail - top));
}

// Merges by log-sum-exp and writes the output rows. Where nothing is attended the output is 0.
void finish(const Step& step, int batch, int head, const Scratch& s, const State* parts, int count, bool with_tail) {
    const int dim = step.dim, width = static_cast<int>(up(dim, 32));
    const int64_t first = (static_cast<int64_t>(batch) * step.kv_heads + head) * step.group;
    for (int g = 0; g < step.group; g++) {
        float tail = with_tail ? s.tail_mass[g] * LOG2_E : LOWEST;
        float sink = step.sinks ? step.sinks[head * step.group + g] * LOG2_E : LOWEST;
        if (step.kept) step.kept[first + g] = kept_share(parts, count, g, tail);
        float top = tail > sink ? tail : sink;
        for (int p = 0; p < count; p++) top = parts[p].maximum[g] > top ? parts[p].maximum[g] : top;
        float tail_weight = tail > LOWEST ? exp2f(tail - top) : 0.0f;
        float total = tail_weight + (sink > LOWEST ? exp2f(sink - top) : 0.0f);
        for (int p = 0; p < count; p++)
            if (parts[p].maximum[g] > LOWEST) total += parts[p].sum[g] * exp2f(parts[p].maximum[g] - top);
        // Not "total > 0": a sum that is no number must show in the output.
        float share = total == 0.0f ? 0.0f : 1.0f / total;
        char* out = step.output + (first + g) * dim * element_bytes(step.keys.type);
        for (int d = 0; d < dim; d += 16) {
            int left = dim - d < 16 ? dim - d : 16;
            V value = zero();
            if (tail_weight > 0.0f) value = mul(set1(tail_weight), load_part(s.tail_values + g * dim + d, left));
            for (int p = 0; p < count; p++)
                if (parts[p].maximum[g] > LOWEST)
                    value = fma(set1(exp2f(parts[p].maximum[g] - top)), load(parts[p].values + g * width + d), value);
            store_output(step.keys.type, out, d, left, mul(value, set1(share)));
        }
    }
}
