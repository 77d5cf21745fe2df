"""Checks a running attachment against dense attention: every n-th step, one layer in turn, exactly."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loki_attention.errors import ArgumentError, LokiWarning, check_tokens
from loki_attention.integrations.huggingface.sparse_rows import SparseRows, Tensors
from loki_attention.kernels import torch_backend
from loki_attention.methods import Answer

ACTIONS = ("warn", "dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorSettings:
    """Check every ``every``-th decode step; below ``low_mass`` (mean over heads and sequences) warn or go dense."""

    every: int
    low_mass: float | None = None
    action: str = "warn"


class Check(NamedTuple):
    """One checked step of one layer with ``tokens`` cached.

    Attention mass kept (1 is all) and the relative error of the layer's attention output, tail included: mean and worst
    over query heads and sequences, and over sequences.
    """

    layer: int
    tokens: int
    mean_mass: float
    worst_mass: float
    mean_error: float
    worst_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorReport:
    """All checks: means over them, and the worst ones, which name their layer and length."""

    checks: int
    mean_mass: float
    mean_error: float
    lowest_mass: Check
    largest_error: Check
    layers_gone_dense: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        worst = {"lowest_mass": self.lowest_mass._asdict(), "largest_error": self.largest_error._asdict()}
        return asdict(self) | worst

    def __str__(self) -> str:
        low, far = self.lowest_mass, self.largest_error
        gone = f"; dense from then on: layers {list(self.layers_gone_dense)}" if self.layers_gone_dense else ""
        return (
            f"monitor: {self.checks} checks; mass kept {self.mean_mass:.1%}, lowest {low.worst_mass:.1%} (layer "
            f"{low.layer}, {low.tokens} tokens); output error {self.mean_error:.2%}, largest {far.worst_error:.2%} "
            f"(layer {far.layer}, {far.tokens} tokens){gone}"
        )


def monitor_settings(every: Any, on_low_mass: Any) -> MonitorSettings | None:
    """The settings for what a user asked, None for no monitor; raises ``ArgumentError`` for what makes no sense."""
    if every is None:
        if on_low_mass is not None:
            raise ArgumentError("on_low_mass acts on what the monitor measures; give monitor_every too, 16 say")
        return None
    check_tokens("monitor_every", every, least=1, unit="decode steps")
    if on_low_mass is None:
        return MonitorSettings(every=every)
    threshold, action = on_low_mass if isinstance(on_low_mass, tuple) and len(on_low_mass) == 2 else (None, None)
    numeric = isinstance(threshold, float | int) and not isinstance(threshold, bool)
    if not numeric or not 0 < float(threshold or 0) < 1 or action not in ACTIONS:
        raise ArgumentError(
            f"on_low_mass must be a mass between 0 and 1 and 'warn' or 'dense', (0.5, 'warn') say; got {on_low_mass!r}"
        )
    return MonitorSettings(every=every, low_mass=float(threshold or 0), action=action)


class Monitor:
    """Counts the decode steps of every sparse layer, says which to check, and keeps what the checks found."""

    def __init__(self, settings: MonitorSettings, layers: Sequence[int]) -> None:
        self._settings, self._layers = settings, list(layers)
        self._steps: Counter[int] = Counter()
        self._checks: list[Check] = []
        self._low: set[int] = set()

    def is_due(self, layer: int) -> bool:
        """Whether this step of the layer is to be checked; counts it."""
        step = self._steps[layer]
        self._steps[layer] += 1
        turn, rest = divmod(step, self._settings.every)
        return rest == self._settings.every - 1 and self._layers[turn % len(self._layers)] == layer

    def gone_dense(self, layer: int) -> bool:
        """Whether the layer stays dense for having kept too little."""
        return self._settings.action == "dense" and layer in self._low

    def check(self, layer: int, tensors: Tensors, found: SparseRows, answer: Answer, dense: Tensor) -> None:
        """Measure a decode step whose dense output is ``dense`` (B, H, 1, D); act on mass below the threshold."""
        active = found.active[:, 0]
        mass = _kept(tensors, found, answer)[active]
        wide = dense.double()[active]
        difference = (answer.output.double()[active] - wide).flatten(1).norm(dim=1)
        error = difference / wide.flatten(1).norm(dim=1)
        figures = (mass.mean(), mass.min(), error.mean(), error.max())
        done = Check(layer, int(found.rows.tokens.max()), *(float(figure) for figure in figures))
        self._checks.append(done)
        threshold = self._settings.low_mass
        if threshold is None or done.mean_mass >= threshold or layer in self._low:
            return
        self._low.add(layer)
        what = "it stays dense from here on" if self._settings.action == "dense" else "raise the budget"
        warnings.warn(
            f"layer {layer} kept {done.mean_mass:.1%} of the attention mass at {done.tokens} tokens, less than the "
            f"{threshold:.1%} asked for; {what}",
            LokiWarning,
            stacklevel=2,
        )

    def report(self) -> MonitorReport | None:
        """What was found, None before the first check."""
        if not self._checks:
            return None
        count = len(self._checks)
        return MonitorReport(
            checks=count,
            mean_mass=sum(check.mean_mass for check in self._checks) / count,
            mean_error=sum(check.mean_error for check in self._checks) / count,
            lowest_mass=min(self._checks, key=lambda check: check.worst_mass),
            largest_error=max(self._checks, key=lambda check: check.worst_error),
            layers_gone_dense=tuple(sorted(self._low)) if self._settings.action == "dense" else (),
        )


def _kept(tensors: Tensors, found: SparseRows, answer: Answer) -> Tensor:
    """The exact attention mass of a decode step's slots: (B, H)."""
    batch, heads = tensors.query.shape[:2]
    if answer.indices is None:
        return torch.ones(batch, heads)
    sets = answer.indices.shape[1]
    scores = torch_backend.score_exact(tensors.query, tensors.keys, tensors.scale, sets, tensors.softmax)
    share = scores.masked_fill(~found.rows.visible[:, None, None], -torch.inf).softmax(-1)
    slots = answer.indices[:, :, None]
    kept = share.gather(-1, slots.clamp(min=0).expand(*share.shape[:3], -1, -1)).masked_fill(slots < 0, 0.0)
    return kept.sum(-1).flatten(1, 2)[..., 0]
