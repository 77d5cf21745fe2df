"""Whatever happens to a cache, twins equal a fresh encoding and sums fresh sums over its contents."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from helpers import Layer, random_encoder, random_layer
from layer_caches import PLANES, SHAPE, assert_sums_are_fresh, assert_twins_are_fresh, filled, held, rows_of, tokens
from loki_attention.cache import LayerCache


def test_sums_without_an_encoder_start_afresh_with_one() -> None:
    layer, ours = tokens(200), random_encoder(SHAPE, PLANES, dtype=torch.float32)
    cache = filled(layer)
    for encoder in (None, ours, None):
        assert_sums_are_fresh(cache, encoder, layer.valid)


def growing(layer: Layer, stops: tuple[int, ...]) -> Iterator[tuple[LayerCache, Tensor]]:
    """One cache as it grows to each of ``stops`` slots, and which of them are valid then."""
    cache, start = LayerCache(), 0
    for stop in stops:
        cache.append(layer.keys[:, :, start:stop], layer.values[:, :, start:stop])
        yield cache, layer.valid[:, :stop]
        start = stop


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_sums_of_growing_sequences(holes: bool, dtype: torch.dtype) -> None:
    layer = random_layer(SHAPE, (400, 310, 40), dtype=dtype, holes=holes)
    ours = random_encoder(SHAPE, PLANES, dtype=dtype)
    for cache, valid in growing(layer, (10, 127, 128, 129, 200, 320, 321, 400)):
        assert_sums_are_fresh(cache, ours, valid)
        assert cache.absorb(ours, rows_of(valid)).values.dtype == torch.promote_types(dtype, torch.float32)


def test_absorb_reads_only_what_changed() -> None:
    """Covered tokens may be anything afterwards: they are in the sums. So may those not yet covered."""
    layer, ours = tokens(200), random_encoder(SHAPE, PLANES, dtype=torch.float32)
    cache = filled(layer)
    before = copy.deepcopy(cache.absorb(ours, rows_of(layer.valid)))
    held(cache)[0][:] = torch.nan
    held(cache)[1][:] = torch.nan
    for old, new in zip(before, cache.absorb(ours, rows_of(layer.valid)), strict=True):
        assert torch.equal(old, new)


def test_padding_may_hold_anything() -> None:
    layer, ours = (
        random_layer(SHAPE, (300, 150), dtype=torch.float32),
        random_encoder(SHAPE, PLANES, dtype=torch.float32),
    )
    for tensor in layer[1:3]:
        tensor[1, :, :150] = torch.nan
    cache = filled(layer)
    assert_sums_are_fresh(cache, ours, layer.valid)
    assert all(part.isfinite().all() for part in cache.absorb(ours, rows_of(layer.valid)))


@pytest.mark.parametrize("keep", [0, 50, 130, 192, 256, 257, 399, 400, 999])
def test_crop(keep: int) -> None:
    """What goes is subtracted before it is overwritten."""
    layer, ours = (
        random_layer(SHAPE, (400, 310), dtype=torch.float32),
        random_encoder(SHAPE, PLANES, dtype=torch.float32),
    )
    cache = filled(layer)
    cache.encode(ours)
    cache.absorb(ours, rows_of(layer.valid))
    cache.crop(keep)
    kept = min(keep, 400)
    assert cache.length == kept
    assert torch.equal(held(cache)[0], layer.keys[:, :, :kept])
    new, valid = tokens(70, seed=5), torch.cat([layer.valid[:, :kept], torch.ones(2, 70, dtype=torch.bool)], 1)
    cache.append(new.keys, new.values)
    assert torch.equal(held(cache)[1], torch.cat([layer.values[:, :, :kept], new.values], 2))
    assert_twins_are_fresh(cache, ours)
    assert_sums_are_fresh(cache, ours, valid)


def test_crop_after_tokens_that_were_never_absorbed() -> None:
    layer, ours = tokens(400), random_encoder(SHAPE, PLANES, dtype=torch.float32)
    cache = filled(Layer(*(tensor[:, :, :200] for tensor in layer[:3]), layer.valid))
    cache.absorb(ours, rows_of(layer.valid[:, :200]))
    cache.append(layer.keys[:, :, 200:], layer.values[:, :, 200:])
    cache.crop(300)
    assert_sums_are_fresh(cache, ours, layer.valid[:, :300])


def test_crop_again_and_again() -> None:
    """Drafts rejected at a block's edge: sums go up and down and stay those of the contents."""
    layer, ours = tokens(330, dtype=torch.float64), random_encoder(SHAPE, PLANES)
    cache = filled(layer)
    for _ in range(10):
        for length in (318, 330):
            cache.crop(length)
            missing = layer.keys[:, :, cache.length : 330], layer.values[:, :, cache.length : 330]
            assert_sums_are_fresh(cache, ours, layer.valid[:, : cache.length])
            cache.append(*missing)
    sums = cache.absorb(ours, rows_of(layer.valid))
    torch.testing.assert_close(sums.values, layer.values[:, :, :256].sum(2), rtol=1e-12, atol=1e-10)


PICKS: dict[str, Callable[[Tensor], Tensor]] = {
    "reorder": lambda tensor: tensor.index_select(0, torch.tensor([2, 0, 0])),
    "repeat": lambda tensor: tensor.repeat_interleave(2, dim=0),
    "select": lambda tensor: tensor[torch.tensor([1]), ...],
}


@pytest.mark.parametrize("pick", PICKS.values(), ids=PICKS)
def test_reorder_repeat_and_select(pick: Callable[[Tensor], Tensor]) -> None:
    layer = random_layer(SHAPE, (400, 310, 150), dtype=torch.float32)
    ours, cache = random_encoder(SHAPE, PLANES, dtype=torch.float32), filled(layer)
    twins = cache.encode(ours)
    sums = cache.absorb(ours, rows_of(layer.valid))
    expected = [pick(tensor).clone() for tensor in (layer.keys, layer.values, twins, *sums)]
    cache.select_batch(pick)
    picked = [*held(cache), cache.encode(ours), *cache.absorb(ours, rows_of(pick(layer.valid)))]
    assert all(torch.equal(ours_, theirs) for ours_, theirs in zip(picked, expected, strict=True))
    new = tokens(100, batch=len(picked[0]), seed=5)
    cache.append(new.keys, new.values)
    assert_twins_are_fresh(cache, ours)
    valid = torch.cat([pick(layer.valid), torch.ones(len(picked[0]), 100, dtype=torch.bool)], 1)
    assert_sums_are_fresh(cache, ours, valid)


def test_reorder_before_anything_is_derived() -> None:
    layer, ours = (
        random_layer(SHAPE, (300, 200), dtype=torch.float32),
        random_encoder(SHAPE, PLANES, dtype=torch.float32),
    )
    cache = filled(layer)
    cache.select_batch(lambda tensor: tensor.flip(0))
    assert_twins_are_fresh(cache, ours)
    assert_sums_are_fresh(cache, ours, layer.valid.flip(0))


@pytest.mark.parametrize("change", ["hole", "shift", "shorter"])
def test_a_changed_mask_starts_afresh(change: str) -> None:
    layer, ours = tokens(300), random_encoder(SHAPE, PLANES, dtype=torch.float32)
    cache = filled(layer)
    cache.absorb(ours, rows_of(layer.valid))
    valid = layer.valid.clone()
    if change == "hole":
        valid[0, 50] = False
    elif change == "shift":
        valid[1, :20] = False
    else:
        valid[:, :100] = False
    assert_sums_are_fresh(cache, ours, valid)


def test_a_deep_copy_goes_its_own_way() -> None:
    layer, ours = tokens(300), random_encoder(SHAPE, PLANES, dtype=torch.float32)
    cache = filled(layer)
    cache.encode(ours)
    cache.absorb(ours, rows_of(layer.valid))
    other = copy.deepcopy(cache)
    new = tokens(100, seed=3)
    other.append(new.keys, new.values)
    held(other)[0][:, :, :5] = 0
    assert cache.length == 300
    assert torch.equal(held(cache)[0], layer.keys)
    assert_twins_are_fresh(cache, ours)
    assert_sums_are_fresh(cache, ours, layer.valid)
    other.crop(0)
    other.append(new.keys, new.values)
    assert_twins_are_fresh(other, ours)


def test_reset_frees() -> None:
    layer, ours = tokens(300), random_encoder(SHAPE, PLANES, dtype=torch.float32)
    cache = filled(layer)
    cache.encode(ours)
    cache.absorb(ours, rows_of(layer.valid))
    cache.reset()
    assert (cache.keys, cache.length, cache.capacity) == (None, 0, 0)
    assert sum(cache.bytes.values()) == 0
    again = random_layer(SHAPE, (150,) * 3, seed=9, dtype=torch.float32)
    cache.append(again.keys, again.values)
    assert_twins_are_fresh(cache, ours)
    assert_sums_are_fresh(cache, ours, again.valid)
