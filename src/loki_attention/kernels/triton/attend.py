"""Exact attention over the selected slots and the tail's virtual token, which is one more partial of the row.

Reads no row of K and V that is not selected. The program of the tail scores the sample once more, leaves out what was
selected, and asks the running sums for a value (``core.tail``).
"""

import triton.language as tl

from loki_attention.kernels.triton.blocks import group_products, seen, span_of
from loki_attention.kernels.triton.flash import attend_block, capped, merge_partials, store_partial
from loki_attention.kernels.triton.jit import kernel
from loki_attention.kernels.triton.sample import sample_size, sampled_slot

_LOG2E = tl.constexpr(1.4426950408889634)


@kernel
def _tail_masses(
    words, codes, numbers, keys_of_slots, ranks, threshold, last_tie, start, stop, tokens, k, soft_cap,
    G: tl.constexpr, D8: tl.constexpr, D4: tl.constexpr, D2: tl.constexpr, VISIBLE: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """t of every head: the log-mass of what is not selected, from those of the sample; -inf where there are none."""
    state = ()
    for _ in tl.static_range(G):
        nothing = tl.zeros([BLOCK], tl.float32)
        state = state + (nothing + float("-inf"), nothing)
    drawn_tokens = tl.zeros([BLOCK], tl.int32)
    for first in range(0, sample_size(start, stop, tokens), BLOCK):
        slot = sampled_slot(first + tl.arange(0, BLOCK), start, tokens)
        place, valid = seen(ranks, slot, start, stop, tokens, VISIBLE)
        key = tl.load(keys_of_slots + slot, mask=valid, other=0).to(tl.int32)
        drawn = valid & ((key < threshold) | ((key == threshold) & (slot > last_tie)))
        drawn_tokens += drawn.to(tl.int32)
        totals = group_products(words, codes, slot, drawn, G, D8, D4, D2)
        added = ()
        for g in tl.static_range(G):
            score = (totals[g].to(tl.float32) - tl.load(numbers + 4 * g + 3)) * tl.load(numbers + 4 * g)
            score = capped(score + tl.load(numbers + 4 * g + 2), soft_cap, CAPPED)
            score = tl.where(drawn, score, float("-inf"))
            higher = tl.maximum(state[2 * g], score)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            added = added + (higher, state[2 * g + 1] * tl.exp(state[2 * g] - base) + tl.exp(score - base))
        state = added
    count = tl.sum(drawn_tokens, 0).to(tl.float32)
    ratio = (tokens - k).to(tl.float32) / tl.maximum(count, 1.0)
    masses = ()
    for g in tl.static_range(G):
        peak = tl.max(state[2 * g], 0)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        mass = tl.sum(state[2 * g + 1] * tl.exp(state[2 * g] - base), 0)
        masses = masses + (tl.where(count > 0, base + tl.log(tl.where(count > 0, ratio * mass, 1.0)), float("-inf")),)
    return masses


@kernel
def _store_tail(
    masses, numbers, encoded, sum_values, sum_encoded, sum_products, covered, peaks, sums, scale,
    G: tl.constexpr, LINEAR: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, RANK: tl.constexpr, R1: tl.constexpr,
    R1_PAD: tl.constexpr,
):  # fmt: skip
    """Write the virtual token as a partial: mass t under weight 1 and value u; none where the sums cover nothing."""
    dim, column = tl.arange(0, PADDED), tl.arange(0, R1_PAD)
    count = tl.maximum(covered, 1.0)
    mean = tl.load(sum_values + dim, mask=dim < DIM, other=0.0) / count
    if LINEAR:
        held = (column < R1)[:, None] & (dim < DIM)[None, :]
        centre = tl.load(sum_encoded + column, mask=column < R1, other=0.0) / count
        products = tl.load(sum_products + column[:, None] * DIM + dim[None, :], mask=held, other=0.0) / count
        covariance = products - centre[:, None] * mean[None, :]
    for g in tl.static_range(G):
        value = mean
        if LINEAR:
            query = tl.load(encoded + g * RANK + column, mask=column < R1, other=0.0)
            reach = scale / tl.maximum(tl.load(numbers + 4 * g + 1), 1.0)
            value = mean + reach * tl.sum(query[:, None] * covariance, 0)
        there = (covered > 0) & (masses[g] > float("-inf"))
        tl.store(peaks + g, tl.where(there, masses[g] * _LOG2E, float("-inf")))
        tl.store(peaks + G + g, tl.where(there, 1.0, 0.0))
        tl.store(sums + g * DIM + dim, tl.where(there, value, 0.0), mask=dim < DIM)


@kernel
def attend_kernel(
    query_ptr, keys_ptr, values_ptr, indices_ptr, k_ptr, start_ptr, stop_ptr, tokens_ptr, rank_ptr, logits_ptr,
    packed_ptr, codes_ptr, encoded_ptr, numbers_ptr, key_ptr, threshold_ptr,
    sum_tokens_ptr, sum_values_ptr, sum_encoded_ptr, sum_products_ptr,
    output_ptr, mass_ptr, kept_ptr, peaks_ptr, sums_ptr, done_ptr, scale, soft_cap,
    query_batch, query_head, keys_batch, keys_head, keys_slot, values_batch, values_head, values_slot,
    packed_batch, packed_head, rank_batch, key_row, indices_row, output_batch, output_head,
    HEADS: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    D8: tl.constexpr, D4: tl.constexpr, D2: tl.constexpr, R1: tl.constexpr, R1_PAD: tl.constexpr, VISIBLE: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, TAIL: tl.constexpr, MASS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, SAMPLE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, split): a share of the row's selected slots. ``MASS``: one program more, for the tail's mass.

    ``TAIL``: 0 none, 1 mean, 2 linear; mass and kept mass are written where ``MASS``.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = row // HEADS, row % HEADS
    start, stop, tokens = span_of(start_ptr, stop_ptr, tokens_ptr, batch, VISIBLE)
    k = tl.minimum(tl.load(k_ptr + batch).to(tl.int32), tokens)
    peaks, sums = peaks_ptr + row * ((SPLITS + 1) * 2 * G), sums_ptr + row * ((SPLITS + 1) * G * DIM)
    if split < SPLITS:
        member, dim = tl.arange(0, GROUP), tl.arange(0, PADDED)
        at = query_ptr + batch * query_batch + (head * G + member)[:, None] * query_head + dim[None, :]
        query = tl.load(at, mask=(member < G)[:, None] & (dim < DIM)[None, :], other=0.0)
        keys = keys_ptr + batch * keys_batch + head * keys_head
        values = values_ptr + batch * values_batch + head * values_head
        peak, total = tl.full([GROUP], float("-inf"), tl.float32), tl.zeros([GROUP], tl.float32)
        weighted = tl.zeros([GROUP, PADDED], tl.float32)
        share = (k + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
        for first in range(split * share, tl.minimum(split * share + share, k), BLOCK):
            i = first + tl.arange(0, BLOCK)
            slot = tl.load(indices_ptr + row * indices_row + i, mask=i < k, other=0)
            peak, total, weighted = attend_block(
                (peak, total, weighted), query, keys, values, keys_slot, values_slot, slot, i < k, scale, soft_cap, DIM,
                PADDED, CAPPED,
            )  # fmt: skip
        store_partial((peak, total, weighted), peaks + split * (2 * G), sums + split * (G * DIM), G, GROUP, DIM, PADDED)
    elif MASS:
        numbers = numbers_ptr + row * (4 * G)
        masses = _tail_masses(
            packed_ptr + batch * packed_batch + head * packed_head, codes_ptr + row * (G * ((D8 + D4 + D2) // 4)), numbers,
            key_ptr + row * key_row, rank_ptr + batch * rank_batch, tl.load(threshold_ptr + 2 * row),
            tl.load(threshold_ptr + 2 * row + 1), start, stop, tokens, k, soft_cap, G, D8, D4, D2, VISIBLE, CAPPED, SAMPLE_BLOCK,
        )  # fmt: skip
        for g in tl.static_range(G):
            tl.store(mass_ptr + row * G + g, masses[g])
        if TAIL > 0:
            _store_tail(
                masses, numbers, encoded_ptr + row * (G * (D8 + D4 + D2)), sum_values_ptr + row * DIM,
                sum_encoded_ptr + row * R1, sum_products_ptr + row * (R1 * DIM), tl.load(sum_tokens_ptr + batch),
                peaks + SPLITS * (2 * G), sums + SPLITS * (G * DIM), scale, G, TAIL == 2, DIM, PADDED, D8 + D4 + D2, R1,
                R1_PAD,
            )  # fmt: skip
    tl.debug_barrier()
    if tl.atomic_add(done_ptr + row, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        output = output_ptr + batch * output_batch + head * G * output_head
        merge_partials(
            peaks, sums, output, output_head, logits_ptr + head * G, kept_ptr + row * G, SPLITS, TAIL > 0, SINKS, MASS, G,
            DIM, PADDED,
        )  # fmt: skip
        tl.store(done_ptr + row, 0)
