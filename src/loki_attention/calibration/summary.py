"""The expected loss of a basis, as calibration measured it, for a terminal."""

from rich.console import Console
from rich.table import Table

from loki_attention.core.basis import KeyBasis
from loki_attention.evaluation.held_out import EXACT, expected_losses


def loss_table(basis: KeyBasis) -> Table:
    """Loss against dense at the asked budget and at 1/8, 1/16, 1/32, loki beside exact top-k (no tail)."""
    table = Table(
        title="Expected loss against dense attention, on held-out text",
        caption=f"{basis.candidate}, planes {basis.planes}, tail {basis.tail}; asked: {basis.budget}.\n"
        "bytes: read from the cache, of dense attention's; exact-topk: the best shared sets, without a tail.",
    )
    for name in ("budget", "method", "bytes", "KL (nats)", "same token", "perplexity"):
        table.add_column(name, justify="left" if name in ("budget", "method") else "right", no_wrap=True)
    for measured in expected_losses(basis):
        label = f"{measured.label} (asked)" if measured.asked else measured.label
        for method, loss in (("loki", measured.loki), (EXACT, measured.exact)):
            table.add_row(
                label,
                method,
                f"{loss.read_fraction:.1%}",
                f"{loss.kl:.5f}",
                f"{loss.agreement:.1%}",
                f"{loss.perplexity:.2f} ({loss.perplexity_change:+.2%})",
            )
        table.add_section()
    return table


def expected_loss(basis: KeyBasis) -> None:
    """Print :func:`loss_table` on standard error."""
    Console(stderr=True).print(loss_table(basis))
