"""Scores all tokens by their low-rank keys: one 16-bit key a token and KV head, and histograms of them.

The group's heads are combined in the same pass (``core.selection.combine``). A key is the code of ``core.selection``
raised to be positive: 1 to 65534, 65535 for forced tokens and 0 for slots that the row does not see.
"""

import triton.language as tl

from loki_attention.kernels.triton.blocks import group_products, rounded, seen, span_of
from loki_attention.kernels.triton.jit import kernel


@kernel
def score_kernel(
    packed_ptr, codes_ptr, line_ptr, start_ptr, stop_ptr, tokens_ptr, rank_ptr, key_ptr, histogram_ptr,
    sum_tokens_ptr, packed_batch, packed_head, rank_batch, key_row, sinks, recent,
    HEADS: tl.constexpr, G: tl.constexpr, D8: tl.constexpr, D4: tl.constexpr, D2: tl.constexpr, VISIBLE: tl.constexpr,
    HISTOGRAM: tl.constexpr, ABSORB: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk): the keys of ``CHUNK`` slots of one sequence and KV head."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = row // HEADS, row % HEADS
    start, stop, tokens = span_of(start_ptr, stop_ptr, tokens_ptr, batch, VISIBLE)
    words = packed_ptr + batch * packed_batch + head * packed_head
    query, line = codes_ptr + row * (G * ((D8 + D4 + D2) // 4)), line_ptr + row * (2 * G)
    if ABSORB and head + chunk == 0:
        # Every head's sums were brought up to date before this kernel; nobody reads the count while it runs.
        tl.store(sum_tokens_ptr + batch, (64 * tl.maximum(tokens // 64 - 1, 0)).to(tl.float32))
    bins = tl.zeros([256], tl.int32)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, stop), BLOCK):
        slot = first + tl.arange(0, BLOCK)
        place, valid = seen(rank_ptr + batch * rank_batch, slot, start, stop, tokens, VISIBLE)
        # Whole tiles are masked, so that loads stay 16 bytes wide.
        totals = group_products(words, query, slot, slot // 16 * 16 < stop, G, D8, D4, D2)
        best = totals[0].to(tl.float32) * tl.load(line) + tl.load(line + 1)
        for g in tl.static_range(1, G):
            other = totals[g].to(tl.float32) * tl.load(line + 2 * g) + tl.load(line + 2 * g + 1)
            best = tl.maximum(best, other)
        code = rounded(tl.minimum(tl.maximum(best, -32767.0), 32766.0)) + 32768
        key = tl.where((place < sinks) | (place >= tokens - recent), 65535, code)
        key = tl.where(valid, key, 0)
        tl.store(key_ptr + row * key_row + slot, key.to(tl.uint16))
        if HISTOGRAM:
            spread = tl.reshape(key >> 8, [BLOCK], can_reorder=True)
            there = tl.reshape(valid, [BLOCK], can_reorder=True)
            bins += tl.histogram(spread, 256, mask=there)
    if HISTOGRAM:
        chunks = tl.num_programs(1)
        tl.store(histogram_ptr + (row * chunks + chunk) * 256 + tl.arange(0, 256), bins)
