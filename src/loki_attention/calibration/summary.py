"""The expected loss of a basis, as calibration measured it, for a terminal."""

from rich.console import Console
from rich.table import Table

from loki_attention.core.basis import KeyBasis


def loss_table(basis: KeyBasis) -> Table:
    """Loss against dense at the asked budget and at 1/8, 1/16, 1/32, loki beside exact top-k (no tail)."""
    table = Table(
        title="Expected loss on held-out text", caption=f"planes {basis.planes}, {basis.candidate}, tail {basis.tail}"
    )
    for name in ("budget", "method", "bytes read", "KL from dense", "same next token", "perplexity"):
        table.add_column(name, justify="left" if name in ("budget", "method") else "right")
    for budget, methods in basis.record.get("figures", {}).get("budgets", {}).items():
        label = f"{basis.budget} (asked)" if budget == "asked" else budget
        for method, figure in methods.items():
            change = figure["perplexity"] / figure["dense_perplexity"] - 1
            table.add_row(
                label,
                method,
                f"{figure['read_fraction']:.1%}",
                f"{figure['kl']:.5f}",
                f"{figure['agreement']:.1%}",
                f"{figure['perplexity']:.2f} ({change:+.2%})",
            )
    return table


def expected_loss(basis: KeyBasis) -> None:
    """Print :func:`loss_table` on standard error."""
    Console(stderr=True).print(loss_table(basis))
