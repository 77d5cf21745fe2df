"""Pictures of a basis, of the demo's answers and of measured speed, as PNG files. The only importer of matplotlib.

Draws on figures of its own with the Agg canvas: no window, no pyplot, nothing of matplotlib's global state. Knows how
things look; the numbers come from ``analysis.rank``, ``evaluation.held_out`` and ``evaluation.answers``.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from loki_attention.analysis.rank import RankTable, Spectrum, rank_table, spectra
from loki_attention.core.basis import KeyBasis
from loki_attention.errors import ArgumentError, LokiError
from loki_attention.evaluation.answers import Score
from loki_attention.evaluation.held_out import EXACT, BudgetLoss, expected_losses, mean_mass
from loki_attention.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by every kind of colour vision, and in grey by line style or marker.
COLORS = _BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _SKY, _GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#6E6E6E"
)  # fmt: skip
_CANDIDATE_STYLE = {
    "pca-pre": (_ORANGE, "s"),
    "pca-post": (_GREEN, "^"),
    "balanced": (_BLUE, "o"),
    "per-head": (_PURPLE, "D"),
}
_DOTS_PER_INCH = 150
_SMALLEST_KL = 1e-8
_MOST_NAMED_LAYERS = 12
_MOST_NAMED_HEADS = 16


class Curve(NamedTuple):
    """A line of a picture: what it is of, lengths in tokens, and a value for each."""

    label: str
    tokens: Sequence[int]
    values: Sequence[float]


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_figures(basis: KeyBasis, folder: str | Path) -> list[Path]:
    """The PNG files written to ``folder``: every picture that the basis has the numbers for.

    Rank by layer, a heat map of rank by layer and head, and spectra need its moments; kept mass and expected loss its
    held-out figures. Raises ``ArgumentError`` for a basis with neither, and ``LokiError`` without matplotlib.
    """
    figures = dict(_figures_of(basis))
    if not figures:
        raise ArgumentError(
            "this basis has neither moments nor held-out figures, so there is nothing to draw; calibrate again"
        )
    return [write_figure(figure, Path(folder) / f"{name}.png") for name, figure in figures.items()]


def write_answers_figure(scores: Sequence[Score], folder: str | Path) -> Path:
    """``answers.png`` in ``folder``: questions answered rightly by each variant, beside the bytes that it read."""
    figure = new_figure(9.0, 1.6 + 0.5 * len(scores))
    left, right = figure.subplots(1, 2, sharey=True)
    names = [score.variant for score in scores]
    colors = [_BLUE if name == "loki" else _GREY for name in names]
    asked = max(score.asked for score in scores)
    for axes, values, texts in (
        (left, [score.right for score in scores], [f"{s.right} of {s.asked}" for s in scores]),
        (right, [100 * score.read_fraction for score in scores], [f"{s.read_fraction:.0%}" for s in scores]),
    ):
        bars = axes.barh(names, values, color=colors, height=0.62)
        axes.bar_label(bars, texts, padding=4)
        plain_axes(axes, "x")
    left.set(title="Hidden facts found", xlabel="questions answered rightly", xlim=(0, 1.2 * asked))
    left.set_xticks(range(0, asked + 1, max(1, asked // 5)))
    right.set_xticks(range(0, 101, 20))
    left.invert_yaxis()
    right.set(title="Read from the cache at every step", xlabel="bytes, % of dense attention's", xlim=(0, 122))
    return write_figure(figure, Path(folder) / "answers.png")


def write_curves_figure(
    curves: Sequence[Curve], folder: str | Path, name: str, *, title: str, label: str, marked: int | None = None
) -> Path:
    """``name``.png in ``folder``: values by length, both axes logarithmic; a vertical line at ``marked`` tokens."""
    figure = new_figure(7.5, 4.8)
    axes = figure.subplots()
    colors, markers = (_GREY, _ORANGE, _GREEN, _BLUE, _RED, _PURPLE, _SKY), "sx^oDv*"
    for i, curve in enumerate(curves):
        color, marker = colors[i % len(colors)], markers[i % len(markers)]
        axes.plot(curve.tokens, curve.values, color=color, marker=marker, label=curve.label)
    if marked is not None:
        axes.axvline(marked, color=_GREY, linestyle=":", label=f"{marked:,} tokens")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({tokens for curve in curves for tokens in curve.tokens})
    axes.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    axes.set(title=title, xlabel="tokens in the cache", ylabel=label)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    plain_axes(axes)
    return write_figure(figure, Path(folder) / f"{name}.png")


def _figures_of(basis: KeyBasis) -> Iterator[tuple[str, "Figure"]]:
    model = basis.spec.model_id
    if basis.moments is not None:
        table = rank_table(basis)
        yield "rank_by_layer", _draw_rank(table, model)
        yield "rank_heat_map", _draw_heat_map(table, model)
        yield "spectra", _draw_spectra(spectra(basis), model)
    mass = mean_mass(basis)
    if mass:
        yield "kept_mass", _draw_mass(mass, f"{model}, {basis.budget}")
    losses = expected_losses(basis)
    if losses:
        yield "expected_loss", _draw_loss(losses, f"{model}: planes {basis.planes}, tail {basis.tail}")


def _draw_rank(table: RankTable, model: str) -> "Figure":
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    layers = list(table.layers)
    for side, label, color, marker in (("pre", "before RoPE", _ORANGE, "s"), ("post", "after RoPE", _BLUE, "o")):
        ranks = [[getattr(head, side) for head in heads] for heads in table.layers.values()]
        lowest, highest = [min(r) for r in ranks], [max(r) for r in ranks]
        axes.fill_between(layers, lowest, highest, color=color, alpha=0.18, linewidth=0)
        means = [sum(r) / len(r) for r in ranks]
        axes.plot(layers, means, color=color, marker=marker, label=f"{label} (mean {sum(means) / len(means):.1f})")
    axes.axhline(table.head_dim, color=_GREY, linestyle=":", label=f"head dim ({table.head_dim})")
    axes.set(
        title=f"Dims that explain {table.variance:.0%} of the keys' variance\n{model}; line: mean over heads, band: "
        "lowest to highest head",
        xlabel="layer",
        ylabel=f"rank@{100 * table.variance:g} (dims)",
        ylim=(0, 1.06 * table.head_dim),
    )
    _layer_axis(axes, layers)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_heat_map(table: RankTable, model: str) -> "Figure":
    layers, heads = list(table.layers), max(len(row) for row in table.layers.values())
    named = heads <= _MOST_NAMED_HEADS
    cell = 0.42 if named else 0.2
    figure = new_figure(2.6 + 2 * max(1.8, cell * heads), 1.8 + max(1.6, cell * len(layers)))
    panels = figure.subplots(1, 2, sharey=True)
    every = [rank for head in table.heads for rank in (head.pre, head.post)]
    middle = (min(every) + max(every)) / 2
    for axes, side, label in zip(panels, ("pre", "post"), ("before RoPE", "after RoPE"), strict=True):
        values = [[getattr(head, side) for head in row] for row in table.layers.values()]
        image = axes.imshow(values, cmap="cividis", vmin=min(every), vmax=max(every), aspect="auto")
        axes.set(title=label, xlabel="KV head")
        axes.set_xticks(range(0, heads, 1 if named else 4))
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        cells = [(x, y, rank) for y, row in enumerate(values) for x, rank in enumerate(row)] if named else []
        for x, y, rank in cells:
            axes.text(x, y, str(rank), ha="center", va="center", color="white" if rank < middle else "black")
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, aspect=30, label=f"rank@{100 * table.variance:g} (dims)")
    figure.suptitle(f"Rank of keys by layer and head, of {table.head_dim} dims\n{model}", fontsize="large")
    return figure


def _draw_spectra(curves: dict[int, Spectrum], model: str) -> "Figure":
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure = new_figure(11.0, 4.2)
    panels = figure.subplots(1, 3, sharey=True)
    titles = ("keys before RoPE (PCA)", "keys after RoPE (PCA)", "scores q·k (balanced basis)")
    # The brightest yellow is hard to see on white: few layers stop short of it.
    few = len(curves) <= _MOST_NAMED_LAYERS
    shades = ScalarMappable(Normalize(min(curves), max(curves) + 0.1 * len(curves) * few), "viridis")
    colors = shades.to_rgba(np.array(list(curves)))
    for axes, title, field in zip(panels, titles, Spectrum._fields, strict=True):
        for color, (layer, curve) in zip(colors, curves.items(), strict=True):
            values = getattr(curve, field).tolist()
            axes.plot(range(1, len(values) + 1), values, color=color, label=f"layer {layer}")
        axes.axhline(0.9, color=_GREY, linestyle=":")
        axes.set(title=title, xlabel="leading dims kept", ylim=(0, 1.03), xlim=(0, len(values)))
        plain_axes(axes)
    panels[0].set_ylabel("variance explained")
    panels[0].annotate("90 %", (0, 0.9), xytext=(4, 3), textcoords="offset points", color=_GREY)
    if few:
        panels[2].legend(loc="lower right", frameon=False)
    else:
        figure.colorbar(shades, ax=panels, label="layer")
    figure.suptitle(f"Variance explained by the leading dims\n{model}, mean over KV heads")
    return figure


def _draw_mass(mass: dict[str, dict[int, float]], subject: str) -> "Figure":
    figure = new_figure(10.0, 4.4)
    left, right = figure.subplots(1, 2)
    exact = mass[EXACT]
    layers = list(exact)
    left.plot(layers, list(exact.values()), color="black", linestyle="--", marker="x", label=f"{EXACT} (the bound)")
    for name, by_layer in mass.items():
        if name == EXACT:
            continue
        color, marker = _CANDIDATE_STYLE[name]
        left.plot(layers, [by_layer[i] for i in layers], color=color, marker=marker, label=name)
        right.plot(layers, [by_layer[i] / exact[i] for i in layers], color=color, marker=marker)
    right.axhline(1, color="black", linestyle="--")
    left.set(title="Attention mass kept", xlabel="layer", ylabel="fraction of the mass", ylim=(0, 1.03))
    right.set(title="The same, relative to exact top-k", xlabel="layer", ylabel=f"mass kept / {EXACT}'s")
    for axes in (left, right):
        _layer_axis(axes, layers)
    figure.legend(loc="outside lower center", ncols=len(mass), frameon=False)
    figure.suptitle(f"What each basis selects, on held-out text\n{subject}")
    return figure


def _draw_loss(losses: Sequence[BudgetLoss], subject: str) -> "Figure":
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    places = range(len(losses))
    exact = [max(loss.exact.kl, _SMALLEST_KL) for loss in losses]
    ours = [max(loss.loki.kl, _SMALLEST_KL) for loss in losses]
    axes.plot(places, exact, color="black", linestyle="--", marker="x", label=f"{EXACT}, no tail")
    axes.plot(places, ours, color=_BLUE, marker="o", label="loki")
    for place, loss, kls in ((i, loss, (exact[i], ours[i])) for i, loss in enumerate(losses)):
        for kl, figures in zip(kls, (loss.exact, loss.loki), strict=True):
            axes.annotate(
                f"{kl:.2g} nats\n{figures.agreement:.1%} same token",
                (place, kl),
                xytext=(-4, 5),
                textcoords="offset points",
                ha="right",
                fontsize="small",
            )
    axes.set_yscale("log")
    axes.set(
        title=f"Expected loss by budget, on held-out text\n{subject}",
        xlabel="budget: tokens attended (bytes loki reads, % of dense)",
        ylabel="KL from dense attention (nats a token)",
        ylim=(min(ours + exact) / 2, max(ours + exact) * 3),
        xlim=(-0.65, len(losses) - 0.7),
    )
    labels = [f"{x.label}{' (asked)' * x.asked}\n({x.loki.read_fraction:.0%})" for x in losses]
    axes.set_xticks(places, labels)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    plain_axes(axes)
    return figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches; raises ``LokiError`` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise LokiError("pictures need matplotlib; pip install 'loki-attention[plots]'") from None
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: "Axes", grid: Literal["x", "y", "both"] = "both") -> None:
    """Axes without a box, with a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _layer_axis(axes: "Axes", layers: Sequence[int]) -> None:
    every = max(1, len(layers) // _MOST_NAMED_LAYERS)
    axes.set_xticks(layers[::every])
    plain_axes(axes)


def write_figure(figure: "Figure", path: Path) -> Path:
    """The PNG file, written whole or not at all."""
    with written_whole(path) as draft:
        figure.savefig(draft, format="png", dpi=_DOTS_PER_INCH)
    return path
