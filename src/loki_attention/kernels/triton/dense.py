"""Dense attention of one new token a sequence, by the blocks and the merge that sparse steps have: fallback and baseline."""

import triton.language as tl

from loki_attention.kernels.triton.blocks import seen, span_of
from loki_attention.kernels.triton.flash import attend_block, merge_partials, store_partial
from loki_attention.kernels.triton.jit import kernel


@kernel
def dense_kernel(
    query_ptr, keys_ptr, values_ptr, start_ptr, stop_ptr, tokens_ptr, rank_ptr, logits_ptr, output_ptr, peaks_ptr,
    sums_ptr, done_ptr, scale, soft_cap,
    query_batch, query_head, keys_batch, keys_head, keys_slot, values_batch, values_head, values_slot,
    output_batch, output_head, rank_batch,
    HEADS: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, VISIBLE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, split): a share of the row's slots; the last of a row to finish writes the output."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = row // HEADS, row % HEADS
    start, stop, tokens = span_of(start_ptr, stop_ptr, tokens_ptr, batch, VISIBLE)
    member, dim = tl.arange(0, GROUP), tl.arange(0, PADDED)
    at = query_ptr + batch * query_batch + (head * G + member)[:, None] * query_head + dim[None, :]
    query = tl.load(at, mask=(member < G)[:, None] & (dim < DIM)[None, :], other=0.0)
    keys = keys_ptr + batch * keys_batch + head * keys_head
    values = values_ptr + batch * values_batch + head * values_head
    peak, total = tl.full([GROUP], float("-inf"), tl.float32), tl.zeros([GROUP], tl.float32)
    weighted = tl.zeros([GROUP, PADDED], tl.float32)
    share = (stop - start + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
    for first in range(start + split * share, tl.minimum(start + split * share + share, stop), BLOCK):
        slot = first + tl.arange(0, BLOCK)
        place, valid = seen(rank_ptr + batch * rank_batch, slot, start, stop, tokens, VISIBLE)
        peak, total, weighted = attend_block(
            (peak, total, weighted), query, keys, values, keys_slot, values_slot, slot, valid, scale, soft_cap, DIM, PADDED,
            CAPPED,
        )  # fmt: skip
    peaks, sums = peaks_ptr + row * (SPLITS * 2 * G), sums_ptr + row * (SPLITS * G * DIM)
    store_partial((peak, total, weighted), peaks + split * (2 * G), sums + split * (G * DIM), G, GROUP, DIM, PADDED)
    tl.debug_barrier()
    if tl.atomic_add(done_ptr + row, 1, sem="acq_rel") == SPLITS - 1:
        output = output_ptr + batch * output_batch + head * G * output_head
        merge_partials(
            peaks, sums, output, output_head, logits_ptr + head * G, peaks_ptr, SPLITS, False, SINKS, False, G, DIM, PADDED,
        )  # fmt: skip
        tl.store(done_ptr + row, 0)
