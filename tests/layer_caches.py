"""A layer cache of random tokens, and what must hold of it after any operation."""

import torch
from torch import Tensor

from helpers import Layer, Shape, random_layer
from loki_attention.cache import LayerCache
from loki_attention.core.encoder import Encoder
from loki_attention.kernels import torch_backend
from loki_attention.kernels.rows import Rows

SHAPE = Shape(2, 2, 64)
PLANES = "16@4+32@2"


def tokens(count: int, *, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Layer:
    """``count`` tokens in every slot of a batch."""
    return random_layer(SHAPE, (count,) * batch, seed=seed, dtype=dtype)


def filled(layer: Layer, capacity: int = 0) -> LayerCache:
    """A cache that holds the layer."""
    cache = LayerCache(capacity)
    cache.append(layer.keys, layer.values)
    return cache


def rows_of(valid: Tensor) -> Rows:
    """One new row a sequence."""
    return Rows.of(valid, valid.sum(-1, keepdim=True))


def held(cache: LayerCache) -> tuple[Tensor, Tensor]:
    """Keys and values in use."""
    assert cache.keys is not None
    assert cache.values is not None
    return cache.keys, cache.values


def assert_twins_are_fresh(cache: LayerCache, ours: Encoder) -> None:
    assert torch.equal(cache.encode(ours), ours.encode_keys(held(cache)[0]))


def assert_sums_are_fresh(cache: LayerCache, ours: Encoder | None, valid: Tensor) -> None:
    """What ``absorb`` gives equals sums over the cache's contents, in float32's tolerance."""
    sums, (keys, values) = cache.absorb(ours, rows_of(valid)), held(cache)
    fresh = torch_backend.sums_of_blocks(torch_backend.leading_dims(keys, ours), values, rows_of(valid))
    assert torch.equal(sums.tokens, fresh.tokens[:, 0])
    for name in ("values", "encoded", "products"):
        expected = getattr(fresh, name)[:, :, 0]
        torch.testing.assert_close(getattr(sums, name), expected, rtol=1e-4, atol=2e-3)
