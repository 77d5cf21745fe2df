"""What a terminal shows of a basis: tables, and drawings where there are no pictures.

Returns things that rich prints; prints nothing itself.
"""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from loki_attention.analysis.rank import RankTable, Spectrum
from loki_attention.core.basis import KeyBasis
from loki_attention.evaluation.held_out import EXACT, compared, kept_mass

_EIGHTHS = " ▏▎▍▌▋▊▉"
_LEVELS = "▁▂▃▄▅▆▇█"
_BAR_CELLS = 32
_CURVE_CELLS = 32


def summary(basis: KeyBasis) -> Table:
    """What the basis is of, what it was chosen for, and on which text."""
    spec, record = basis.spec, basis.record
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    heads = f"{len(spec.layers)} layers, {spec.heads} query and {spec.kv_heads} KV heads of {spec.head_dim}"
    table.add_row("model", f"{spec.model_id} ({spec.architecture}: {heads})")
    table.add_row("basis", basis.candidate)
    table.add_row("planes", f"{basis.planes} ({basis.planes.bytes_per_token} bytes a token and KV head)")
    table.add_row("tail", basis.tail)
    table.add_row("budget", str(basis.budget))
    marked = ", ".join(map(str, basis.dense_layers)) or "none"
    table.add_row("dense layers", f"{marked} marked by calibration; layer 0 is dense by default")
    if "length" in record:
        text = f"{record['fit_tokens']:,} tokens, {record['held_out_tokens']:,} held out, windows of {record['length']}"
        table.add_row("calibrated on", text)
    for note in record.get("notes", ()):
        table.add_row("note", Text(str(note)))
    return table


def rank_report(ranks: RankTable) -> Table:
    """Rank of every head's keys before and after RoPE, a row a layer."""
    table = Table(
        title=f"Dims that explain {ranks.variance:.0%} of the keys' variance, of {ranks.head_dim}",
        caption=f"mean {ranks.mean_pre:.1f} before RoPE, {ranks.mean_post:.1f} after",
    )
    table.add_column("layer", justify="right")
    for side in ("before RoPE", "after RoPE"):
        table.add_column(f"{side}: mean", justify="right")
        table.add_column("by KV head")
    for layer, heads in ranks.layers.items():
        cells = []
        for values in ([head.pre for head in heads], [head.post for head in heads]):
            cells += [f"{sum(values) / len(values):.1f}", " ".join(f"{value:>3}" for value in values)]
        table.add_row(str(layer), *cells)
    return table


def mass_report(basis: KeyBasis) -> Table | None:
    """Attention mass that each candidate keeps, a row a layer, beside exact top-k's; None where it was not measured."""
    kept = kept_mass(basis)
    if not kept:
        return None
    names = list(next(iter(kept.values())))
    table = Table(
        title="Attention mass kept on held-out text (mean over KV heads)",
        caption=f"at {basis.budget}; {EXACT} is the bound, bold the best basis",
    )
    table.add_column("layer", justify="right")
    for name in (*names, "in use"):
        table.add_column(name, justify="left" if name == "in use" else "right")
    for layer, by_name in kept.items():
        means = {name: sum(by_name[name]) / len(by_name[name]) for name in names}
        best = max((name for name in names if name != EXACT), key=lambda name: means[name])
        cells = [f"[bold]{means[name]:.3f}[/]" if name == best else f"{means[name]:.3f}" for name in names]
        used = basis.layers[layer].candidates
        choice = used[0] if len(set(used)) == 1 else " ".join(used)
        table.add_row(str(layer), *cells, "dense" if layer in basis.dense_layers else choice)
    return table


def choice_report(basis: KeyBasis) -> Table | None:
    """The candidates and tails that calibration compared end to end; None where it did not."""
    rows = [("basis", *row) for row in compared(basis, "candidates").items()]
    rows += [("tail", *row) for row in compared(basis, "tails").items()]
    if not rows:
        return None
    table = Table(title="What calibration compared, against dense attention", caption="bold: chosen")
    for name in ("", "choice", "KL (nats)", "same token", "perplexity"):
        table.add_column(name, justify="left" if name in ("", "choice") else "right")
    for what, name, loss in rows:
        chosen = name == (basis.candidate if what == "basis" else basis.tail)
        figures = (f"{loss.kl:.5f}", f"{loss.agreement:.1%}", f"{loss.perplexity:.2f} ({loss.perplexity_change:+.2%})")
        table.add_row(what, name, *figures, style="bold" if chosen else None)
    return table


def rank_drawing(ranks: RankTable) -> Table:
    """Mean rank of every layer as bars, before and after RoPE: the picture without matplotlib."""
    table = Table(title="Rank by layer (mean over KV heads)", box=None, show_header=False)
    table.add_column(justify="right")
    for layer, heads in ranks.layers.items():
        for side, color, head_ranks in (
            ("before RoPE", "yellow", [head.pre for head in heads]),
            ("after RoPE", "blue", [head.post for head in heads]),
        ):
            mean = sum(head_ranks) / len(head_ranks)
            label = f"layer {layer}" if side == "before RoPE" else ""
            table.add_row(label, side, Text.assemble((bar(mean / ranks.head_dim), color), f" {mean:.1f}"))
    return table


def spectra_drawing(curves: dict[int, Spectrum]) -> Table:
    """Variance explained by the leading dims of every layer, as sparklines."""
    table = Table(title="Variance explained by the leading dims (left: one dim, right: all)", box=None)
    table.add_column("", justify="right")
    for name in ("keys after RoPE", "scores"):
        table.add_column(name)
    for layer, curve in curves.items():
        table.add_row(f"layer {layer}", sparkline(curve.post.tolist()), sparkline(curve.score.tolist()))
    return table


def bar(share: float, cells: int = _BAR_CELLS) -> str:
    """A bar of ``cells`` characters filled to ``share`` (clamped to [0, 1]), to an eighth of a character.

    >>> bar(0.5, 4), bar(0.28, 4), bar(2.0, 3)
    ('██  ', '█▏  ', '███')
    """
    eighths = round(min(max(share, 0.0), 1.0) * cells * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).ljust(cells)[:cells]


def sparkline(values: Sequence[float], cells: int = _CURVE_CELLS) -> str:
    """Values in [0, 1] as a line of block characters, at most ``cells`` of them, evenly picked with both ends.

    >>> sparkline([0.0, 0.5, 1.0])
    '▁▅█'
    """
    count = min(cells, len(values))
    picked = [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]
    return "".join(_LEVELS[min(7, int(8 * min(max(value, 0.0), 1.0)))] for value in picked)
