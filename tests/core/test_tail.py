"""The virtual token: what its sums cover, its log-mass and its value."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import noise
from loki_attention.core.tail import TAILS, TailSums, check_tail, covered_tokens, tail_log_mass, tail_value
from loki_attention.errors import ArgumentError


@pytest.mark.parametrize(
    ("tokens", "covered"), [(0, 0), (1, 0), (64, 0), (127, 0), (128, 64), (191, 64), (192, 128), (1000, 896)]
)
def test_covered_tokens_are_whole_blocks_one_behind(tokens: int, covered: int) -> None:
    assert covered_tokens(torch.tensor([tokens])).tolist() == [covered]
    assert covered == 64 * max(0, tokens // 64 - 1)


@given(st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_log_mass_of_a_whole_sample_is_that_of_the_unselected(count: int, seed: int) -> None:
    scores, offset = noise(2, count, seed=seed), noise(2, seed=seed + 1)
    selected = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.4
    mass = tail_log_mass(scores, offset, selected, torch.ones(count, dtype=torch.bool))
    with np.errstate(divide="ignore"):
        expected = np.log(np.exp(scores[:, ~selected].numpy()).sum(1)) + offset.numpy()
    np.testing.assert_allclose(mass, expected, rtol=1e-12)


def test_log_mass_scales_the_sample_up() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    selected = torch.tensor([False, False, False, False, True])
    in_sample = torch.tensor([True, False, True, False, True])
    mass = tail_log_mass(scores, torch.tensor([0.5], dtype=torch.float64), selected, in_sample)
    np.testing.assert_allclose(mass, [np.log(4 / 2 * (np.exp(1.5) + np.exp(3.5)))])


def test_no_unselected_sample_has_no_mass() -> None:
    in_sample = torch.tensor([True, False, False])
    selected = torch.tensor([True, False, True])
    mass = tail_log_mass(torch.zeros(2, 3), torch.ones(2), selected, in_sample)
    assert mass.tolist() == [-torch.inf, -torch.inf]


def test_sums() -> None:
    encoded, values = noise(70, 3, seed=0), noise(70, 5, seed=1)
    sums = TailSums.of(encoded, values)
    assert float(sums.tokens) == 70
    np.testing.assert_allclose(sums.values, values.numpy().sum(0))
    np.testing.assert_allclose(sums.encoded, encoded.numpy().sum(0))
    np.testing.assert_allclose(sums.products, encoded.numpy().T @ values.numpy())


def test_mean_value_is_the_mean_whatever_the_query() -> None:
    values = noise(70, 5, seed=1)
    answer = tail_value("mean", TailSums.of(noise(70, 3, seed=0), values), noise(4, 3, seed=2), torch.ones(4), 0.5)
    np.testing.assert_allclose(answer, np.tile(values.numpy().mean(0), (4, 1)))


@pytest.mark.parametrize("deviation", [0.0, 0.3, 1.0, 1.7, 40.0])
def test_linear_value(deviation: float) -> None:
    encoded, values, leading = noise(70, 3, seed=0) + 2, noise(70, 5, seed=1) - 1, noise(4, 3, seed=2)
    answer = tail_value("linear", TailSums.of(encoded, values), leading, torch.full((4,), deviation), 0.5)
    e, v = encoded.numpy(), values.numpy()
    covariance = (e - e.mean(0)).T @ (v - v.mean(0)) / 70
    cap = 1.0 if deviation <= 1 else 1 / deviation
    np.testing.assert_allclose(answer, v.mean(0) + 0.5 * cap * leading.numpy() @ covariance, rtol=1e-6, atol=1e-12)


def test_linear_value_is_exact_for_gaussian_keys_and_values() -> None:
    """Weights exp(scale q . k) move the mean of V by scale Cov(v, k) q where keys and values are jointly normal."""
    keys = noise(200_000, 2, seed=0) @ noise(2, 2, seed=1)
    values = keys @ noise(2, 3, seed=2) + 0.3 * noise(200_000, 3, seed=3)
    query = torch.tensor([[0.4, -0.3], [0.1, 0.5]], dtype=torch.float64)
    weighted = (query @ keys.mT).softmax(-1) @ values
    deviation = (query @ keys.mT).std(-1)
    assert (deviation < 1).all()
    answer = tail_value("linear", TailSums.of(keys, values), query, deviation, 1.0)
    torch.testing.assert_close(answer, weighted, rtol=0, atol=0.02)
    assert (weighted - values.mean(0)).abs().max() > 0.2


def test_leading_axes_are_free() -> None:
    """A batch of sums and rows equals each alone."""
    encoded, values, leading = noise(2, 3, 70, 4, seed=0), noise(2, 3, 70, 5, seed=1), noise(2, 3, 6, 4, seed=2)
    deviation = noise(2, 3, 6, seed=3).abs()
    alone = [[TailSums.of(e, v) for e, v in zip(*pair, strict=True)] for pair in zip(encoded, values, strict=True)]
    stacked = TailSums(
        torch.full((2, 1, 1), 70.0, dtype=torch.float64),
        *(
            torch.stack([torch.stack([getattr(s, name) for s in row]) for row in alone])[:, :, None]
            for name in ("values", "encoded", "products")
        ),
    )
    together = tail_value("linear", stacked, leading, deviation, 0.5)
    for batch in range(2):
        for head in range(3):
            one = tail_value("linear", alone[batch][head], leading[batch, head], deviation[batch, head], 0.5)
            torch.testing.assert_close(together[batch, head], one)


def test_known_tails_pass_and_others_are_named() -> None:
    for tail in TAILS:
        check_tail(tail)
    with pytest.raises(ArgumentError, match=r"unknown tail 'liner'; known: none, mean, linear \(did you mean 'linear'"):
        check_tail("liner")


def test_no_tail_has_no_value() -> None:
    with pytest.raises(ArgumentError, match="tail 'none' has no value"):
        tail_value(
            "none", TailSums.of(noise(7, 1, seed=0), noise(7, 2, seed=1)), noise(1, 1, seed=2), torch.ones(1), 1.0
        )
