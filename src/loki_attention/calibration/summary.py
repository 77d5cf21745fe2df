"""The expected loss of a basis, as calibration measured it, for a terminal."""

from rich.console import Console
from rich.table import Table

from loki_attention.core.basis import KeyBasis


def loss_table(basis: KeyBasis) -> Table:
    """Loss against dense at the asked budget and at 1/8, 1/16, 1/32, loki beside exact top-k (no tail)."""
    table = Table(
        title="Expected loss against dense attention, on held-out text",
        caption=f"{basis.candidate}, planes {basis.planes}, tail {basis.tail}; asked: {basis.budget}.\n"
        "bytes: read from the cache, of dense attention's; exact-topk: the best shared sets, without a tail.",
    )
    for name in ("budget", "method", "bytes", "KL (nats)", "same token", "perplexity"):
        table.add_column(name, justify="left" if name in ("budget", "method") else "right", no_wrap=True)
    for label, methods in _budgets(basis):
        for method in ("loki", "exact-topk"):
            figure = methods[method]
            change = figure["perplexity"] / figure["dense_perplexity"] - 1
            table.add_row(
                label,
                method,
                f"{figure['read_fraction']:.1%}",
                f"{figure['kl']:.5f}",
                f"{figure['agreement']:.1%}",
                f"{figure['perplexity']:.2f} ({change:+.2%})",
            )
        table.add_section()
    return table


def _budgets(basis: KeyBasis) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """Label and figures of every budget, the most bytes first; an asked budget that is a rung stands there once."""
    measured = dict(basis.record.get("figures", {}).get("budgets", {}))
    asked = measured.pop("asked", None)
    rows = [(f"{name} (asked)" if figures == asked else name, figures) for name, figures in measured.items()]
    if asked is not None and asked not in measured.values():
        rows.append(("asked", asked))
    return sorted(rows, key=lambda row: -row[1]["loki"]["read_fraction"])


def expected_loss(basis: KeyBasis) -> None:
    """Print :func:`loss_table` on standard error."""
    Console(stderr=True).print(loss_table(basis))
