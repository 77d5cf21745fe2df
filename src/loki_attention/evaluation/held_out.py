"""What calibration measured on held-out text, read from a basis's record in types; empty where it was not measured."""

from typing import NamedTuple

from loki_attention.core.basis import PER_HEAD, KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.core.candidates import CANDIDATES
from loki_attention.core.tail import TAILS

EXACT = "exact-topk"
_ASKED = "asked"
_ORDER = (*CANDIDATES, PER_HEAD, EXACT, *TAILS)


class HeldOutLoss(NamedTuple):
    """HeldOutLoss against dense attention: KL in nats, agreement of the next token and bytes read as fractions."""

    kl: float
    agreement: float
    perplexity: float
    dense_perplexity: float
    read_fraction: float

    @property
    def perplexity_change(self) -> float:
        """Perplexity over dense attention's, less 1."""
        return self.perplexity / self.dense_perplexity - 1


class BudgetLoss(NamedTuple):
    """The loss at one budget, with exact top-k's (shared sets, no tail) beside it."""

    label: str
    asked: bool
    loki: HeldOutLoss
    exact: HeldOutLoss


def kept_mass(basis: KeyBasis) -> dict[int, dict[str, tuple[float, ...]]]:
    """Attention mass that each candidate's selection keeps: layer to name to one fraction a KV head.

    Exact top-k's stands under ``exact-topk``, last.
    """
    figures = basis.record.get("figures", {}).get("mass", {})
    kept = {}
    for layer in sorted(figures, key=int):
        names = sorted(figures[layer], key=_ORDER.index)
        kept[int(layer)] = {name: tuple(figures[layer][name]) for name in names}
    return kept


def mean_mass(basis: KeyBasis) -> dict[str, dict[int, float]]:
    """Kept mass averaged over KV heads: name to layer to a fraction."""
    means: dict[str, dict[int, float]] = {}
    for layer, by_name in kept_mass(basis).items():
        for name, heads in by_name.items():
            means.setdefault(name, {})[layer] = sum(heads) / len(heads)
    return means


def compared(basis: KeyBasis, what: str) -> dict[str, HeldOutLoss]:
    """End-to-end losses of what was compared, ``"candidates"`` or ``"tails"``, by name."""
    figures = basis.record.get("figures", {}).get(what, {})
    return {name: _loss(figures[name]) for name in sorted(figures, key=_ORDER.index)}


def expected_losses(basis: KeyBasis) -> tuple[BudgetLoss, ...]:
    """Expected loss by budget, the bytes read descending; a rung that is the asked budget stands there once."""
    measured = dict(basis.record.get("figures", {}).get("budgets", {}))
    rungs = {name: _fraction(name) for name in measured if name != _ASKED}
    same = next((name for name, fraction in rungs.items() if basis.budget == basis.budget.at_fraction(fraction)), None)
    if same is not None:
        measured.pop(_ASKED, None)
    losses = [
        BudgetLoss(
            label=_short(basis.budget) if name == _ASKED else name,
            asked=name in (_ASKED, same),
            loki=_loss(methods["loki"]),
            exact=_loss(methods[EXACT]),
        )
        for name, methods in measured.items()
    ]
    return tuple(sorted(losses, key=lambda loss: -loss.loki.read_fraction))


def _loss(figures: dict[str, float]) -> HeldOutLoss:
    return HeldOutLoss(*(figures[field] for field in HeldOutLoss._fields))


def _fraction(rung: str) -> float:
    one, parts = rung.split("/")
    return int(one) / int(parts)


def _short(budget: Budget) -> str:
    return f"{budget.tokens} tokens" if budget.fraction is None else f"{100 * budget.fraction:g} %"
