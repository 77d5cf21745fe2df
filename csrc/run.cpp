#include "run.hpp"

#include "arena.hpp"
#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>

namespace loki {
namespace {

constexpr int64_t SPLIT_AT = 64;             // a range of tokens is cut at multiples of this
constexpr int64_t AHEAD_BYTES = 256 << 10;  // of the next item's low-rank keys, while one attends: a part of an L2

struct Item {
    int batch, head;
};

Item item_of(const Step& step, int index) { return {index / step.kv_heads, index % step.kv_heads}; }

int padded_dim(const Step& step) { return (step.dim + 31) / 32 * 32; }

// How many parts each item is cut into: one where the threads have enough whole items to share.
int parts_of(int items, int threads) { return items % threads == 0 || items >= 4 * threads ? 1 : threads; }

struct Cut {
    int64_t begin, end;
};

Cut cut(int64_t n, int part, int parts, int64_t unit) {
    auto edge = [&](int p) { return p == parts ? n : std::min(n, (n * p / parts + unit - 1) / unit * unit); };
    return {edge(part), edge(part + 1)};
}

Scratch attend_scratch(Arena& arena, const Step& step) {
    Scratch s = {};
    s.query = arena.take<float>(static_cast<int64_t>(step.group) * padded_dim(step));
    return s;
}

Scratch select_scratch(Arena& arena, const Step& step, const Plan& plan) {
    Scratch s = attend_scratch(arena, step);
    const int64_t group = step.group, codes = plan.longest_span * TILE + PADDING;
    s.encoded = arena.take<float>(group * step.encoder->padded);
    s.codes = arena.take<int8_t>(group * step.encoder->rank);
    s.quads = arena.take<int32_t>(group * step.encoder->rank / 4);
    for (float** row : {&s.step, &s.deviation, &s.offset, &s.mass, &s.tail_mass, &s.slope, &s.start})
        *row = arena.take<float>(group);
    s.integer_start = arena.take<int32_t>(group);
    s.tail_values = arena.take<float>(group * step.dim);
    s.sample = arena.take<float>(plan.most_tiles * group * TILE);
    s.lanes = arena.take<uint16_t>(plan.most_tiles);
    s.ranking = arena.take<int16_t>(codes);
    s.compact = arena.take<int16_t>(codes);
    s.inside = arena.take<int16_t>(codes);
    s.selected = arena.take<int32_t>(plan.largest_k + PADDING);
    return s;
}

State state_of(Arena& arena, const Step& step) {
    return {arena.take<float>(step.group), arena.take<float>(step.group),
            arena.take<float>(static_cast<int64_t>(step.group) * padded_dim(step))};
}

template <typename Make>
auto several(int n, Make make) {
    std::vector<decltype(make())> all;
    all.reserve(static_cast<size_t>(n));
    for (int i = 0; i < n; i++) all.push_back(make());
    return all;
}

bool has_tail(const Step& step, int batch) { return step.tail != Tail::none && step.sequences[batch].covered > 0.0f; }

// The low-rank keys that an item's selection reads: the scan's first bytes, then the scattered tiles of the sample.
void list_keys(const Step& step, Item item, int64_t scan_bytes, std::vector<Ahead>& out) {
    const Sequence& sequence = step.sequences[item.batch];
    const int64_t tile_bytes = static_cast<int64_t>(TILE) * step.encoder->bytes_per_token;
    const char* packed = reinterpret_cast<const char*>(step.packed) + item.batch * step.packed_batch + item.head * step.packed_head;
    scan_bytes = std::min(scan_bytes, (sequence.end_tile - sequence.first_tile) * tile_bytes);
    if (scan_bytes) out.push_back({packed + sequence.first_tile * tile_bytes, scan_bytes});
    for (int i = 0; i < sequence.sample_tiles; i++) out.push_back({packed + sequence.sample[i].tile * tile_bytes, tile_bytes});
}

// What else it reads outside of its scan and of K and V.
void list_floats(const Step& step, Item item, std::vector<Ahead>& out) {
    const Encoder& e = *step.encoder;
    auto floats = [&](const float* from, int64_t index, int64_t n) {
        if (n) out.push_back({reinterpret_cast<const char*>(from + index * n), n * static_cast<int64_t>(sizeof(float))});
    };
    if (has_tail(step, item.batch)) {
        const int64_t row = static_cast<int64_t>(item.batch) * step.kv_heads + item.head;
        const int64_t rank = step.tail == Tail::linear ? e.tail_rank : 0;
        floats(step.sum_products, row, rank * step.dim);
        floats(step.sum_encoded, row, rank);
        floats(step.sum_values, row, step.dim);
    }
    floats(e.mean, item.head, e.dim);
    floats(e.deviations, item.head, e.padded);
    floats(e.steps, item.head, e.padded);
    floats(e.query_map, item.head, static_cast<int64_t>(e.dim) * e.padded);
}

// Begins to fetch it all at once: read where it is needed, each part would be waited for.
void fetch(const std::vector<Ahead>& reads) {
    for (const Ahead& range : reads)
        for (int64_t i = 0; i < range.bytes; i += 64) __builtin_prefetch(range.data + i, 0, 2);
}

// From an encoded query to the selected slots, but for the scan.
void before_scan(const Kernels& k, const Step& step, Item item, const Scratch& s) {
    k.encode_query(step, item.batch, item.head, s);
    k.begin_scores(step, item.batch, item.head, s);
}

void scan_part(const Kernels& k, const Step& step, int task, int parts, const Scratch& s) {
    Item item = item_of(step, task / parts);
    const Sequence& sequence = step.sequences[item.batch];
    Cut tiles = cut(sequence.end_tile - sequence.first_tile, task % parts, parts, 1);
    k.score(step, item.batch, item.head, s, sequence.first_tile + static_cast<int32_t>(tiles.begin),
            sequence.first_tile + static_cast<int32_t>(tiles.end));
}

void after_scan(const Kernels& k, const Step& step, Item item, const Scratch& s) {
    k.select(step, item.batch, item.head, s);
    if (has_tail(step, item.batch)) k.tail_value(step, item.batch, item.head, s);
}

// Attention with every item cut into parts, merged at the end; `slots` of an item may be null: an interval.
template <typename Slots>
void attend_in_parts(const Kernels& k, const Step& step, int threads, int parts, Arena& arena,
                     const std::vector<Scratch>& scratch, Slots slots, bool with_tail) {
    const int items = step.batch * step.kv_heads;
    auto states = several(items * parts, [&] { return state_of(arena, step); });
    auto queries = several(threads, [&] { return attend_scratch(arena, step).query; });
    auto attend = [&](int task, int worker) {
        Item item = item_of(step, task / parts);
        auto [list, first, count] = slots(task / parts);
        Cut range = cut(count, task % parts, parts, SPLIT_AT);
        Scratch own = scratch[static_cast<size_t>(task / parts)];
        own.query = queries[static_cast<size_t>(worker)];
        k.attend(step, item.batch, item.head, own, list, first, range.begin, range.end,
                 states[static_cast<size_t>(task)], nullptr, 0);
    };
    parallel(items * parts, threads, attend);
    auto finish = [&](int i, int) {
        Item item = item_of(step, i);
        k.finish(step, item.batch, item.head, scratch[static_cast<size_t>(i)], &states[static_cast<size_t>(i * parts)],
                 parts, with_tail && (!step.encoder || has_tail(step, item.batch)));
    };
    parallel(items, threads, finish);
}

struct Slots {
    const int32_t* list;
    int64_t first, count;
};

}  // namespace

void Runner::decode_step(Step step, const Plan& plan) const {
    const Kernels& k = *kernels;
    Arena& arena = Arena::of_thread();
    step.sequences = plan.sequences.data();
    const int items = step.batch * step.kv_heads, parts = parts_of(items, threads);
    if (parts > 1) {
        auto scratch = several(items, [&] { return select_scratch(arena, step, plan); });
        auto begin = [&](int i, int) { before_scan(k, step, item_of(step, i), scratch[static_cast<size_t>(i)]); };
        parallel(items, threads, begin);
        auto scan = [&](int task, int) { scan_part(k, step, task, parts, scratch[static_cast<size_t>(task / parts)]); };
        parallel(items * parts, threads, scan);
        auto end = [&](int i, int) { after_scan(k, step, item_of(step, i), scratch[static_cast<size_t>(i)]); };
        parallel(items, threads, end);
        auto selected = [&](int i) {
            return Slots{scratch[static_cast<size_t>(i)].selected, 0, step.sequences[item_of(step, i).batch].k};
        };
        attend_in_parts(k, step, threads, parts, arena, scratch, selected, true);
        return;
    }
    const int workers = std::min(threads, items);
    auto scratch = several(workers, [&] { return select_scratch(arena, step, plan); });
    auto states = several(workers, [&] { return state_of(arena, step); });
    std::vector<std::vector<Ahead>> reads(static_cast<size_t>(workers));
    auto whole = [&](int i, int worker) {
        Item item = item_of(step, i);
        const Scratch& s = scratch[static_cast<size_t>(worker)];
        const Sequence& sequence = step.sequences[item.batch];
        std::vector<Ahead>& ahead = reads[static_cast<size_t>(worker)];
        if (ahead.empty()) {
            list_keys(step, item, 0, ahead);
            list_floats(step, item, ahead);
            fetch(ahead);
        }
        before_scan(k, step, item, s);
        k.score(step, item.batch, item.head, s, sequence.first_tile, sequence.end_tile);
        after_scan(k, step, item, s);
        // Most likely this worker's next item.
        ahead.clear();
        if (i + workers < items) {
            list_keys(step, item_of(step, i + workers), AHEAD_BYTES, ahead);
            list_floats(step, item_of(step, i + workers), ahead);
        }
        const State& state = states[static_cast<size_t>(worker)];
        k.attend(step, item.batch, item.head, s, s.selected, 0, 0, sequence.k, state, ahead.data(), static_cast<int>(ahead.size()));
        k.finish(step, item.batch, item.head, s, &state, 1, has_tail(step, item.batch));
    };
    parallel(items, workers, whole);
}

void Runner::select(Step step, const Plan& plan, const QueryCodes& query) const {
    const Kernels& k = *kernels;
    Arena& arena = Arena::of_thread();
    step.sequences = plan.sequences.data();
    const int items = step.batch * step.kv_heads, parts = parts_of(items, threads);
    auto scratch = several(items, [&] { return select_scratch(arena, step, plan); });
    auto begin = [&](int i, int) {
        const Scratch& s = scratch[static_cast<size_t>(i)];
        std::vector<Ahead> reads;
        list_keys(step, item_of(step, i), 0, reads);
        fetch(reads);
        const int64_t row = static_cast<int64_t>(i) * step.group, rank = step.encoder->rank;
        const size_t bytes = sizeof(float) * static_cast<size_t>(step.group);
        std::memcpy(s.codes, query.codes + row * rank, static_cast<size_t>(step.group * rank));
        std::memcpy(s.step, query.step + row, bytes);
        std::memcpy(s.deviation, query.deviation + row, bytes);
        std::memcpy(s.offset, query.offset + row, bytes);
        k.begin_scores(step, item_of(step, i).batch, item_of(step, i).head, s);
    };
    auto scan = [&](int task, int) { scan_part(k, step, task, parts, scratch[static_cast<size_t>(task / parts)]); };
    auto end = [&](int i, int) { k.select(step, item_of(step, i).batch, item_of(step, i).head, scratch[static_cast<size_t>(i)]); };
    if (parts == 1) {
        auto whole = [&](int i, int worker) {
            begin(i, worker);
            scan(i, worker);
            end(i, worker);
        };
        parallel(items, threads, whole);
        return;
    }
    parallel(items, threads, begin);
    parallel(items * parts, threads, scan);
    parallel(items, threads, end);
}

void Runner::attend(Step step, const int32_t* slots, int64_t width, const int32_t* counts, float* tail_mass,
                    float* tail_values) const {
    Arena& arena = Arena::of_thread();
    const int items = step.batch * step.kv_heads;
    std::vector<Scratch> scratch(static_cast<size_t>(items));
    for (int i = 0; i < items && tail_mass; i++) {
        scratch[static_cast<size_t>(i)].tail_mass = tail_mass + static_cast<int64_t>(i) * step.group;
        scratch[static_cast<size_t>(i)].tail_values = tail_values + static_cast<int64_t>(i) * step.group * step.dim;
    }
    auto of = [&](int i) { return Slots{slots + i * width, 0, counts[i]}; };
    step.encoder = nullptr;
    attend_in_parts(*kernels, step, threads, parts_of(items, threads), arena, scratch, of, tail_mass != nullptr);
}

void Runner::dense(Step step, const Plan& plan) const {
    Arena& arena = Arena::of_thread();
    const int items = step.batch * step.kv_heads;
    const std::vector<Scratch> scratch(static_cast<size_t>(items));
    auto of = [&](int i) {
        const Sequence& sequence = plan.sequences[static_cast<size_t>(item_of(step, i).batch)];
        return Slots{sequence.slots, sequence.first_slot, sequence.count};
    };
    attend_in_parts(*kernels, step, threads, parts_of(items, threads), arena, scratch, of, false);
}

void Runner::encode_query(const Step& step, int8_t* codes, float* numbers, float* encoded) const {
    Arena& arena = Arena::of_thread();
    const int items = step.batch * step.kv_heads, rank = step.encoder->rank, padded = step.encoder->padded;
    const int64_t rows = static_cast<int64_t>(items) * step.group;
    float* wide = arena.take<float>(rows * padded);
    auto one = [&](int i, int) {
        const int64_t row = static_cast<int64_t>(i) * step.group;
        Scratch s = {};
        s.encoded = wide + row * padded;
        s.codes = codes + row * rank;
        s.step = numbers + row;
        s.deviation = numbers + rows + row;
        s.offset = numbers + 2 * rows + row;
        kernels->encode_query(step, item_of(step, i).batch, item_of(step, i).head, s);
        for (int g = 0; g < step.group; g++)
            std::memcpy(encoded + (row + g) * rank, s.encoded + g * padded, sizeof(float) * static_cast<size_t>(rank));
    };
    parallel(items, threads, one);
}

void Runner::encode_keys(const KeyEncoding& work, int batch) const {
    constexpr int64_t AT_ONCE = 256;
    const int heads = work.encoder->heads;
    const int64_t first = work.start / AT_ONCE, blocks = (work.stop + AT_ONCE - 1) / AT_ONCE - first;
    if (work.stop <= work.start) return;
    auto one = [&](int task, int) {
        const int item = static_cast<int>(task / blocks);
        const int64_t block = first + task % blocks;
        kernels->encode_keys(work, item / heads, item % heads, std::max(work.start, block * AT_ONCE),
                             std::min(work.stop, (block + 1) * AT_ONCE));
    };
    parallel(static_cast<int>(batch * heads * blocks), threads, one);
}

void Runner::absorb(const Absorption& work, int batch) const {
    Arena& arena = Arena::of_thread();
    const int64_t width = (work.dim + 15) / 16 * 16, padded = work.encoder ? work.encoder->padded : 0;
    auto scratch = several(threads, [&] { return arena.take<float>(64 * (2 * width + padded)); });
    auto one = [&](int item, int worker) {
        kernels->absorb(work, item / work.heads, item % work.heads, scratch[static_cast<size_t>(worker)]);
    };
    parallel(batch * work.heads, threads, one);
}

uint64_t Runner::gather(const Step& step, const int32_t* slots, int64_t width, const int32_t* counts,
                        int64_t ahead) const {
    std::atomic<uint64_t> all{0};
    const int items = step.batch * step.kv_heads, parts = parts_of(items, threads);
    auto one = [&](int task, int) {
        const int i = task / parts;
        const Item item = item_of(step, i);
        const Cut range = cut(counts[i], task % parts, parts, SPLIT_AT);
        all ^= kernels->gather(step, item.batch, item.head, slots + i * width, range.begin, range.end, ahead);
    };
    parallel(items * parts, threads, one);
    return all;
}

uint64_t Runner::stream(const char* data, int64_t bytes, int64_t ahead) const {
    std::atomic<uint64_t> all{0};
    auto one = [&](int part, int) {
        Cut range = loki::cut(bytes, part, threads, 4096);
        all ^= kernels->stream(data + range.begin, range.end - range.begin, ahead);
    };
    parallel(threads, threads, one);
    return all;
}

}  // namespace loki
