// Which slots each sequence of a batch sees, which of them are forced, and which tiles are the sample.
#pragma once
#include "types.hpp"

#include <vector>

namespace loki {

// The valid slots of a batch: intervals [start, stop), or ranks (B, slots) of which 0 <= rank < tokens are visible.
struct Visible {
    int64_t slots;
    const int64_t *start, *stop;
    const int64_t *rank, *tokens;
};

struct Forced {
    int64_t sinks, recent;
};

// One batch's sequences; holds what they point to.
class Plan {
public:
    // k null: dense, without forced tokens and without a sample. Throws std::invalid_argument for what cannot be.
    Plan(int batch, const Visible& visible, const int64_t* k, Forced forced);

    std::vector<Sequence> sequences;
    int64_t longest_span = 0, largest_k = 0, most_tiles = 0;

private:
    void place_interval(int b, const Visible& visible, Sequence& sequence);
    void place_ranks(int b, const Visible& visible, Sequence& sequence);
    void sample_interval(Sequence& sequence);
    void sample_slots(Sequence& sequence);

    std::vector<std::vector<int32_t>> slots_;
    std::vector<std::vector<SampleTile>> tiles_;
};

}  // namespace loki
