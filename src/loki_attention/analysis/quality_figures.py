"""Pictures of evaluations: quality against bytes read, and retrieval by length and depth. Draws with ``figures``."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loki_attention.analysis.comparing import BOUND, DENSE, Row, Table
from loki_attention.analysis.figures import COLORS, new_figure, plain_axes, write_figure
from loki_attention.results import Result

_MARKERS = "os^Dv*Xp<>"
# The second round of colours differs from the first.
_LINES = ("-", "-.")
_LOGARITHMIC = ("kl_from_dense",)
_PANELS_A_ROW = 4


def write_quality_figures(tables: Sequence[Table], folder: Path) -> list[Path]:
    """``quality_TASK.png`` for every table: the first metric against bytes read, a line a method over its budgets."""
    return [_quality(table, folder) for table in tables if any(row.method != DENSE for row in table.rows)]


def write_heat_maps(results: Iterable[Result], folder: Path) -> list[Path]:
    """``retrieval_FAMILY.png`` for every family: accuracy by length and by where in the prose the answer stands."""
    families: dict[str, dict[str, dict[int, Result]]] = {}
    for result in results:
        config = result.config
        if result.metric == "retrieval_accuracy" and result.items is not None:
            variants = families.setdefault(str(config["family"]), {})
            variants.setdefault(str(config["variant"]), {})[int(config["length"] or 0)] = result
    return [_heat_maps(family, variants, folder) for family, variants in families.items()]


def _quality(table: Table, folder: Path) -> Path:
    figure = new_figure(8.0, 5.0)
    axes = figure.subplots()
    lines: dict[str, list[Row]] = {}
    for row in table.rows:
        if table.first in row.results:
            lines.setdefault(row.variant.partition(" @ ")[0], []).append(row)
    dense = lines.pop(DENSE, None)
    for number, (name, rows) in enumerate(lines.items()):
        _line(axes, name, sorted(rows, key=lambda row: row.read_fraction), number, table.first)
    if dense and table.first not in _LOGARITHMIC:
        axes.axhline(dense[0].results[table.first].value, color=COLORS[-1], linestyle=":", label=DENSE)
    axes.set_xscale("log", base=2)
    if table.first in _LOGARITHMIC:
        axes.set_yscale("log")
    shares = sorted({row.read_fraction for rows in lines.values() for row in rows})
    ticks = [2.0**power for power in range(-7, 1) if shares[0] / 2 <= 2.0**power <= shares[-1] * 2]
    axes.set_xticks(ticks, [f"{tick:.3g}" if tick == 1 else f"1/{round(1 / tick)}" for tick in ticks])
    unit = next(row.results[table.first].unit for rows in lines.values() for row in rows)
    axes.set(
        title=table.task,
        xlabel="bytes read a decode step, of dense attention's",
        ylabel=f"{table.first.replace('kl_', 'KL ').replace('_', ' ')} ({unit})",
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    plain_axes(axes)
    return write_figure(figure, folder / f"quality_{_file_name(table.task)}.png")


def _line(axes: Any, name: str, rows: Sequence[Row], number: int, metric: str) -> None:
    results = [row.results[metric] for row in rows]
    values = np.array([result.value for result in results])
    bounds = np.array([result.interval or (result.value, result.value) for result in results])
    is_bound = name.partition(":")[0] == BOUND
    axes.errorbar(
        [row.read_fraction for row in rows],
        values,
        yerr=np.abs(bounds.T - values),
        label=f"{name} (the bound)" if is_bound else name,
        color="black" if is_bound else COLORS[number % len(COLORS)],
        linestyle="--" if is_bound else _LINES[number // len(COLORS) % len(_LINES)],
        marker=_MARKERS[number % len(_MARKERS)],
        capsize=2,
    )


def _heat_maps(family: str, variants: dict[str, dict[int, Result]], folder: Path) -> Path:
    columns = min(_PANELS_A_ROW, len(variants))
    rows = -(-len(variants) // columns)
    figure = new_figure(0.6 + 2.4 * columns, 0.8 + 2.2 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(variants) :]:
        axes.set_axis_off()
    for axes, (name, by_length) in zip(panels, variants.items(), strict=False):
        lengths = sorted(by_length)
        shares = np.array([by_depth(by_length[length]) for length in lengths]).T
        picture = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(name, fontsize="small")
        axes.set_xticks(range(len(lengths)), [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
        axes.set_yticks([0, len(shares) - 1], ["start", "end"])
    figure.colorbar(picture, ax=panels.tolist(), label="answered rightly")
    figure.suptitle(f"{family}: by length in tokens and place in the text")
    return write_figure(figure, folder / f"retrieval_{_file_name(family)}.png")


def by_depth(result: Result) -> list[float]:
    """The share of right answers in each part of the text, not a number for a part nobody asked about."""
    items, parts = result.items or (), int(result.config["depths"] or 1)
    found = (items[part::parts] for part in range(parts))
    return [sum(part) / len(part) if part else float("nan") for part in found]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w-]+", "-", text)
