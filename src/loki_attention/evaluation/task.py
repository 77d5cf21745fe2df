"""What an evaluation task is: items that every variant answers, and scores made of the outcomes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from loki_attention.evaluation.reading import DecodeStep
from loki_attention.evaluation.variant import Variant
from loki_attention.intervals import Interval, bootstrap_interval, wilson_interval
from loki_attention.results import Setting

RULE = "continuation"
"""The row rule of every task: a dense prompt, then rows that select as decode would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One number of one variant on one task, with its 95 % interval and, for paired tests, each item's value."""

    metric: str
    value: float | int
    unit: str
    n: int
    interval: Interval | None
    items: tuple[float | int, ...] | None = None
    config: dict[str, Setting] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """A task. ``digest`` names its items; outcomes are plain JSON types.

    ``steps`` are the decode steps of scored rows, or a sample of them: what bytes are counted over, and budgets in bytes
    solved for. ``together``: variants share work, and come together.
    """

    name: str
    digest: str
    items: int
    steps: Sequence[DecodeStep]
    together: bool

    def measure(self, index: int, variants: Sequence[Variant]) -> dict[str, Any]:
        """The outcome of item ``index`` for each of the variants, by name."""
        ...

    def scores(self, outcomes: Sequence[Any], dense: Sequence[Any]) -> list[Score]:
        """The scores of one variant from all its outcomes, beside dense attention's on the same items."""
        ...


def mean_score(
    metric: str, items: Sequence[float | int], unit: str, *, seed: int, config: dict[str, Setting] | None = None
) -> Score:
    """The mean of the items with the bootstrap's interval."""
    return Score(
        metric=metric,
        value=sum(items) / len(items),
        unit=unit,
        n=len(items),
        interval=bootstrap_interval(items, seed=seed),
        items=tuple(items),
        config=config or {},
    )


def accuracy(metric: str, answers: Sequence[float | int], *, config: dict[str, Setting] | None = None) -> Score:
    """The share of right answers, each 0 or 1, with Wilson's interval."""
    right = round(sum(answers))
    return Score(
        metric=metric,
        value=right / len(answers),
        unit="fraction",
        n=len(answers),
        interval=wilson_interval(right, len(answers)),
        items=tuple(answers),
        config=config or {},
    )


def transformed(score: Score, metric: str, unit: str, change: Callable[[float | int], float]) -> Score:
    """A score in another unit by a monotone change of value and interval; the items stay as they are measured."""
    interval = None
    if score.interval is not None:
        interval = Interval(*sorted(change(bound) for bound in score.interval))
    return Score(
        metric=metric, value=change(score.value), unit=unit, n=score.n, interval=interval, config=dict(score.config)
    )


def digest_of(*parts: object) -> str:
    """Twelve hexadecimal digits that name ``parts``: bytes as they are, others by their ``repr``."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:12]
