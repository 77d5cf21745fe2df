"""The rows of the tables of record: dense's rivals at one budget, by share of the tokens."""

from typing import Any

from loki_attention import Budget, KeyBasis
from loki_attention.evaluation.variant import Variant

FRACTIONS = {"1/8": 1 / 8, "1/16": 1 / 16, "1/32": 1 / 32}


def budget(fraction: float) -> Budget:
    """The budget of every table: small contexts need a small floor."""
    return Budget(fraction=fraction, minimum=48, sinks=4, recent=16)


def label(name: str, fraction: str) -> str:
    """A row's name within one run over all budgets."""
    return f"{name} @ {fraction}"


def perplexity_variants(basis: KeyBasis) -> list[Variant]:
    """The bounds, loki with and without its tail, and the methods that should lose."""
    rows = []
    for fraction, share in FRACTIONS.items():

        def row(name: str, method: str, fraction: str = fraction, share: float = share, **settings: Any) -> Variant:
            return Variant(name=label(name, fraction), method=method, budget=budget(share), **settings)

        rows += [row(f"exact-topk, {per}", "exact-topk", per=per) for per in ("query-head", "kv-head")]
        rows.append(row("exact-topk, tail linear", "exact-topk", basis=basis, tail="linear"))
        rows.append(row("loki", "loki", basis=basis))
        rows.append(row("loki, tail none", "loki", basis=basis, tail="none"))
        rows += [row(method, method, basis=basis) for method in ("paper-loki", "pca-attn")]
        rows.append(row("streaming", "streaming"))
    return rows
