"""Which tokens one row attends: forced tokens, the sample, the group's combination, codes and top-k, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import noise
from loki_attention.core import selection

COUNTS = st.integers(0, 60)
few = settings(max_examples=60, deadline=None, derandomize=True)


@given(COUNTS, st.integers(0, 10), st.integers(0, 10))
@few
def test_forced_are_the_first_and_the_last(count: int, sinks: int, recent: int) -> None:
    expected = {*range(count)[:sinks], *range(count)[max(0, count - recent) :]}
    assert set(selection.forced(count, sinks, recent).nonzero().flatten().tolist()) == expected


def sample_by_hand(slots: list[int]) -> list[bool]:
    """Tiles of 16 slots counted from the first valid slot's; number S mod n modulo n, n = max(1, S // 512)."""
    stride = max(1, len(slots) // 512)
    return [(slot // 16 - slots[0] // 16) % stride == len(slots) % stride for slot in slots]


@pytest.mark.parametrize("count", [1, 33, 511, 512, 1023, 1024, 1500, 2048, 2100, 5003])
@pytest.mark.parametrize("first", [0, 5, 16, 37])
def test_sample(count: int, first: int) -> None:
    slots = torch.arange(first, first + count)
    in_sample = selection.sampled(slots)
    assert in_sample.tolist() == sample_by_hand(slots.tolist())
    if count < 1024:
        assert in_sample.all()
    assert min(count, 400) <= int(in_sample.sum()) <= 1024 + 32


def test_sample_takes_all_of_a_tile_and_ignores_holes() -> None:
    slots = torch.arange(3000)[torch.rand(3000, generator=torch.Generator().manual_seed(0)) < 0.7]
    in_sample = selection.sampled(slots)
    assert in_sample.tolist() == sample_by_hand(slots.tolist())
    tiles = {tile: in_sample[slots // 16 == tile] for tile in (slots // 16).unique().tolist()}
    assert all(bool(members.all() or not members.any()) for members in tiles.values())


def test_each_tile_has_its_turn_as_the_sequence_grows() -> None:
    drawn = torch.zeros(2100, dtype=torch.bool)
    for count in range(2048, 2052):
        drawn[:count] |= selection.sampled(torch.arange(count))
    assert drawn[:2048].all()


@given(st.integers(2, 60), st.integers(0, 4), st.integers(0, 4), st.integers(0, 1000))
@few
def test_log_mass_of_a_whole_sample_is_exact(count: int, sinks: int, recent: int, seed: int) -> None:
    scores = 3 * noise(3, count, seed=seed)
    everything = torch.ones(count, dtype=torch.bool)
    mass = selection.log_mass(scores, selection.forced(count, sinks, recent), everything)
    torch.testing.assert_close(mass, scores.logsumexp(-1))


def test_log_mass_scales_the_unforced_sample_up() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], dtype=torch.float64)
    in_sample = torch.tensor([True, True, False, True, False, False])
    mass = selection.log_mass(scores, selection.forced(6, 1, 1), in_sample)
    weights = np.exp(scores.numpy()[0])
    # Forced: 1 and 6, sampled or not. Unforced: four, of which two are sampled.
    expected = np.log(weights[0] + weights[5] + 4 / 2 * (weights[1] + weights[3]))
    np.testing.assert_allclose(mass, [expected], rtol=1e-7)


def test_log_mass_without_an_unforced_sample_is_that_of_the_forced() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    none = torch.zeros(3, dtype=torch.bool)
    mass = selection.log_mass(scores, selection.forced(3, 1, 1), none)
    np.testing.assert_allclose(mass, [np.log(np.exp(1) + np.exp(3))])


@pytest.mark.parametrize("group", [1, 4, 7])
def test_combine_is_the_tempered_maximum(group: int) -> None:
    scores = 2 * noise(group, 50, seed=1)
    mass = scores.logsumexp(-1)
    wide, exact = scores.numpy(), np.log(np.exp(scores.numpy()).sum(1))
    expected = (wide - 0.75 * exact[:, None]).max(0) + 0.75 * exact.min()
    np.testing.assert_allclose(selection.combine(scores, mass), expected, rtol=1e-12)


def test_one_head_alone_keeps_its_scores() -> None:
    scores = noise(1, 50, seed=1)
    torch.testing.assert_close(selection.combine(scores, scores.logsumexp(-1)), scores[0])


def test_heads_that_agree_rank_as_one() -> None:
    scores = noise(1, 50, seed=1).expand(4, -1)
    torch.testing.assert_close(selection.combine(scores, scores.logsumexp(-1)), scores[0])


def test_a_head_that_rests_on_its_sink_asks_for_little() -> None:
    """The second head has the higher score at token 2, but nearly all of its mass lies on token 0."""
    scores = torch.tensor([[0.0, 3.0, 0.0, 0.0], [20.0, 0.0, 4.0, 0.0]], dtype=torch.float64)
    combined = selection.combine(scores, scores.logsumexp(-1))
    assert combined[1] > combined[2]


@pytest.mark.parametrize(
    ("combined", "deviations", "codes"),
    [
        ([0.0, 1.0, -1.0, 0.5], [1.0], [0, 2048, -2048, 1024]),
        ([1.0], [0.5, 2.0, 1.0], [1024]),
        ([15.9995, 16.0, 1e9, -16.0, -1e9], [1.0], [32767, 32767, 32767, -32768, -32768]),
        ([0.5 / 2048, 1.5 / 2048, 2.4 / 2048, 2.6 / 2048], [1.0], [0, 2, 2, 3]),
        ([1.0, -7.0, 0.0], [0.0, 0.0], [0, 0, 0]),
    ],
)
def test_code(combined: list[float], deviations: list[float], codes: list[int]) -> None:
    ours = selection.code(torch.tensor(combined, dtype=torch.float64), torch.tensor(deviations, dtype=torch.float64))
    assert ours.tolist() == codes


def top_k_by_hand(ranking: Tensor, is_forced: Tensor, k: int) -> list[int]:
    order = sorted(range(len(ranking)), key=lambda i: (not is_forced[i], -float(ranking[i]), i))
    return sorted(order[:k])


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(0, 3), st.integers(0, 3), st.integers(0, 40))
@few
def test_top_k_with_many_ties(ranking: list[int], sinks: int, recent: int, extra: int) -> None:
    is_forced = selection.forced(len(ranking), sinks, recent)
    k = min(len(ranking), int(is_forced.sum()) + extra)
    expected = top_k_by_hand(torch.tensor(ranking), is_forced, k)
    assert selection.top_k(torch.tensor(ranking), is_forced, k).tolist() == expected
    assert selection.top_k(torch.tensor(ranking, dtype=torch.float32), is_forced, k).tolist() == expected
    assert len(expected) == k
    assert set(is_forced.nonzero().flatten().tolist()) <= set(expected)


@given(st.permutations(list(range(12))), st.integers(0, 12))
@few
def test_top_k_of_distinct_scores_does_not_depend_on_their_order(order: list[int], k: int) -> None:
    ranking, none = noise(12, seed=0), torch.zeros(12, dtype=torch.bool)
    plain = {float(ranking[i]) for i in selection.top_k(ranking, none, k)}
    shuffled = ranking[torch.tensor(order)]
    assert {float(shuffled[i]) for i in selection.top_k(shuffled, none, k)} == plain
