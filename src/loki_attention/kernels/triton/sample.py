"""The sample of ``core.selection.sampled`` on the device: tiles of 16 slots, every n-th of them."""

import triton.language as tl

from loki_attention.kernels.triton.jit import kernel

_TILE = tl.constexpr(16)
_SAMPLED_TOKENS = tl.constexpr(512)


@kernel
def sampling_stride(tokens):
    """How many tiles lie from one sampled tile to the next."""
    return tl.maximum(tokens // _SAMPLED_TOKENS, 1)


@kernel
def sample_size(start, stop, tokens):
    """How many slots the sampled tiles between ``start`` and ``stop`` hold."""
    stride = sampling_stride(tokens)
    tiles = tl.maximum((stop + _TILE - 1) // _TILE - start // _TILE, 0)
    return (tl.maximum(tiles - tokens % stride, 0) + stride - 1) // stride * _TILE


@kernel
def sampled_slot(i, start, tokens):
    """The ``i``-th slot of the sample; beyond its size, slots that are behind the last."""
    stride = sampling_stride(tokens)
    return (start // _TILE + i // _TILE * stride + tokens % stride) * _TILE + i % _TILE
