#include "plan.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace loki {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// The lanes of a tile that lie in [from, to).
uint16_t lanes_of(int64_t tile, int64_t from, int64_t to) {
    int64_t low = std::clamp<int64_t>(from - tile * TILE, 0, TILE), high = std::clamp<int64_t>(to - tile * TILE, 0, TILE);
    return high <= low ? 0 : static_cast<uint16_t>(((1u << high) - 1) & ~((1u << low) - 1));
}

// core.selection.sampled: every stride-th tile, counted from that of the first valid slot.
struct Stride {
    int64_t stride, phase;

    explicit Stride(int64_t count) : stride(std::max<int64_t>(1, count / SAMPLED_TOKENS)), phase(count % stride) {}
    bool takes(int64_t tile) const { return tile % stride == phase; }
    int64_t next(int64_t tile) const { return tile + ((phase - tile) % stride + stride) % stride; }
};

}  // namespace

Plan::Plan(int batch, const Visible& visible, const int64_t* k, Forced forced)
    : sequences(static_cast<size_t>(batch)), slots_(sequences.size()), tiles_(sequences.size()) {
    for (int b = 0; b < batch; b++) {
        Sequence& sequence = sequences[static_cast<size_t>(b)];
        sequence = {};
        if (visible.rank) place_ranks(b, visible, sequence);
        else place_interval(b, visible, sequence);
        longest_span = std::max<int64_t>(longest_span, sequence.end_tile - sequence.first_tile);
        sequence.k = k ? k[b] : sequence.count;
        largest_k = std::max(largest_k, sequence.k);
        if (!k) continue;
        sequence.sinks = std::min(forced.sinks, sequence.count);
        sequence.recent = std::min(forced.recent, sequence.count - sequence.sinks);
        if (sequence.k > sequence.count || sequence.k < sequence.sinks + sequence.recent)
            refuse("k of sequence " + std::to_string(b) + " is " + std::to_string(sequence.k) + "; it must hold the " +
                   std::to_string(sequence.sinks + sequence.recent) + " forced tokens and be at most its " +
                   std::to_string(sequence.count) + " valid tokens");
        if (visible.rank) sample_slots(sequence);
        else sample_interval(sequence);
        std::vector<SampleTile>& tiles = tiles_[static_cast<size_t>(b)];
        for (const SampleTile& tile : tiles) sequence.drawn += __builtin_popcount(tile.drawn);
        sequence.sample = tiles.data();
        sequence.sample_tiles = static_cast<int32_t>(tiles.size());
        most_tiles = std::max<int64_t>(most_tiles, sequence.sample_tiles);
    }
}

void Plan::place_interval(int b, const Visible& visible, Sequence& sequence) {
    int64_t start = visible.start ? visible.start[b] : 0, stop = visible.stop[b];
    if (start < 0 || stop < start || stop > visible.slots)
        refuse("the valid slots of sequence " + std::to_string(b) + " are [" + std::to_string(start) + ", " +
               std::to_string(stop) + "); they must lie within the " + std::to_string(visible.slots) + " cached slots");
    sequence.first_slot = start;
    sequence.count = stop - start;
    sequence.first_tile = static_cast<int32_t>(start / TILE);
    sequence.end_tile = sequence.count ? static_cast<int32_t>((stop + TILE - 1) / TILE) : sequence.first_tile;
}

void Plan::place_ranks(int b, const Visible& visible, Sequence& sequence) {
    std::vector<int32_t>& slots = slots_[static_cast<size_t>(b)];
    const int64_t* rank = visible.rank + b * visible.slots;
    const int64_t tokens = visible.tokens[b];
    for (int64_t slot = 0; slot < visible.slots; slot++)
        if (rank[slot] >= 0 && rank[slot] < tokens) slots.push_back(static_cast<int32_t>(slot));
    if (static_cast<int64_t>(slots.size()) != tokens)
        refuse("sequence " + std::to_string(b) + " is said to see " + std::to_string(tokens) + " tokens, but " +
               std::to_string(slots.size()) + " slots have a rank below that");
    sequence.count = tokens;
    sequence.slots = slots.data();
    if (slots.empty()) return;
    sequence.first_slot = slots.front();
    sequence.first_tile = slots.front() / TILE;
    sequence.end_tile = slots.back() / TILE + 1;
}

void Plan::sample_interval(Sequence& sequence) {
    std::vector<SampleTile>& tiles = tiles_[static_cast<size_t>(&sequence - sequences.data())];
    const Stride stride(sequence.count);
    const int64_t first = sequence.first_slot, stop = first + sequence.count;
    const int64_t from = first + sequence.sinks, to = stop - sequence.recent;
    // Tiles before `lead` hold sinks, those from `trail` on recent tokens; in between only the sample's are scored.
    const int64_t lead = sequence.sinks ? (from + TILE - 1) / TILE : sequence.first_tile;
    const int64_t trail = std::max(lead, sequence.recent ? to / TILE : static_cast<int64_t>(sequence.end_tile));
    auto put = [&](int64_t tile) {
        bool drawn = stride.takes(tile - sequence.first_tile);
        uint16_t forced = static_cast<uint16_t>(lanes_of(tile, first, from) | lanes_of(tile, to, stop));
        tiles.push_back({static_cast<int32_t>(tile), forced, drawn ? lanes_of(tile, from, to) : uint16_t{0}});
    };
    for (int64_t tile = sequence.first_tile; tile < std::min<int64_t>(lead, sequence.end_tile); tile++) put(tile);
    for (int64_t tile = sequence.first_tile + stride.next(lead - sequence.first_tile); tile < trail; tile += stride.stride)
        put(tile);
    for (int64_t tile = trail; tile < sequence.end_tile; tile++) put(tile);
}

void Plan::sample_slots(Sequence& sequence) {
    std::vector<SampleTile>& tiles = tiles_[static_cast<size_t>(&sequence - sequences.data())];
    const Stride stride(sequence.count);
    for (int64_t i = 0; i < sequence.count; i++) {
        int32_t tile = sequence.slots[i] / TILE;
        uint16_t lane = static_cast<uint16_t>(1u << sequence.slots[i] % TILE);
        bool forced = i < sequence.sinks || i >= sequence.count - sequence.recent;
        if (!forced && !stride.takes(tile - sequence.first_tile)) continue;
        if (tiles.empty() || tiles.back().tile != tile) tiles.push_back({tile, 0, 0});
        SampleTile& last = tiles.back();
        (forced ? last.forced : last.drawn) = static_cast<uint16_t>((forced ? last.forced : last.drawn) | lane);
    }
}

}  // namespace loki
