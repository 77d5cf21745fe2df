// What the kernels are given: plain data, the same in every instruction set's translation unit.
//
// No functions and no templates here. An inline function compiled with AVX-512 could be the copy that the linker keeps
// for everyone, and would then be an illegal instruction on an older machine.
#pragma once
#include <cstdint>

namespace loki {

enum class Type : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Tail : int { none = 0, mean = 1, linear = 2 };

constexpr int TILE = 16;             // tokens of one block of low-rank keys, and of one tile of the sample
constexpr int SAMPLED_TOKENS = 512;  // core.selection.SAMPLED_TOKENS
constexpr int MAX_DIM = 256;
constexpr int PADDING = 64;  // entries that scratch arrays of codes and slots have beyond their length

// K or V: rows of head_dim elements, each contiguous. Strides in bytes.
struct Rows {
    const char* data;
    int64_t batch, head, slot;
    Type type;
};

// Words of 4 bytes a token, by bits; planes follow each other in this order.
struct Planes {
    int words8, words4, words2;
};

// One layer's encoder. Maps are (heads, dim, padded), zero beyond rank, so that rows of them load in whole vectors.
struct Encoder {
    int heads, dim, rank, padded, tail_rank, bytes_per_token;
    Planes planes;
    const float *mean, *query_map, *key_map, *deviations, *steps, *kappa;
};

// A tile of the sample or of the forced tokens: which of its 16 slots are forced, and which are drawn (not forced).
struct SampleTile {
    int32_t tile;
    uint16_t forced, drawn;
};

// What one sequence of the batch attends. Slots are absolute; tiles count from the buffer's start.
struct Sequence {
    int64_t first_slot, count, k, sinks, recent;
    int32_t first_tile, end_tile;
    const int32_t* slots;  // the valid slots in order; null where they are an interval from first_slot
    const SampleTile* sample;
    int32_t sample_tiles;
    int64_t drawn;
    // The tail's sums of this sequence cover this many tokens; 0 is no tail.
    float covered;
};

// Query rows as core.encoder.EncodedQuery has them: codes (B, H, R), the others (B, H).
struct QueryCodes {
    const int8_t* codes;
    const float *step, *deviation, *offset;
};

struct Step {
    int batch, kv_heads, group, dim;
    float scale, soft_cap;  // soft_cap 0: none
    Tail tail;
    const Encoder* encoder;
    const char* query;  // (B, H, D) contiguous, of type keys.type
    char* output;       // the same
    Rows keys, values;
    const uint8_t* packed;
    int64_t packed_batch, packed_head;  // strides in bytes
    const float* sinks;                 // learned sinks (H) or null
    const float *sum_values, *sum_encoded, *sum_products;
    const Sequence* sequences;
    // Outputs of the selection, or null.
    int32_t* indices;  // (B, Hkv, indices_width)
    int64_t indices_width;
    float* log_mass;  // (B, H)
    float* kept;      // (B, H)
};

// Scratch of one (sequence, KV head): select writes what attend reads.
struct Scratch {
    float* encoded;      // (G, padded) q A_q, unquantised
    int8_t* codes;       // (G, rank) query codes
    int32_t* quads;      // (G, rank / 4) the codes as the dot products take them
    float* query;        // (G, padded dim) float32, or pairs of bfloat16
    float *step, *deviation, *offset, *mass, *tail_mass, *slope, *start;  // (G)
    int32_t* integer_start;                                            // (G)
    float* tail_values;   // (G, D)
    float* sample;        // (sample tiles, G, 16)
    int16_t* ranking;     // codes of slots from first_tile * 16 on
    int16_t* compact;     // codes of unforced tokens in order, where slots are no interval
    int16_t* inside;      // codes inside the threshold's bracket
    uint16_t* lanes;      // (sample tiles) lanes that the tail's log-mass sums
    int32_t* selected;    // (K) slots
};

// Memory that is read soon, fetched while something else computes.
struct Ahead {
    const char* data;
    int64_t bytes;
};

// Softmax state of a range of tokens: maximum and sum of exponentials, in powers of 2, and the weighted sum of V.
struct State {
    float *maximum, *sum;  // (G)
    float* values;         // (G, D rounded up to 32)
};

struct KeyEncoding {
    const Encoder* encoder;
    Rows keys;
    uint8_t* packed;
    int64_t packed_batch, packed_head;
    int64_t start, stop;
};

// Tokens to add to the tail's sums (sign 1) or to take away (-1); slots of sign 0 are not read.
struct Absorption {
    const Encoder* encoder;  // null: sums of values alone
    Rows keys, values;
    int heads, dim;
    int64_t slots;
    const int8_t* sign;  // (B, slots)
    float *sum_values, *sum_encoded, *sum_products;
};

// One instruction set's kernels.
struct Kernels {
    void (*encode_keys)(const KeyEncoding&, int batch, int head, int64_t start, int64_t stop);
    void (*encode_query)(const Step&, int batch, int head, const Scratch&);
    void (*begin_scores)(const Step&, int batch, int head, const Scratch&);
    void (*score)(const Step&, int batch, int head, const Scratch&, int32_t first_tile, int32_t end_tile);
    void (*select)(const Step&, int batch, int head, const Scratch&);
    void (*tail_value)(const Step&, int batch, int head, const Scratch&);
    // Attends slots[begin, end), or the slots first + begin .. first + end where slots is null; fetches `next` meanwhile.
    void (*attend)(const Step&, int batch, int head, const Scratch&, const int32_t* slots, int64_t first, int64_t begin,
                   int64_t end, const State&, const Ahead* next, int ranges);
    void (*finish)(const Step&, int batch, int head, const Scratch&, const State* parts, int count, bool with_tail);
    void (*absorb)(const Absorption&, int batch, int head, float* scratch);
    uint64_t (*stream)(const char* data, int64_t bytes, int64_t ahead);
    uint64_t (*gather)(const Step&, int batch, int head, const int32_t* slots, int64_t begin, int64_t end, int64_t ahead);
};

extern const Kernels portable_kernels;
#ifdef LOKI_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace loki
