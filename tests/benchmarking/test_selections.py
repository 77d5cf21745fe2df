"""Recorded selections: what the file holds, and that any length gets as many slots as it asks for."""

import pytest
import torch

from loki_attention.benchmarking.selections import RECORDED_TOKENS, Forced, real_selection, recorded


@pytest.mark.parametrize("fraction", [1 / 8, 1 / 16, 1 / 32])
def test_every_set_holds_the_budget(fraction):
    sets = recorded(fraction)
    assert sets.shape[1] == RECORDED_TOKENS
    assert len(sets) >= 64
    assert (sets.sum(1).float() / RECORDED_TOKENS - fraction).abs().max() < 1e-3


@pytest.mark.parametrize(("tokens", "k"), [(300, 64), (4096, 512), (9000, 1000), (20000, 700)])
def test_slots_are_as_many_as_asked_for(tokens, k):
    slots = real_selection(tokens, k, 3, Forced(4, 32), seed=1)
    assert slots.shape == (3, k)
    assert bool((slots.diff() > 0).all())
    assert 0 <= int(slots.min()) <= int(slots.max()) < tokens
    always = {*range(4), *range(tokens - 32, tokens)}
    assert all(always <= set(row) for row in slots.tolist())
    assert torch.equal(slots, real_selection(tokens, k, 3, Forced(4, 32), seed=1))


def test_a_models_selection_clusters():
    slots = real_selection(16384, 2048, 4, Forced(4, 32), seed=0)
    neighbours = (slots.diff() == 1).float().mean()
    assert float(neighbours) > 2 / 8
