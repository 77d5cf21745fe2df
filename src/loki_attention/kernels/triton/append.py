"""Encodes keys into packed planes, many at once or the newest of a sequence, and adds blocks of tokens to the tail's sums.

The encoder is IEEE float32 (``core.encoder``); the layout is that of ``blocks``.
"""

import triton.language as tl

from loki_attention.kernels.triton.blocks import rounded
from loki_attention.kernels.triton.jit import kernel

_TILE = tl.constexpr(16)
_ROWS = tl.constexpr(16)


@kernel
def _levels(scaled, BITS: tl.constexpr):
    """Codes of encoded dims in units of their steps, counted from 0 (``core.planes.Planes.quantize``)."""
    if BITS == 2:
        return tl.minimum(tl.maximum(rounded(tl.minimum(tl.maximum(scaled, -9.0), 9.0) + 1.5), 0), 3)
    LARGEST: tl.constexpr = 127 if BITS == 8 else 7
    near = tl.minimum(tl.maximum(scaled, -LARGEST - 1.0), LARGEST + 1.0)
    return tl.minimum(tl.maximum(rounded(near), -LARGEST), LARGEST) + (LARGEST + 1)


@kernel
def _projected_rows(
    rows, there, mean_ptr, map_ptr, N: tl.constexpr, DIM: tl.constexpr, RANK: tl.constexpr, DIMS: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    """Vectors at ``rows`` (N addresses), less the mean, on DIMS axes: a float32 tile (N, PAD)."""
    column, step = tl.arange(0, PAD), tl.arange(0, _ROWS)
    projected = tl.zeros([N, PAD], tl.float32)
    # A slice of the dims at a time: a whole product in IEEE arithmetic would not fit the registers.
    for first in range(0, DIM, _ROWS):
        dim = first + step
        inside = there[:, None] & (dim < DIM)[None, :]
        vectors = tl.load(rows[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + dim, mask=dim < DIM, other=0.0)
        kept = (dim < DIM)[:, None] & (column < DIMS)[None, :]
        axes = tl.load(map_ptr + dim[:, None] * RANK + column[None, :], mask=kept, other=0.0)
        centred = tl.where(inside, vectors - mean[None, :], 0.0)
        projected = tl.dot(centred, axes, projected, input_precision="ieee")
    return projected


@kernel
def _write_plane(
    rows, at, mask, mean_ptr, map_ptr, steps_ptr, N: tl.constexpr, DIM: tl.constexpr, RANK: tl.constexpr,
    DIMS: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Encode the keys at ``rows`` into one plane and write its words at ``at`` (N)."""
    PER: tl.constexpr = 32 // BITS
    column, word = tl.arange(0, PAD), tl.arange(0, PAD // PER)
    steps = tl.load(steps_ptr + column, mask=column < DIMS, other=1.0)
    codes = _levels(_projected_rows(rows, mask, mean_ptr, map_ptr, N, DIM, RANK, DIMS, PAD) / steps[None, :], BITS)
    words = tl.sum(tl.reshape(codes, [N, PAD // PER, PER]) << (BITS * tl.arange(0, PER))[None, None, :], 2)
    tl.store(at[:, None] + word[None, :] * _TILE, words, mask=mask[:, None] & (word < DIMS // PER)[None, :])


@kernel
def encode_keys_kernel(
    keys_ptr, packed_ptr, mean_ptr, map_ptr, steps_ptr, first, stop,
    keys_batch, keys_head, keys_slot, packed_batch, packed_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, RANK: tl.constexpr, DIMS: tl.constexpr, PAD: tl.constexpr,
    BITS: tl.constexpr, DIMS2: tl.constexpr, PAD2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, block): the packed low-rank keys of ``BLOCK`` slots from ``first`` on, up to ``stop`` - 1."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    slot = first + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = keys_ptr + batch * keys_batch + head * keys_head + slot.to(tl.int64) * keys_slot
    WORDS: tl.constexpr = DIMS * BITS // 32 + DIMS2 // 16
    at = packed_ptr + batch * packed_batch + head * packed_head
    at = at + (slot // _TILE) * (_TILE * WORDS) + slot % _TILE
    mean, axes, steps, mask = mean_ptr + head * DIM, map_ptr + head * (DIM * RANK), steps_ptr + head * RANK, slot < stop
    _write_plane(rows, at, mask, mean, axes, steps, BLOCK, DIM, RANK, DIMS, PAD, BITS)
    if DIMS2 > 0:
        at += DIMS * BITS // 32 * _TILE
        _write_plane(rows, at, mask, mean, axes + DIMS, steps + DIMS, BLOCK, DIM, RANK, DIMS2, PAD2, 2)


@kernel
def project(
    vectors,
    stride,
    mean_ptr,
    map_ptr,
    N: tl.constexpr,
    CENTRED: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    DIMS: tl.constexpr,
    PAD: tl.constexpr,
):
    """N vectors, ``stride`` apart, less the mean where ``CENTRED``, on DIMS axes: a tuple of N float32 tiles (PAD)."""
    column, row = tl.arange(0, PAD), tl.arange(0, _ROWS)
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros([_ROWS, PAD], tl.float32),)
    for first in range(0, DIM, _ROWS):
        dim = first + row
        kept = (dim < DIM)[:, None] & (column < DIMS)[None, :]
        axes = tl.load(map_ptr + dim[:, None] * RANK + column[None, :], mask=kept, other=0.0)
        added = ()
        for n in tl.static_range(N):
            vector = tl.load(vectors + n * stride + dim, mask=dim < DIM, other=0.0).to(tl.float32)
            if CENTRED:
                vector -= tl.load(mean_ptr + dim, mask=dim < DIM, other=0.0)
            added = added + (sums[n] + vector[:, None] * axes,)
        sums = added
    projected = ()
    for n in tl.static_range(N):
        projected = projected + (tl.sum(sums[n], 0),)
    return projected


@kernel
def append_plane(
    key,
    at,
    mean_ptr,
    map_ptr,
    steps_ptr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    DIMS: tl.constexpr,
    PAD: tl.constexpr,
    BITS: tl.constexpr,
):
    """Encode one key into one plane and write its words from ``at`` on."""
    PER: tl.constexpr = 32 // BITS
    column = tl.arange(0, PAD)
    encoded = project(key, 0, mean_ptr, map_ptr, 1, True, DIM, RANK, DIMS, PAD)
    steps = tl.load(steps_ptr + column, mask=column < DIMS, other=1.0)
    grouped = tl.reshape(_levels(encoded[0] / steps, BITS), [PAD // PER, PER])
    word = tl.arange(0, PAD // PER)
    words = tl.sum(grouped << (BITS * tl.arange(0, PER))[None, :], 1)
    tl.store(at + word * _TILE, words, mask=word < DIMS // PER)


@kernel
def absorb_blocks(
    keys, values, keys_slot, values_slot, mean_ptr, map_ptr, value_sums, encoded_sums, product_sums, start, covered, target,
    DIM: tl.constexpr, PADDED: tl.constexpr, RANK: tl.constexpr, R1: tl.constexpr, R1_PAD: tl.constexpr,
):  # fmt: skip
    """Add the tokens from ``covered`` to ``target``, whole blocks, to one row's sums (``core.tail``)."""
    dim, column, token = tl.arange(0, PADDED), tl.arange(0, R1_PAD), tl.arange(0, _ROWS)
    held = (column < R1)[:, None] & (dim < DIM)[None, :]
    value_sum, encoded_sum = tl.zeros([PADDED], tl.float32), tl.zeros([R1_PAD], tl.float32)
    product_sum = tl.zeros([R1_PAD, PADDED], tl.float32)
    for first in range(covered, target, _ROWS):
        slot = (start + first + token).to(tl.int64)
        encoded = _projected_rows(keys + slot * keys_slot, token >= 0, mean_ptr, map_ptr, _ROWS, DIM, RANK, R1, R1_PAD)
        at = values + slot[:, None] * values_slot + dim[None, :]
        value = tl.load(at, mask=(token >= 0)[:, None] & (dim < DIM)[None, :], other=0.0).to(tl.float32)
        value_sum += tl.sum(value, 0)
        encoded_sum += tl.sum(encoded, 0)
        product_sum = tl.dot(tl.trans(encoded), value, product_sum, input_precision="ieee")
    if target > covered:
        at = product_sums + column[:, None] * DIM + dim[None, :]
        tl.store(at, tl.load(at, mask=held, other=0.0) + product_sum, mask=held)
        at = value_sums + dim
        tl.store(at, tl.load(at, mask=dim < DIM, other=0.0) + value_sum, mask=dim < DIM)
        at = encoded_sums + column
        tl.store(at, tl.load(at, mask=column < R1, other=0.0) + encoded_sum, mask=column < R1)
