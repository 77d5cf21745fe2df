"""Picks the K highest keys of every row, ties to the lower slot, and lists their slots in ascending order.

Short rows: one program holds all keys in registers and bisects. Long rows: the histograms of ``score`` give the byte that
the threshold begins with, ``refine_kernel`` counts the second bytes of keys that share it, ``compact_kernel`` lists. Both
leave ``threshold`` (row, 2): the threshold key and the highest slot taken at it, for the tail's sample.
"""

import triton.language as tl

from loki_attention.kernels.triton.blocks import span_of
from loki_attention.kernels.triton.jit import kernel


@kernel
def _highest_with(counts, wanted):
    """The highest i with at least ``wanted`` counted at i and above, and how many are above it."""
    bins = tl.arange(0, 256)
    from_here = tl.cumsum(counts, 0, reverse=True)
    found = tl.max(tl.where(from_here >= wanted, bins, 0), 0)
    return found, tl.sum(tl.where(bins > found, counts, 0), 0)


@kernel
def _list_taken(key, slot, threshold, ties_wanted, taken_before, ties_before, indices):
    """Write the slots of a block that are taken; how many keys are above the threshold, at it, and the last slot taken at it.

    One scan counts both: those above in the low half, those at the threshold in the high half.
    """
    above, tie = key > threshold, key == threshold
    counted = tl.cumsum(above.to(tl.int32) + (tie.to(tl.int32) << 16), 0)
    taken_above, ties = taken_before + (counted & 0xFFFF), ties_before + (counted >> 16)
    kept_tie = tie & (ties <= ties_wanted)
    at = taken_above + tl.minimum(ties, ties_wanted) - 1
    tl.store(indices + at, slot, mask=above | kept_tie)
    return tl.sum(above.to(tl.int32), 0), tl.sum(tie.to(tl.int32), 0), tl.max(tl.where(kept_tie, slot, -1), 0)


@kernel
def select_kernel(
    key_ptr, start_ptr, stop_ptr, tokens_ptr, k_ptr, indices_ptr, threshold_ptr, key_row, indices_row,
    HEADS: tl.constexpr, VISIBLE: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row): all of a row's keys, up to ``SLOTS``, a power of two; they are listed in blocks.

    Keys are read again for that: the scan and the addresses of so many slots at once would not fit beside them in registers.
    """
    row = tl.program_id(0).to(tl.int64)
    batch = row // HEADS
    _, stop, tokens = span_of(start_ptr, stop_ptr, tokens_ptr, batch, VISIBLE)
    wanted = tl.minimum(tl.load(k_ptr + batch).to(tl.int32), tokens)
    every = tl.arange(0, SLOTS)
    keys = tl.load(key_ptr + row * key_row + every, mask=every // 16 * 16 < stop, other=0).to(tl.int32)
    threshold = 0
    for bit in tl.static_range(15, -1, -1):
        higher = threshold + (1 << bit)
        threshold = tl.where(tl.sum((keys >= higher).to(tl.int32), 0) >= wanted, higher, threshold)
    ties_wanted = wanted - tl.sum((keys > threshold).to(tl.int32), 0)
    taken, ties, last_tie = 0, 0, -1
    for first in range(0, stop, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + row * key_row + slot, mask=slot // 16 * 16 < stop, other=0).to(tl.int32)
        new_above, new_ties, tie_slot = _list_taken(
            key, slot, threshold, ties_wanted, taken, ties, indices_ptr + row * indices_row
        )
        taken, ties, last_tie = taken + new_above, ties + new_ties, tl.maximum(last_tie, tie_slot)
    tl.store(threshold_ptr + 2 * row, threshold)
    tl.store(threshold_ptr + 2 * row + 1, last_tie)


@kernel
def refine_kernel(
    key_ptr, start_ptr, stop_ptr, tokens_ptr, k_ptr, histogram_ptr, refined_ptr, count_ptr, bounds_ptr, key_row,
    HEADS: tl.constexpr, VISIBLE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk): histogram of the low bytes of the chunk's keys whose high byte is the threshold's.

    ``count``: how many keys of the chunk are above all of those. ``bounds``: the high byte, how many are wanted of it.
    """
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    batch = row // HEADS
    _, stop, tokens = span_of(start_ptr, stop_ptr, tokens_ptr, batch, VISIBLE)
    wanted = tl.minimum(tl.load(k_ptr + batch).to(tl.int32), tokens)
    bins = tl.arange(0, 256)
    used = tl.minimum((stop + CHUNK - 1) // CHUNK, chunks)
    counts = tl.zeros([256], tl.int32)
    for other in range(0, used):
        counts += tl.load(histogram_ptr + (row * chunks + other) * 256 + bins)
    high, above = _highest_with(counts, wanted)
    refined = tl.zeros([256], tl.int32)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, stop), BLOCK):
        slot = first + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + row * key_row + slot).to(tl.int32)
        there = tl.reshape((key >> 8) == high, [BLOCK], can_reorder=True)
        low = tl.reshape(key & 255, [BLOCK], can_reorder=True)
        # Slots beyond the last have key 0, which no threshold is.
        refined += tl.histogram(low, 256, mask=there & (tl.reshape(key, [BLOCK], can_reorder=True) > 0))
    tl.store(refined_ptr + (row * chunks + chunk) * 256 + bins, refined)
    own = tl.load(histogram_ptr + (row * chunks + chunk) * 256 + bins)
    tl.store(count_ptr + row * chunks + chunk, tl.sum(tl.where(bins > high, own, 0), 0))
    if chunk == 0:
        tl.store(bounds_ptr + 2 * row, high)
        tl.store(bounds_ptr + 2 * row + 1, wanted - above)


@kernel
def compact_kernel(
    key_ptr, stop_ptr, refined_ptr, count_ptr, bounds_ptr, indices_ptr, threshold_ptr, key_row, indices_row,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk): the chunk's share of the list. ``bounds`` are what ``refine_kernel`` left."""
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    stop = tl.load(stop_ptr + row // HEADS).to(tl.int32)
    high, wanted = tl.load(bounds_ptr + 2 * row), tl.load(bounds_ptr + 2 * row + 1)
    bins = tl.arange(0, 256)
    counts, before, taken = tl.zeros([256], tl.int32), tl.zeros([256], tl.int32), 0
    for other in range(0, tl.minimum((stop + CHUNK - 1) // CHUNK, chunks)):
        refined = tl.load(refined_ptr + (row * chunks + other) * 256 + bins)
        counts += refined
        if other < chunk:
            before += refined
            taken += tl.load(count_ptr + row * chunks + other)
    low, above = _highest_with(counts, wanted)
    threshold = high * 256 + low
    taken += tl.sum(tl.where(bins > low, before, 0), 0)
    ties, last_tie = tl.sum(tl.where(bins == low, before, 0), 0), -1
    ties_before = ties
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, stop), BLOCK):
        slot = first + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + row * key_row + slot).to(tl.int32)
        new_above, new_ties, tie_slot = _list_taken(
            key, slot, threshold, wanted - above, taken, ties, indices_ptr + row * indices_row
        )
        taken, ties, last_tie = taken + new_above, ties + new_ties, tl.maximum(last_tie, tie_slot)
    # The one chunk that holds the last tie taken says so.
    if (ties_before < wanted - above) & (ties >= wanted - above):
        tl.store(threshold_ptr + 2 * row, threshold)
        tl.store(threshold_ptr + 2 * row + 1, last_tie)
