"""Streaming moments: chunks, merges and float64 sums, against numpy."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import Shape, draw, moments_of, noise
from loki_attention.core.moments import LayerMoments, Moments


def moments_over(*chunks: Tensor) -> Moments:
    moments = Moments.empty(chunks[0].shape[0], chunks[0].shape[2])
    for chunk in chunks:
        moments.add(chunk)
    return moments


def assert_same(ours: Moments, other: Moments) -> None:
    assert ours.count == other.count
    torch.testing.assert_close(ours.total, other.total, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(ours.outer, other.outer, rtol=1e-12, atol=1e-10)


@given(st.lists(st.integers(0, 120), max_size=4))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_chunked_equals_whole(cuts: list[int]) -> None:
    vectors = noise(2, 120, 8, seed=0)
    bounds = [0, *sorted(cuts), 120]
    chunks = [vectors[:, start:stop] for start, stop in pairwise(bounds)]
    assert_same(moments_over(*chunks), moments_over(vectors))


def test_merge_equals_concatenation() -> None:
    first, second = noise(2, 50, 8, seed=0), noise(2, 31, 8, seed=1)
    merged = moments_over(first)
    merged.merge(moments_over(second))
    assert_same(merged, moments_over(torch.cat([first, second], 1)))


def test_merging_nothing_changes_nothing() -> None:
    vectors = noise(2, 50, 8, seed=0)
    merged = moments_over(vectors)
    merged.merge(Moments.empty(2, 8))
    assert_same(merged, moments_over(vectors))


def test_against_numpy() -> None:
    vectors = noise(2, 300, 6, seed=0) + 3.0
    moments, wide = moments_over(vectors), vectors.numpy()
    np.testing.assert_allclose(moments.mean.numpy(), wide.mean(1), rtol=1e-12)
    for head in range(2):
        np.testing.assert_allclose(moments.second_moment[head], wide[head].T @ wide[head] / 300, rtol=1e-12)
        np.testing.assert_allclose(moments.covariance[head], np.cov(wide[head].T, bias=True), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_float64_whatever_comes_in(dtype: torch.dtype) -> None:
    vectors = (noise(1, 5000, 4, seed=0) + 100).to(dtype)
    moments = moments_over(*vectors.split(700, dim=1))
    assert moments.total.dtype == moments.outer.dtype == torch.float64
    wide = vectors.double().numpy()[0]
    np.testing.assert_allclose(moments.total[0], wide.sum(0), rtol=1e-13)
    np.testing.assert_allclose(moments.outer[0], wide.T @ wide, rtol=1e-13)


def test_two_empties_share_nothing() -> None:
    first, second = Moments.empty(1, 3), Moments.empty(1, 3)
    first.add(torch.ones(1, 1, 3))
    assert second.total.abs().sum() == second.outer.abs().sum() == second.count == 0
    assert torch.equal(first.outer, torch.ones(1, 3, 3, dtype=torch.float64))


def test_gradients_are_not_kept() -> None:
    moments = moments_over(torch.ones(1, 2, 3, requires_grad=True))
    assert not moments.outer.requires_grad


def test_layer_moments_merge_all_three_parts() -> None:
    shape = Shape(2, 3, 8)
    one, other = (moments_of(draw(shape, 20, seed=seed)) for seed in (0, 1))
    expected = LayerMoments.empty(2, 8)
    for seed in (0, 1):
        sample = draw(shape, 20, seed=seed)
        expected.pre_keys.add(sample.pre_keys)
        expected.post_keys.add(sample.keys)
        expected.queries.add(sample.queries)
    one.merge(other)
    for name in ("pre_keys", "post_keys", "queries"):
        assert_same(getattr(one, name), getattr(expected, name))


@pytest.mark.parametrize("group", [1, 4, 7])
def test_query_moment_is_summed_over_the_group(group: int) -> None:
    sample = draw(Shape(2, group, 8), 50)
    moments = moments_of(sample)
    assert moments.group_size == group
    by_head = sample.queries.unflatten(1, (group, 50))
    expected = torch.einsum("kgnd,kgne->kde", by_head, by_head) / 50
    torch.testing.assert_close(moments.group_query_moment, expected, rtol=1e-12, atol=1e-12)
