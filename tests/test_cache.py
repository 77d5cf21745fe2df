"""The layer cache: K and V are the tokens in buffers that grow by a quarter, twins a fresh encoding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import Layer, Shape, noise, random_encoder
from layer_caches import PLANES, SHAPE, assert_sums_are_fresh, assert_twins_are_fresh, filled, held, rows_of, tokens
from loki_attention.cache import LayerCache
from loki_attention.core.encoder import Encoder


def test_empty() -> None:
    cache = LayerCache(100)
    assert (cache.keys, cache.values, cache.length, cache.capacity) == (None, None, 0, 0)
    assert cache.bytes == {"cache": 0, "twins": 0, "sums": 0}
    cache.select_batch(lambda tensor: tensor[:1])
    cache.crop(5)
    cache.reset()
    assert cache.length == 0


@given(st.lists(st.integers(0, 40), max_size=8), st.sampled_from([0, 30, 200]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_append_equals_concatenation(chunks: list[int], capacity: int) -> None:
    layer, cache, start = tokens(sum(chunks) + 1), LayerCache(capacity), 0
    for chunk in (*chunks, 1):
        cache.append(layer.keys[:, :, start : start + chunk], layer.values[:, :, start : start + chunk])
        start += chunk
        assert cache.length == start <= cache.capacity
    assert torch.equal(held(cache)[0], layer.keys)
    assert torch.equal(held(cache)[1], layer.values)


def test_grows_by_a_quarter() -> None:
    layer, cache, capacities = tokens(700), LayerCache(), []
    cache.append(layer.keys[:, :, :100], layer.values[:, :, :100])
    for i in range(100, 700):
        cache.append(layer.keys[:, :, i : i + 1], layer.values[:, :, i : i + 1])
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [125, 156, 195, 243, 303, 378, 472, 590, 737]
    assert torch.equal(held(cache)[0], layer.keys)


def test_a_long_append_gets_exactly_the_room_it_needs() -> None:
    layer, cache = tokens(500), LayerCache()
    for start, stop, capacity in ((0, 100, 100), (100, 500, 500)):
        cache.append(layer.keys[:, :, start:stop], layer.values[:, :, start:stop])
        assert cache.capacity == capacity


def test_capacity_is_honoured_and_buffers_stay() -> None:
    layer = tokens(300)
    cache = filled(Layer(*(t[:, :, :100] for t in layer[:3]), layer.valid), capacity=300)
    place = held(cache)[0].data_ptr()
    for i in range(100, 300):
        cache.append(layer.keys[:, :, i : i + 1], layer.values[:, :, i : i + 1])
    assert (cache.capacity, cache.length) == (300, 300)
    assert held(cache)[0].data_ptr() == place
    cache.append(layer.keys[:, :, :1], layer.values[:, :, :1])
    assert cache.capacity == 375


def test_keys_and_values_are_views() -> None:
    cache = filled(tokens(50), capacity=60)
    for tensor in held(cache):
        assert tensor.shape == (2, 2, 50, 64)
        tensor[0, 0, 3] = 7.0
    assert all((tensor[0, 0, 3] == 7.0).all() for tensor in held(cache))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_twins_follow_appends(dtype: torch.dtype) -> None:
    layer, ours, cache = tokens(300, dtype=dtype), random_encoder(SHAPE, PLANES, dtype=dtype), LayerCache()
    start = 0
    for stop in (1, 2, 64, 65, 66, 200, 300):
        cache.append(layer.keys[:, :, start:stop], layer.values[:, :, start:stop])
        assert_twins_are_fresh(cache, ours)
        start = stop


def test_twins_of_more_tokens_than_are_encoded_at_once() -> None:
    shape = Shape(1, 1, 16)
    ours, keys = random_encoder(shape, "8@4", dtype=torch.float32), noise(1, 1, 9000, 16, seed=0).float()
    cache = LayerCache()
    cache.append(keys, keys)
    assert_twins_are_fresh(cache, ours)


def test_only_new_tokens_are_encoded() -> None:
    ours, cache = random_encoder(SHAPE, PLANES, dtype=torch.float32), filled(tokens(100))
    cache.encode(ours)
    before = ours.encode_keys(held(cache)[0])
    held(cache)[0][:, :, :100] = 0
    new = tokens(5, seed=1)
    cache.append(new.keys, new.values)
    assert torch.equal(cache.encode(ours)[:, :, :100], before)


@pytest.mark.parametrize(
    "other",
    [random_encoder(SHAPE, PLANES, "pca-pre", torch.float32), random_encoder(SHAPE, "16@8", dtype=torch.float32)],
)
def test_another_encoder_starts_afresh(other: Encoder) -> None:
    layer, ours = tokens(200), random_encoder(SHAPE, PLANES, dtype=torch.float32)
    cache = filled(layer)
    for encoder in (ours, other, ours):
        assert_twins_are_fresh(cache, encoder)
        assert_sums_are_fresh(cache, encoder, layer.valid)


def test_bytes() -> None:
    layer, ours = tokens(200, dtype=torch.float16), random_encoder(SHAPE, PLANES, dtype=torch.float16)
    cache = filled(layer, capacity=256)
    assert cache.bytes == {"cache": 2 * 2 * 2 * 256 * 64 * 2, "twins": 0, "sums": 0}
    cache.encode(ours)
    cache.absorb(ours, rows_of(layer.valid))
    sums = 4 * (2 + 2 * 2 * (64 + 16 + 16 * 64))
    assert cache.bytes == {"cache": 2 * 2 * 2 * 256 * 64 * 2, "twins": 2 * 2 * 256 * 16, "sums": sums}
    assert cache.bytes["twins"] * 16 == cache.bytes["cache"]
