"""Flash decoding over some slots of one row, and the merge of what its programs found.

A program leaves a *partial*: for every query head of the group the highest score (in powers of two), the sum of weights
under it and the weighted values. The last program of a row to finish merges them, in order, whoever it is.
"""

import triton.language as tl

from loki_attention.kernels.triton.blocks import narrowed, product
from loki_attention.kernels.triton.jit import kernel

_LOG2E = tl.constexpr(1.4426950408889634)


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
    KEPT: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Write a row's output from its ``COUNT`` partials; ``TAIL``: one more, the virtual token, follows them.

    A learned sink (``logits``) joins the denominator alone. ``kept``: the share of the exact tokens beside the tail.
    """
    head, dim = tl.arange(0, GROUP), tl.arange(0, PADDED)
    own, inside = head < G, (head < G)[:, None] & (dim < DIM)[None, :]
    peak, total = tl.full([GROUP], float("-inf"), tl.float32), tl.zeros([GROUP], tl.float32)
    tail, has_tail = tl.zeros([GROUP], tl.float32), head < 0
    weighted = tl.zeros([GROUP, PADDED], tl.float32)
    for i in range(0, COUNT + TAIL):
        other = tl.load(peaks + i * (2 * G) + head, mask=own, other=float("-inf"))
        weight = tl.load(peaks + i * (2 * G) + G + head, mask=own, other=0.0)
        value = tl.load(sums + i * (G * DIM) + head[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
        higher = tl.maximum(peak, other)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade, scale = tl.exp2(peak - base), tl.exp2(other - base)
        weighted = weighted * fade[:, None] + value * scale[:, None]
        if i < COUNT:
            total = total * fade + weight * scale
        else:
            total, tail, has_tail = total * fade, weight * scale, other > float("-inf")
        peak = higher
    everything = total + tail
    if KEPT:
        share = total / tl.where(everything > 0, everything, 1.0)
        tl.store(kept + head, tl.where(has_tail, share, float("nan")), mask=own)
    if SINKS:
        logit = tl.load(logits + head, mask=own, other=float("-inf")) * _LOG2E
        higher = tl.maximum(peak, logit)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(peak - base)
        everything, weighted = everything * fade + tl.exp2(logit - base), weighted * fade[:, None]
    answer = tl.where(everything[:, None] > 0, weighted / tl.where(everything > 0, everything, 1.0)[:, None], 0.0)
    at = output + head[:, None] * output_head + dim[None, :]
    tl.store(at, narrowed(answer, output.dtype.element_ty), mask=inside)
