"""Medians of several callables timed in turn in one process, each from cold caches. Knows nothing of what they do.

A decode step reads what many layers ago was last read: nothing of it is in the caches. Before every timed call a buffer
larger than the last level of cache is read, so that keys and values come from memory as they do then. That also drives out
the code, which the layer before had just run: a call ``before`` the timed one, on other small data, brings it back.
"""

import random
import re
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loki_attention.errors import check_tokens
from loki_attention.kernels import native

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNIT = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LEAST_BYTES, _MOST_BYTES = 64 << 20, 512 << 20


class Timing(NamedTuple):
    """Seconds of a call: the median, the 20th and 80th percentile, over so many rounds."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """The timing of single calls; percentiles are of the calls themselves, none in between.

        >>> Timing.of([3.0, 1.0, 2.0, 5.0, 4.0])
        Timing(median=3.0, p20=1.0, p80=4.0, rounds=5)
        """
        ordered = sorted(seconds)
        low, middle, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
        return cls(middle, low, high, len(ordered))


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    before: Mapping[str, Callable[[], object]] | None = None,
    warm_up: int = 1,
    threads: int | None = None,
) -> dict[str, Timing]:
    """The timing of every call: ``rounds`` rounds in which each runs once, after ``warm_up`` rounds that are not counted.

    What disturbs the machine for a while then disturbs all alike, and as every round has an order of its own, no call
    always follows the same other one. Caches are emptied before every call, then what ``before`` has under its name
    runs, not timed. Raises ``ArgumentError`` for fewer than one round.
    """
    before = before or {}
    check_tokens("rounds", rounds, least=1, unit="rounds")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls.items()), random.Random(0)
    for i in range(warm_up + rounds):
        shuffled.shuffle(order)
        for name, call in order:
            empty_caches(threads)
            if name in before:
                before[name]()
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
            if i >= warm_up:
                seconds[name].append(taken)
    return {name: Timing.of(each) for name, each in seconds.items()}


def empty_caches(threads: int | None = None) -> None:
    """Read twice as many bytes as the last level of cache holds: what was in it is in memory alone afterwards."""
    native.streaming_probe(_other_bytes(), threads=threads)


@cache
def cache_bytes() -> int | None:
    """Bytes of the largest cache that the first core sees; None where the system does not say."""
    sizes = [re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip()) for file in _CACHES.glob("index*/size")]
    return max((int(size[1]) * _UNIT.get(size[2], 1) for size in sizes if size), default=None)


@cache
def _other_bytes() -> Tensor:
    size = 2 * (cache_bytes() or _LEAST_BYTES)
    return torch.zeros(min(max(size, _LEAST_BYTES), _MOST_BYTES), dtype=torch.uint8)
