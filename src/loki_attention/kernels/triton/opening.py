"""Opens a decode step: the newest token's key, the tail's sums, the query's codes, and each head's log-mass by the sample.

What a step needs before all tokens are scored, for every sequence and KV head. Nothing of it depends on the length but
the sample, which has about 1000 tokens at most.
"""

import triton.language as tl

from loki_attention.kernels.triton.append import absorb_blocks, append_plane, project
from loki_attention.kernels.triton.blocks import group_products, rounded, seen, span_of
from loki_attention.kernels.triton.jit import kernel
from loki_attention.kernels.triton.sample import sample_size, sampled_slot

_TILE = tl.constexpr(16)
_TEMPER = tl.constexpr(0.75)
_CODES_PER_DEVIATION = tl.constexpr(2048.0)


@kernel
def _write_query_plane(folded, step, at, DIMS: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr):
    """Write the query's codes of one plane as ``blocks.group_products`` reads them; their sum."""
    PER: tl.constexpr = 8 // BITS
    codes = rounded(tl.where(step > 0, folded / tl.where(step > 0, step, 1.0), 0.0))
    grouped = tl.reshape(codes & 255, [PAD // (4 * PER), 4, PER])
    words = tl.sum(grouped << (8 * tl.arange(0, 4))[None, :, None], 1)
    word, part = tl.arange(0, PAD // (4 * PER)), tl.arange(0, PER)
    tl.store(
        at + word[:, None] * PER + part[None, :], words, mask=(word < DIMS // (4 * PER))[:, None] & (part >= 0)[None, :]
    )
    return tl.sum(codes, 0)


@kernel
def _with_scores(state, totals, numbers, forced, drawn, G: tl.constexpr):
    """The running log-sum state of every head with a block of scores: peak, sum of the forced, sum of the drawn."""
    added = ()
    for g in tl.static_range(G):
        peak, of_forced, of_drawn = state[3 * g], state[3 * g + 1], state[3 * g + 2]
        score = (totals[g].to(tl.float32) - tl.load(numbers + 4 * g + 3)) * tl.load(numbers + 4 * g)
        score = tl.where(forced | drawn, score, float("-inf"))
        higher = tl.maximum(peak, score)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade, weight = tl.exp(peak - base), tl.exp(score - base)
        of_forced = of_forced * fade + tl.where(forced, weight, 0.0)
        of_drawn = of_drawn * fade + tl.where(drawn, weight, 0.0)
        added = added + (higher, of_forced, of_drawn)
    return added


@kernel
def _log_masses(
    words, codes, numbers, ranks, start, stop, tokens, sinks, recent, G: tl.constexpr, D8: tl.constexpr, D4: tl.constexpr,
    D2: tl.constexpr, VISIBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """L of every head: forced tokens as they are, the others by the sample (``core.selection.log_mass``)."""
    state = ()
    for _ in tl.static_range(G):
        nothing = tl.zeros([BLOCK], tl.float32)
        state = state + (nothing + float("-inf"), nothing, nothing)
    forced_tokens = tl.minimum(tokens, sinks + recent)
    # Where forced tokens lie is known without holes; with them every slot is looked at.
    looked_at = stop if VISIBLE == 2 else forced_tokens
    for first in range(0, looked_at, BLOCK):
        i = first + tl.arange(0, BLOCK)
        slot = i if VISIBLE == 2 else start + tl.where(i < sinks, i, tokens - forced_tokens + i)
        place, valid = seen(ranks, slot, start, stop, tokens, VISIBLE)
        forced = valid & ((place < sinks) | (place >= tokens - recent)) & (i < looked_at)
        totals = group_products(words, codes, slot, forced, G, D8, D4, D2)
        state = _with_scores(state, totals, numbers, forced, slot < 0, G)
    drawn_tokens = tl.zeros([BLOCK], tl.int32)
    for first in range(0, sample_size(start, stop, tokens), BLOCK):
        slot = sampled_slot(first + tl.arange(0, BLOCK), start, tokens)
        place, valid = seen(ranks, slot, start, stop, tokens, VISIBLE)
        drawn = valid & (place >= sinks) & (place < tokens - recent)
        totals = group_products(words, codes, slot, drawn, G, D8, D4, D2)
        state = _with_scores(state, totals, numbers, slot < 0, drawn, G)
        drawn_tokens += drawn.to(tl.int32)
    drawn_count = tl.sum(drawn_tokens, 0).to(tl.float32)
    ratio = tl.where(drawn_count > 0, (tokens - forced_tokens).to(tl.float32) / tl.maximum(drawn_count, 1.0), 0.0)
    masses = ()
    for g in tl.static_range(G):
        peak = tl.max(state[3 * g], 0)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        fade = tl.exp(state[3 * g] - base)
        weight = tl.sum(state[3 * g + 1] * fade, 0) + ratio * tl.sum(state[3 * g + 2] * fade, 0)
        masses = masses + (base + tl.log(tl.where(weight > 0, weight, 1.0)),)
    return masses


@kernel
def open_step_kernel(
    query_ptr, keys_ptr, values_ptr, packed_ptr, mean_ptr, query_map_ptr, key_map_ptr, deviations_ptr, steps_ptr, kappa_ptr,
    sum_tokens_ptr, sum_values_ptr, sum_encoded_ptr, sum_products_ptr, start_ptr, stop_ptr, tokens_ptr, rank_ptr,
    codes_ptr, encoded_ptr, numbers_ptr, line_ptr, scale,
    query_batch, query_head, keys_batch, keys_head, keys_slot, values_batch, values_head, values_slot,
    packed_batch, packed_head, rank_batch, sinks, recent,
    HEADS: tl.constexpr, G: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, RANK: tl.constexpr, DIMS: tl.constexpr,
    PAD: tl.constexpr, BITS: tl.constexpr, DIMS2: tl.constexpr, PAD2: tl.constexpr, R1: tl.constexpr,
    R1_PAD: tl.constexpr, VISIBLE: tl.constexpr, APPEND: tl.constexpr, ABSORB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row): codes and numbers of the group's query, and the line that turns its products into 16-bit codes.

    ``numbers`` are step, deviation, offset (``EncodedQuery``) and shift of each head. ``APPEND`` writes the newest token's
    low-rank key first; ``ABSORB`` brings the row's sums to the blocks they cover (the count follows in ``score``).
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    start, stop, tokens = span_of(start_ptr, stop_ptr, tokens_ptr, batch, VISIBLE)
    WORDS: tl.constexpr = DIMS * BITS // 32 + DIMS2 // 16
    words = packed_ptr + batch * packed_batch + head * packed_head
    mean, key_map = mean_ptr + head * DIM, key_map_ptr + head * (DIM * RANK)
    steps, deviations = steps_ptr + head * RANK, deviations_ptr + head * RANK
    keys = keys_ptr + batch * keys_batch + head * keys_head
    if APPEND:
        if stop > start:
            key = keys + (stop - 1).to(tl.int64) * keys_slot
            at = words + (stop - 1) // _TILE * (_TILE * WORDS) + (stop - 1) % _TILE
            append_plane(key, at, mean, key_map, steps, DIM, RANK, DIMS, PAD, BITS)
            if DIMS2 > 0:
                at += DIMS * BITS // 32 * _TILE
                append_plane(key, at, mean, key_map + DIMS, steps + DIMS, DIM, RANK, DIMS2, PAD2, 2)
    if ABSORB:
        target = 64 * tl.maximum(tokens // 64 - 1, 0)
        absorb_blocks(
            keys, values_ptr + batch * values_batch + head * values_head, keys_slot, values_slot, mean, key_map,
            sum_values_ptr + row * DIM, sum_encoded_ptr + row * R1, sum_products_ptr + row * (R1 * DIM),
            start, tl.load(sum_tokens_ptr + batch).to(tl.int32), target, DIM, PADDED, RANK, R1, R1_PAD,
        )  # fmt: skip
    query = query_ptr + batch * query_batch + head * G * query_head
    query_map = query_map_ptr + head * (DIM * RANK)
    column, column2, dim = tl.arange(0, PAD), tl.arange(0, PAD2), tl.arange(0, PADDED)
    encoded = project(query, query_head, mean, query_map, G, False, DIM, RANK, DIMS, PAD)
    if DIMS2 > 0:
        encoded2 = project(query, query_head, mean, query_map + DIMS, G, False, DIM, RANK, DIMS2, PAD2)
    step_of = tl.load(steps + column, mask=column < DIMS, other=0.0)
    deviation_of = tl.load(deviations + column, mask=column < DIMS, other=0.0)
    step_of2 = tl.load(steps + DIMS + column2, mask=column2 < DIMS2, other=0.0)
    deviation_of2 = tl.load(deviations + DIMS + column2, mask=column2 < DIMS2, other=0.0)
    centre, kappa = tl.load(mean + dim, mask=dim < DIM, other=0.0), tl.load(kappa_ptr + head)
    codes, numbers = codes_ptr + row * (G * (RANK // 4)), numbers_ptr + row * (4 * G)
    widest = 0.0
    for g in tl.static_range(G):
        spread = tl.sum(encoded[g] * encoded[g] * deviation_of * deviation_of, 0)
        largest = tl.max(tl.abs(encoded[g] * step_of), 0)
        tl.store(encoded_ptr + (row * G + g) * RANK + column, encoded[g], mask=column < DIMS)
        if DIMS2 > 0:
            spread += tl.sum(encoded2[g] * encoded2[g] * deviation_of2 * deviation_of2, 0)
            largest = tl.maximum(largest, tl.max(tl.abs(encoded2[g] * step_of2), 0))
            tl.store(encoded_ptr + (row * G + g) * RANK + DIMS + column2, encoded2[g], mask=column2 < DIMS2)
        step = largest / 127
        total = _write_query_plane(encoded[g] * step_of, step, codes + g * (RANK // 4), DIMS, PAD, BITS)
        shift = total.to(tl.float32) * (128.0 if BITS == 8 else (8.0 if BITS == 4 else 1.5))
        if DIMS2 > 0:
            total = _write_query_plane(
                encoded2[g] * step_of2, step, codes + g * (RANK // 4) + DIMS // 4, DIMS2, PAD2, 2
            )
            shift += 1.5 * total.to(tl.float32)
        vector = tl.load(query + g * query_head + dim, mask=dim < DIM, other=0.0).to(tl.float32)
        deviation = scale * tl.sqrt(spread)
        tl.store(numbers + 4 * g, scale * step)
        tl.store(numbers + 4 * g + 1, deviation)
        tl.store(numbers + 4 * g + 2, scale * tl.sum(vector * centre, 0) + scale * scale * kappa)
        tl.store(numbers + 4 * g + 3, shift)
        widest = tl.maximum(widest, deviation)
    tl.debug_barrier()
    unit = tl.where(widest > 0, _CODES_PER_DEVIATION / tl.where(widest > 0, widest, 1.0), 0.0)
    masses = ()
    lowest = 0.0
    if G > 1:
        D8: tl.constexpr = DIMS if BITS == 8 else 0
        D4: tl.constexpr = DIMS if BITS == 4 else 0
        D2: tl.constexpr = DIMS if BITS == 2 else DIMS2
        ranks = rank_ptr + batch * rank_batch
        masses = _log_masses(
            words, codes, numbers, ranks, start, stop, tokens, sinks, recent, G, D8, D4, D2, VISIBLE, BLOCK
        )  # fmt: skip
        lowest = masses[0]
        for g in tl.static_range(1, G):
            lowest = tl.minimum(lowest, masses[g])
    for g in tl.static_range(G):
        slope = unit * tl.load(numbers + 4 * g)
        level = -slope * tl.load(numbers + 4 * g + 3)
        if G > 1:
            level += _TEMPER * unit * (lowest - masses[g])
        tl.store(line_ptr + row * (2 * G) + 2 * g, slope)
        tl.store(line_ptr + row * (2 * G) + 2 * g + 1, level)
