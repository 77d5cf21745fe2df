"""Loki with one thing changed at a time: what the methods of the package do not offer, changed in place while a row runs.

Research only: a change holds while its variant is attached, and touches the plain-torch code of many rows at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from loki_attention import KeyBasis
from loki_attention.core import basis as basis_module
from loki_attention.core.candidates import CANDIDATES, build
from loki_attention.core.encoder import Encoder
from loki_attention.evaluation.held_out import kept_mass
from loki_attention.evaluation.variant import Variant
from loki_attention.integrations.huggingface import Attached
from loki_attention.kernels import rows as rows_module
from loki_attention.kernels import torch_backend
from loki_attention.methods import Step, base
from loki_attention.methods.loki import Loki
from loki_attention.results import Setting

ALL_TOKENS = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed(Variant):
    """A variant with the named change."""

    change: str

    @contextmanager
    def attach(self, model: Any) -> Iterator[Attached]:  # type: ignore[override]
        """The model with this variant attached, the change in place until the block ends."""
        with CHANGES[self.change](), super(Changed, self).attach(model) as attached:
            yield attached

    @property
    def config(self) -> dict[str, Setting]:
        """The settings, the change among them."""
        return {**super(Changed, self).config, "change": self.change}


def sample_of(tokens: int) -> Any:
    """The sample of about so many tokens, where 512 is the rule."""
    return patch.object(rows_module, "SAMPLED_TOKENS", tokens)


def capped_at(deviations: float) -> Any:
    """The linear tail's value moved by at most so many deviations, where one is the rule."""
    original = base.tail_value

    def value(tail: str, sums: Any, leading: Tensor, deviation: Tensor, scale: float) -> Tensor:
        return original(tail, sums, leading, deviation / deviations, scale)

    return patch.object(base, "tail_value", value)


def kappa_times(factor: float) -> Any:
    """kappa times a factor."""
    original = basis_module.encoder

    def encoder(*arguments: Any) -> Encoder:
        made = original(*arguments)
        return replace(made, kappa=factor * made.kappa)

    return patch.object(basis_module, "encoder", encoder)


def float_query() -> Any:
    """Encoded queries in floats, where 8 bits are the rule."""

    def folded(self: Encoder, encoded: Tensor) -> tuple[Tensor, Tensor]:
        return encoded * self.steps[:, None, None], torch.ones_like(encoded[..., 0])

    return patch.object(Encoder, "_quantize_query", folded)


@contextmanager
def combined(rule: Callable[[Tensor, Tensor, Tensor], Tensor], *, exact_mass: bool = False) -> Iterator[None]:
    """The group's heads combined by ``rule(scores, L, deviation)``; L from the sample, or exact over the row's tokens."""
    original = Loki.choose
    step: list[Step] = []

    def choose(self: Loki, current: Step) -> Any:
        step[:] = [current]
        return original(self, current)

    def combine(scores: Tensor, mass: Tensor | None) -> Tensor:
        if mass is None:
            return scores.squeeze(2)
        assert step[0].encoded is not None
        deviation = step[0].encoded.deviation.unflatten(1, (scores.shape[1], -1))
        return rule(scores, mass, deviation)

    def mass_of(scores: Tensor, rows: Any, forced: Any) -> Tensor:
        log_weight = torch.where(rows.visible, 0.0, -torch.inf).to(scores.dtype)
        return torch_backend.weighted_log_sum(scores, log_weight)

    with patch.object(Loki, "choose", choose), patch.object(torch_backend, "combine_group", combine):
        if not exact_mass:
            yield
            return
        with patch.object(torch_backend, "group_log_mass", mass_of):
            yield


def tempered(share: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The maximum of scores less a share of L, where 3/4 is the rule."""

    def rule(scores: Tensor, mass: Tensor, deviation: Tensor) -> Tensor:
        return (scores - share * mass[..., None]).amax(2) + share * mass.amin(2)[..., None]

    return rule


def over_deviation(power: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The maximum of scores over a power of their deviation, in the widest head's unit."""

    def rule(scores: Tensor, mass: Tensor, deviation: Tensor) -> Tensor:
        floor = deviation.clamp(min=1e-12)
        return (scores / floor[..., None] ** power).amax(2) * floor.amax(2)[..., None] ** power

    return rule


def mean_probability(scores: Tensor, mass: Tensor, deviation: Tensor) -> Tensor:
    """The log of the heads' mean attention probability."""
    return (scores - mass[..., None]).logsumexp(2) + mass.amin(2)[..., None]


COMBINATIONS: dict[str, Callable[[], Any]] = {
    **{f"{n:g} L": partial(combined, tempered(n)) for n in (0, 0.5, 1)},
    **{f"{n:g} L, exact": partial(combined, tempered(n), exact_mass=True) for n in (0.5, 0.75, 1)},
    **{f"over sd^{n:g}": partial(combined, over_deviation(n)) for n in (0.5, 0.75, 1)},
    "mean probability": partial(combined, mean_probability),
}
"""How a group's heads agree."""
CHANGES: dict[str, Callable[[], Any]] = {
    **{f"sample {n}": partial(sample_of, n) for n in (128, 256, 1024)},
    "sample all": partial(sample_of, ALL_TOKENS),
    **{f"cap {n:g}": partial(capped_at, n) for n in (0.5, 1.5, 2)},
    "no cap": partial(capped_at, 1e12),
    **{f"kappa x {n:g}": partial(kappa_times, n) for n in (0, 0.5, 2)},
    "query in floats": float_query,
    **COMBINATIONS,
}
TAIL_CHANGES = tuple(name for name in CHANGES if name.startswith(("cap", "no cap", "kappa")))
"""Changes that mean nothing without a tail; the caps nothing without the linear one."""


def per_head(basis: KeyBasis) -> KeyBasis:
    """The basis with each head's candidate of most kept mass, by calibration's own figures."""
    assert basis.moments is not None
    layers = {}
    for index, by_name in kept_mass(basis).items():
        heads = range(basis.spec.kv_heads)
        best = tuple(max(CANDIDATES, key=lambda name, head=head: by_name[name][head]) for head in heads)
        made = {name: build(name, basis.moments[index]) for name in CANDIDATES}
        layers[index] = made[CANDIDATES[0]].pick(made, best)
    return replace(basis, layers=layers)
