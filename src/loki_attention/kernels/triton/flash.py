"""Flash decoding over some slots of one row, and the merge of what its programs found.

A program leaves a *partial*: for every query head of the group the highest score (in powers of two), the sum of weights
under it and the weighted values. The last program of a row to finish merges them, whoever it is, always in the same order.
"""

import triton
import triton.language as tl

from loki_attention.kernels.triton.blocks import narrowed, product
from loki_attention.kernels.triton.jit import kernel

_LOG2E = tl.constexpr(1.4426950408889634)
_MERGED = tl.constexpr(2048)
"""Weighted values that are merged at once: 32 registers of each of 64 threads."""


@kernel
def capped(score, soft_cap, CAPPED: tl.constexpr):
    """``soft_cap`` tanh(score / soft_cap) where the model caps, else the score."""
    if CAPPED:
        # tanh from exp, which every backend has; exact to rounding, and never more than 1.
        fall = tl.exp(-2.0 * tl.abs(score) / soft_cap)
        size = soft_cap * (1.0 - fall) / (1.0 + fall)
        return tl.where(score < 0, -size, size)
    return score


@kernel
def attend_block(
    state, query, keys, values, keys_slot, values_slot, slot, there, scale, soft_cap, DIM: tl.constexpr,
    PADDED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The state (peak, total, weighted values) with the tokens at ``slot`` attended, where ``there``."""
    peak, total, weighted = state
    dim = tl.arange(0, PADDED)
    inside = there[:, None] & (dim < DIM)[None, :]
    at = slot.to(tl.int64)[:, None]
    key = tl.load(keys + at * keys_slot + dim[None, :], mask=inside, other=0.0)
    score = capped(product(query, tl.trans(key)) * scale, soft_cap, CAPPED) * _LOG2E
    score = tl.where(there[None, :], score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    fade, weight = tl.exp2(peak - base), tl.exp2(score - base[:, None])
    value = tl.load(values + at * values_slot + dim[None, :], mask=inside, other=0.0)
    weighted = weighted * fade[:, None] + product(narrowed(weight, value.dtype), value)
    return higher, total * fade + tl.sum(weight, 1), weighted


@kernel
def store_partial(state, peaks, sums, G: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Write a program's state: peak and total of each head at ``peaks``, weighted values at ``sums``."""
    peak, total, weighted = state
    head, dim = tl.arange(0, GROUP), tl.arange(0, PADDED)
    tl.store(peaks + head, peak, mask=head < G)
    tl.store(peaks + G + head, total, mask=head < G)
    tl.store(sums + head[:, None] * DIM + dim[None, :], weighted, mask=(head < G)[:, None] & (dim < DIM)[None, :])


@kernel
def merge_partials(
    peaks, sums, output, output_head, logits, kept, COUNT: tl.constexpr, TAIL: tl.constexpr, SINKS: tl.constexpr,
    KEPT: tl.constexpr, G: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Write a row's output from its ``COUNT`` partials; ``TAIL``: one more, the virtual token, follows them.

    A learned sink (``logits``) joins the denominator alone. ``kept``: the share of the exact tokens beside the tail.
    All peaks are read at once, then weighted values in tiles of several partials: no load waits for another's result.
    """
    HEADS: tl.constexpr = triton.next_power_of_2(G)
    ALL: tl.constexpr = triton.next_power_of_2(COUNT + TAIL)
    TILE: tl.constexpr = _MERGED // (HEADS * PADDED) if HEADS * PADDED < _MERGED else 1
    head, dim, every = tl.arange(0, HEADS), tl.arange(0, PADDED), tl.arange(0, ALL)[:, None]
    own = head < G
    at, there = peaks + every * (2 * G) + head[None, :], (every < COUNT + TAIL) & own[None, :]
    peaks_of = tl.load(at, mask=there, other=float("-inf"))
    peak = tl.max(peaks_of, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.load(at + G, mask=there, other=0.0) * tl.exp2(peaks_of - base[None, :])
    everything = tl.sum(mass, 0)
    if KEPT:
        exact = tl.sum(tl.where(every < COUNT, mass, 0.0), 0)
        has_tail = tl.max(tl.where(every < COUNT, float("-inf"), peaks_of), 0) > float("-inf")
        share = exact / tl.where(everything > 0, everything, 1.0)
        tl.store(kept + head, tl.where(has_tail, share, float("nan")), mask=own)
    added = tl.zeros([TILE, HEADS, PADDED], tl.float32)
    for first in tl.range(0, COUNT + TAIL, TILE, num_stages=4):
        i = first + tl.arange(0, TILE)[:, None]
        here = (i < COUNT + TAIL) & own[None, :]
        peak_of = tl.load(peaks + i * (2 * G) + head[None, :], mask=here, other=float("-inf"))
        value_at = sums + i[:, :, None] * (G * DIM) + head[None, :, None] * DIM + dim[None, None, :]
        value = tl.load(value_at, mask=here[:, :, None] & (dim < DIM)[None, None, :], other=0.0)
        added += value * tl.exp2(peak_of - base[None, :])[:, :, None]
    weighted = tl.sum(added, 0)
    if SINKS:
        logit = tl.load(logits + head, mask=own, other=float("-inf")) * _LOG2E
        higher = tl.maximum(peak, logit)
        above = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(peak - above)
        everything, weighted = everything * fade + tl.exp2(logit - above), weighted * fade[:, None]
    answer = tl.where(everything[:, None] > 0, weighted / tl.where(everything > 0, everything, 1.0)[:, None], 0.0)
    place, inside = output + head[:, None] * output_head + dim[None, :], own[:, None] & (dim < DIM)[None, :]
    tl.store(place, narrowed(answer, output.dtype.element_ty), mask=inside)
