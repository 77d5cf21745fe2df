import math
from itertools import product

import pytest
import torch

from loki_attention.errors import ArgumentError
from loki_attention.intervals import bootstrap_interval, sign_test, wilson_interval


def test_wilson_bounds_stay_in_range_and_hold_the_share():
    for n in (1, 10, 400):
        for successes in {0, 1, n // 2, n}:
            low, high = wilson_interval(successes, n)
            assert 0 <= low <= successes / n <= high <= 1
    assert wilson_interval(0, 10).high == pytest.approx(0.27753, abs=1e-5)
    for wrong in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ArgumentError):
            wilson_interval(*wrong)


def test_the_bootstrap_agrees_with_the_normal_approximation():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = bootstrap_interval(values, seed=0, resamples=2000)
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    assert low == pytest.approx(float(values.mean()) - half, abs=0.1 * half)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.1 * half)


def test_the_bootstrap_is_repeatable_and_refuses_nonsense():
    values = [0.0, 1.0, 1.0, 0.5]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(torch.tensor(values), seed=3)
    assert bootstrap_interval([0.25], seed=0) == (0.25, 0.25)
    for wrong in ([], [1.0, math.nan], torch.zeros(2, 2)):
        with pytest.raises(ArgumentError, match="finite values"):
            bootstrap_interval(wrong, seed=0)
    with pytest.raises(ArgumentError, match="at least 40"):
        bootstrap_interval(values, seed=0, resamples=10)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (4, 1), (3, 3), (2, 7)])
def test_the_sign_test_counts_splits_at_least_so_uneven(won, lost):
    splits = [sum(flips) for flips in product((0, 1), repeat=won + lost)]
    uneven = abs(won - lost)
    share = sum(abs(2 * split - won - lost) >= uneven for split in splits) / len(splits)
    assert sign_test(won, lost) == pytest.approx(share)
    assert sign_test(lost, won) == sign_test(won, lost)


def test_the_sign_test_refuses_counts_below_none():
    with pytest.raises(ArgumentError, match="at least 0"):
        sign_test(-1, 2)
