"""What the Triton kernels share: rounding, which slots a row sees, and integer products with packed low-rank keys.

Packed keys lie in tiles of 16 tokens, words of 4 bytes side by side (``native_encoder.to_tiles``): threads that take
neighbouring tokens read neighbouring words, and every word is unpacked in the register it was loaded into. Under the
interpreter instructions that it lacks are emulated, and 16-bit floats are widened, which it computes wrongly.
"""

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from loki_attention.kernels.triton.jit import kernel

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run under Triton's interpreter: decided when triton is first imported."""
_EMULATED = tl.constexpr(INTERPRETED)
_TILE = tl.constexpr(16)
_ROUNDER = tl.constexpr(12582912.0)


@kernel
def rounded(x):
    """The nearest whole number of each float32 below 2^22 in size, half-way cases to even, as int32."""
    return (x + _ROUNDER).to(tl.int32, bitcast=True) - 0x4B400000


@kernel
def narrowed(x, dtype: tl.constexpr):
    """A float32 tile as ``dtype``, rounded to nearest."""
    if _EMULATED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(dtype)


@kernel
def product(a, b):
    """The matrix product of two tiles, accumulated in float32; float32 tiles by three products of halves of theirs."""
    if _EMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@kernel
def span_of(start_ptr, stop_ptr, tokens_ptr, batch, VISIBLE: tl.constexpr):
    """First valid slot, slot behind the last, and number of tokens of a sequence, int32.

    ``VISIBLE``: 0, sequences start at slot 0; 1, at ``start``; 2, they have holes, and ``tokens`` counts what is visible.
    """
    stop = tl.load(stop_ptr + batch).to(tl.int32)
    if VISIBLE == 0:
        return stop * 0, stop, stop
    start = tl.load(start_ptr + batch).to(tl.int32)
    if VISIBLE == 1:
        return start, stop, stop - start
    return start, stop, tl.load(tokens_ptr + batch).to(tl.int32)


@kernel
def seen(rank_ptr, slot, start, stop, tokens, VISIBLE: tl.constexpr):
    """Each slot's place among the valid tokens, and whether it holds one of the first ``tokens``."""
    inside = (slot >= start) & (slot < stop)
    if VISIBLE == 2:
        place = tl.load(rank_ptr + slot, mask=inside, other=-1).to(tl.int32)
        return place, inside & (place >= 0) & (place < tokens)
    return slot - start, inside


@kernel
def _dot_bytes(keys, query, total):
    return tl.inline_asm_elementwise(
        "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [keys, query, total], dtype=tl.int32, is_pure=True, pack=1
    )


def _emulated_dot_bytes(keys, query, total):
    words, codes = (
        keys.handle.data.view(np.uint32),
        np.frombuffer(np.int32(query.handle.data.item()).tobytes(), np.int8),
    )
    data = total.handle.data.copy()
    for i in range(4):
        data += ((words >> np.uint32(8 * i)) & np.uint32(255)).astype(np.int32) * np.int32(codes[i])
    return tl.tensor(TensorHandle(data, tl.int32), total.type)


dot_bytes = _emulated_dot_bytes if INTERPRETED else _dot_bytes
"""``total`` plus the products of four unsigned bytes of a tile of words with the four signed ones of one word."""


@kernel
def _plus_plane(
    totals, at, query_ptr, mask, G: tl.constexpr, PARTS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr
):
    """The totals with one plane's products added; ``PARTS`` words of query codes a head."""
    for w in tl.static_range(WORDS):
        word = tl.load(at + w * _TILE, mask=mask, other=0)
        for part in tl.static_range(8 // BITS):
            codes = (word >> (part * BITS)) & (-1 if BITS == 8 else (0x0F0F0F0F if BITS == 4 else 0x03030303))
            added = ()
            for g in tl.static_range(G):
                query = tl.load(query_ptr + g * PARTS + w * (8 // BITS) + part)
                added = added + (dot_bytes(codes, query, totals[g]),)
            totals = added
    return totals


@kernel
def group_products(
    words_ptr, query_ptr, slot, mask, G: tl.constexpr, D8: tl.constexpr, D4: tl.constexpr, D2: tl.constexpr
):
    """Products of the group's query codes with the keys at ``slot``: a tuple of G int32 tiles; 0 where masked.

    Key codes count from 0: the query's ``shift`` is what that adds. A byte of a word holds 8 / bits neighbouring dims, so
    query codes come in words of the dims that lie at the same place in their bytes (``append``).
    """
    FOUR: tl.constexpr = D8 // 4
    TWO: tl.constexpr = FOUR + D4 // 8
    WORDS: tl.constexpr = TWO + D2 // 16
    PARTS: tl.constexpr = (D8 + D4 + D2) // 4
    at = words_ptr + (slot // _TILE) * (_TILE * WORDS) + slot % _TILE
    totals = ()
    for _ in tl.static_range(G):
        totals = totals + (tl.zeros(slot.shape, tl.int32),)
    totals = _plus_plane(totals, at, query_ptr, mask, G, PARTS, FOUR, 8)
    totals = _plus_plane(totals, at + FOUR * _TILE, query_ptr + D8 // 4, mask, G, PARTS, D4 // 8, 4)
    return _plus_plane(totals, at + TWO * _TILE, query_ptr + (D8 + D4) // 4, mask, G, PARTS, D2 // 16, 2)
