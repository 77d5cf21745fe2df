"""How sure a number is: 95 % intervals of shares and means, and tests of two methods on the same items.

Plain statistics; knows nothing of what was measured.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from loki_attention.errors import ArgumentError

_NORMAL_95 = 1.959963984540054
_RESAMPLED_AT_ONCE = 1 << 20


class Interval(NamedTuple):
    """A 95 % confidence interval, in the value's unit."""

    low: float
    high: float


def wilson_interval(successes: int, n: int) -> Interval:
    """Wilson's 95 % interval of a share, of ``successes`` among ``n`` trials; never beyond [0, 1].

    >>> low, high = wilson_interval(97, 100)
    >>> round(low, 4), round(high, 4)
    (0.9155, 0.9897)

    Raises ``ArgumentError`` where n is below 1 or ``successes`` outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ArgumentError(f"{successes} successes among {n} trials; n must be at least 1 and 0 <= successes <= n")
    share, z2 = successes / n, _NORMAL_95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _NORMAL_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def bootstrap_interval(values: Sequence[int | float] | torch.Tensor, *, seed: int, resamples: int = 10000) -> Interval:
    """The percentile bootstrap's 95 % interval of the mean of ``values``: scores, or paired differences of scores.

    Each resample draws n of the n values with replacement, by a generator of its own seeded with ``seed``: the same
    input gives the same interval. One value gives an interval of width 0. Raises ``ArgumentError`` for no values,
    values that are not finite or not one-dimensional, and fewer than 40 resamples.

    >>> bootstrap_interval([1.0, 1.0, 1.0], seed=0)
    Interval(low=1.0, high=1.0)
    """
    sample = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if sample.ndim != 1 or not len(sample) or not bool(sample.isfinite().all()):
        raise ArgumentError(
            f"a bootstrap needs a row of finite values, at least one; got shape {tuple(sample.shape)}: leave out what"
            " is not finite, or average it first"
        )
    if resamples < 40:
        raise ArgumentError(f"resamples is {resamples}; at least 40 are needed to place 2.5 % and 97.5 %")
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _RESAMPLED_AT_ONCE // len(sample))
    means = []
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), len(sample))
        means.append(sample[torch.randint(len(sample), shape, generator=generator)].mean(dim=1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(low, high)


def sign_test(won: int, lost: int) -> float:
    """The exact two-sided p-value of ``won`` against ``lost`` among pairs that differ: McNemar's test of paired answers.

    The chance of a split at least so uneven where both are equally likely; 1 where no pair differs.

    >>> sign_test(5, 0), sign_test(3, 3), round(sign_test(9, 2), 4)
    (0.0625, 1.0, 0.0654)

    Raises ``ArgumentError`` for counts below 0.
    """
    if won < 0 or lost < 0:
        raise ArgumentError(f"{won} won and {lost} lost; counts must be at least 0")
    differing = won + lost
    tail = sum(math.comb(differing, count) for count in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**differing)
