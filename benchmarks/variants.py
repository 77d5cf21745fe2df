"""The rows of the tables of record: dense's rivals at one budget, each one change away from the default."""

from dataclasses import replace

from loki_attention import Budget, KeyBasis
from loki_attention.core.candidates import CANDIDATES
from loki_attention.core.tail import TAILS
from loki_attention.evaluation.variant import Variant

FRACTIONS = {"1/8": 1 / 8, "1/16": 1 / 16, "1/32": 1 / 32, "1/64": 1 / 64}
PLANES = ("64@4", "16@4+32@2", "32@4", "8@4+16@2")


def budget(fraction: float) -> Budget:
    """The budget of every table: small contexts need a small floor."""
    return Budget(fraction=fraction, minimum=48, sinks=4, recent=16)


def label(name: str, fraction: str) -> str:
    """A row's name within one run over all budgets."""
    return f"{name} @ {fraction}"


def retrieval_variants(basis: KeyBasis) -> list[Variant]:
    """Exact top-k, loki at four sizes of low-rank keys (the default also without its tail), the paper's, streaming."""
    rows = []
    for name, fraction in ((name, FRACTIONS[name]) for name in ("1/8", "1/16", "1/64")):
        common = {"budget": budget(fraction)}
        rows.append(Variant(name=label("exact-topk", name), method="exact-topk", **common))
        for planes in PLANES:
            rows.append(
                Variant(name=label(f"loki {planes}", name), method="loki", basis=basis, planes=planes, **common)
            )
        no_tail = f"loki {PLANES[1]}, tail none"
        rows.append(
            Variant(name=label(no_tail, name), method="loki", basis=basis, planes=PLANES[1], tail="none", **common)
        )
        rows.append(Variant(name=label("paper-loki", name), method="paper-loki", basis=basis, **common))
        rows.append(Variant(name=label("streaming", name), method="streaming", **common))
    return rows


def perplexity_variants(basis: KeyBasis) -> list[Variant]:
    """Both exact bounds, loki as chosen and one change at a time from it, and the methods that should lose."""
    rows = []
    for name in ("1/8", "1/16", "1/32"):
        common = {"budget": budget(FRACTIONS[name])}
        with_basis = {"basis": basis, **common}
        for per in ("query-head", "kv-head"):
            rows.append(Variant(name=label(f"exact-topk, {per}", name), method="exact-topk", per=per, **common))
        rows.append(
            Variant(name=label("exact-topk, tail linear", name), method="exact-topk", tail="linear", **with_basis)
        )
        rows.append(Variant(name=label("loki", name), method="loki", **with_basis))
        for candidate in CANDIDATES:
            if candidate != basis.candidate:
                other = replace(basis.with_candidate(candidate), record=basis.record)
                rows.append(Variant(name=label(f"loki, {candidate}", name), method="loki", basis=other, **common))
        for planes in (planes for planes in PLANES if planes != str(basis.planes)):
            rows.append(Variant(name=label(f"loki, {planes}", name), method="loki", planes=planes, **with_basis))
        for tail in (tail for tail in TAILS if tail != basis.tail):
            rows.append(Variant(name=label(f"loki, tail {tail}", name), method="loki", tail=tail, **with_basis))
        rows.append(
            Variant(name=label("loki, 64@4, tail none", name), method="loki", planes="64@4", tail="none", **with_basis)
        )
        for method in ("paper-loki", "pca-attn"):
            rows.append(Variant(name=label(method, name), method=method, **with_basis))
        rows.append(Variant(name=label("streaming", name), method="streaming", **common))
    return rows
