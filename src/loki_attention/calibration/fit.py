"""From moments to the basis that loses least on held-out windows: candidate, tail, dense layers, expected loss.

Kept mass picks per head; next-token KL against dense decides between that pick and each candidate used throughout, and
then between the tails (mass alone misleads: ``docs/concepts.md``).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from loki_attention.calibration.checkpoint import Checkpoint
from loki_attention.calibration.progress import stage
from loki_attention.core.basis import PER_HEAD, KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.core.candidates import CANDIDATES, LayerBasis, build
from loki_attention.core.encoder import encoder
from loki_attention.core.moments import LayerMoments
from loki_attention.core.planes import Planes
from loki_attention.core.spec import ModelSpec
from loki_attention.core.tail import TAILS
from loki_attention.errors import LokiWarning
from loki_attention.evaluation.continuation import Loss, compare_window
from loki_attention.evaluation.held_out import EXACT
from loki_attention.evaluation.kept_mass import kept_mass
from loki_attention.evaluation.variant import Variant

LADDER = {"1/8": 1 / 8, "1/16": 1 / 16, "1/32": 1 / 32}
"""Fractions whose expected loss is measured beside the asked budget's."""
Figures = dict[str, float]
Windows = Sequence[Int[Tensor, "1 s"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """Everything the comparisons share."""

    model: Any
    spec: ModelSpec
    moments: Mapping[int, LayerMoments]
    held_out: Windows
    planes: Planes
    budget: Budget
    checkpoint: Checkpoint
    show: bool

    def basis(self, layers: Mapping[int, LayerBasis], tail: str, dense_layers: tuple[int, ...]) -> KeyBasis:
        """A basis of these layers for the asked planes and budget."""
        return KeyBasis(
            spec=self.spec,
            layers=layers,
            planes=self.planes,
            budget=self.budget,
            tail=tail,
            dense_layers=dense_layers,
            moments=self.moments,
        )

    def losses(self, name: str, variants: Sequence[Variant]) -> dict[str, Figures]:
        """The figures of every variant over all held-out windows that are long enough to be sparse."""
        windows = [w for w in self.held_out if self.budget.of(w.shape[1]) < w.shape[1]]
        if not windows or not variants:
            return {}
        total = {variant.name: Loss() for variant in variants}
        settings = [
            (variant.config, sorted(variant.basis.dense_layers if variant.basis else ())) for variant in variants
        ]
        with stage(name, sum(w.shape[1] for w in windows), show=self.show) as advance, warnings.catch_warnings():
            warnings.simplefilter("ignore", LokiWarning)
            compute = partial(compare_window, self.model, variants=variants)
            compared = self.checkpoint.once_each(name, (settings, str(self.planes)), compute, windows)
            for window, losses in zip(windows, compared, strict=True):
                for key, loss in losses.items():
                    total[key] += Loss(*loss)
                advance(window.shape[1])
        return {key: loss.figures() for key, loss in total.items()}


def fit(fitting: Fitting, *, candidate: str | None, tail: str | None, dense_if_mass_below: float | int) -> KeyBasis:
    """The best basis by the rules of the module, with every figure in ``record["figures"]``.

    ``candidate`` and ``tail`` force one instead of comparing.
    """
    names = (candidate,) if candidate is not None else CANDIDATES
    layers = {name: {i: build(name, m) for i, m in fitting.moments.items()} for name in names}
    mass = _measure_mass(fitting, layers)
    best, dense_layers = _best_per_head(mass, dense_if_mass_below)
    if candidate is None:
        by_layer = {i: {name: layers[name][i] for name in names} for i in fitting.moments}
        layers[PER_HEAD] = {i: layers[names[0]][i].pick(by_layer[i], best[i]) for i in fitting.moments}
    bases = {name: fitting.basis(chosen, "none", dense_layers) for name, chosen in layers.items()}
    # A pick that is one candidate throughout is that candidate; ties go to the earlier, simpler one.
    distinct = {name: basis for name, basis in bases.items() if name != PER_HEAD or basis.candidate == PER_HEAD}
    compared = fitting.losses("candidates", [_loki(fitting, name, basis, "none") for name, basis in distinct.items()])
    if not compared:
        warnings.warn(
            f"no held-out window is longer than the budget ({fitting.budget}): nothing could be compared end to end, "
            "the basis is 'balanced' with a linear tail unless you asked otherwise; calibrate on longer windows",
            LokiWarning,
            stacklevel=3,
        )
    best_name = min(compared, key=lambda name: compared[name]["kl"]) if compared else candidate or "balanced"
    winner = bases[best_name]
    tails = _compare_tails(fitting, winner, tail, {"none": compared[best_name]} if compared else {})
    best_tail = min(tails, key=lambda name: tails[name]["kl"]) if tails else tail or "linear"
    winner = replace(winner, tail=best_tail)
    ladder = _ladder(fitting, winner, tails[best_tail]) if tails else {}
    figures = {"mass": mass, "candidates": compared, "tails": tails, "budgets": ladder}
    return replace(winner, record={"figures": figures})


def _measure_mass(
    fitting: Fitting, layers: Mapping[str, Mapping[int, LayerBasis]]
) -> dict[str, dict[str, list[float]]]:
    """Mass kept on held-out windows: layer to name to one figure a KV head (JSON types, layer keys as text)."""
    planes, group_size = fitting.planes, fitting.spec.group_size
    encoders = {name: {i: encoder(one, planes, group_size) for i, one in by.items()} for name, by in layers.items()}
    tokens = [window.shape[1] for window in fitting.held_out]

    def measure(window: Tensor) -> dict[str, dict[str, list[float]]]:
        kept = kept_mass(fitting.model, [window], encoders, fitting.budget)
        return {str(i): {name: mass.tolist() for name, mass in by.items()} for i, by in sorted(kept.items())}

    settings = (sorted(encoders), str(fitting.planes), fitting.budget)
    measured = []
    with stage("kept mass", sum(tokens), show=fitting.show) as advance:
        for mass in fitting.checkpoint.once_each("mass", settings, measure, fitting.held_out):
            measured.append(mass)
            advance(tokens[len(measured) - 1])
    return _mean_mass(measured, [count - count // 2 for count in tokens])


def _mean_mass(
    measured: Sequence[dict[str, dict[str, list[float]]]], rows: Sequence[int]
) -> dict[str, dict[str, list[float]]]:
    """The mean over windows, each weighed by its ``rows``."""
    weight = torch.tensor(rows, dtype=torch.float64) / sum(rows)

    def mean(layer: str, name: str) -> list[float]:
        return (weight @ torch.tensor([mass[layer][name] for mass in measured], dtype=torch.float64)).tolist()

    return {layer: {name: mean(layer, name) for name in by} for layer, by in measured[0].items()}


def _best_per_head(
    mass: Mapping[str, Mapping[str, list[float]]], dense_below: float | int
) -> tuple[dict[int, tuple[str, ...]], tuple[int, ...]]:
    """Each layer's best candidate per KV head, and the layers where even that keeps too little of exact's mass."""
    best: dict[int, tuple[str, ...]] = {}
    dense = []
    for layer, by in mass.items():
        names = [name for name in by if name != EXACT]
        table = torch.tensor([by[name] for name in names], dtype=torch.float64)
        best[int(layer)] = tuple(names[i] for i in table.argmax(0).tolist())
        kept, bound = float(table.amax(0).mean()), sum(by[EXACT]) / len(by[EXACT])
        if kept < dense_below * bound:
            dense.append(int(layer))
            warnings.warn(
                f"layer {layer} stays dense: its best basis keeps {kept:.3f} of the attention mass where exact top-k "
                f"keeps {bound:.3f} (less than {dense_below:g} of it)",
                LokiWarning,
                stacklevel=4,
            )
    return best, tuple(dense)


def _compare_tails(
    fitting: Fitting, winner: KeyBasis, tail: str | None, known: Mapping[str, Figures]
) -> dict[str, Figures]:
    """The figures of every tail with the winning basis; ``known`` ones are not measured again."""
    names = (tail,) if tail is not None else TAILS
    missing = [_loki(fitting, name, winner, name) for name in names if name not in known]
    measured = {**known, **fitting.losses("tails", missing)}
    return {name: measured[name] for name in names if name in measured}


def _ladder(fitting: Fitting, winner: KeyBasis, asked: Figures) -> dict[str, dict[str, Figures]]:
    """Expected loss at the asked budget and down the ladder, beside exact top-k's (shared sets, no tail)."""
    budgets = {"asked": fitting.budget} | {name: fitting.budget.at_fraction(f) for name, f in LADDER.items()}
    variants = []
    for budget in dict.fromkeys(budgets.values()):
        variants.append(Variant(name=f"{EXACT} {budget}", method=EXACT, basis=winner, budget=budget))
        if budget != fitting.budget:
            variants.append(Variant(name=f"loki {budget}", method="loki", basis=winner, budget=budget))
    figures = fitting.losses("expected loss", variants) | {f"loki {fitting.budget}": asked}
    return {name: {m: figures[f"{m} {budget}"] for m in ("loki", EXACT)} for name, budget in budgets.items()}


def _loki(fitting: Fitting, name: str, basis: KeyBasis, tail: str) -> Variant:
    return Variant(name=name, method="loki", basis=basis, budget=fitting.budget, tail=tail)
