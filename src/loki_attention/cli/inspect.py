"""``loki inspect``: what a basis folder holds, and pictures of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loki_attention.cli.output import AsJson, describe, examples, print_json, results

if TYPE_CHECKING:
    from loki_attention.core.basis import KeyBasis

INSPECT_EXAMPLES = examples(
    "loki inspect my-basis", "loki inspect my-basis --plot pictures", "loki inspect my-basis --json"
)

BasisFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A basis folder that loki calibrate wrote.")]
Plot = Annotated[Path | None, typer.Option(help="Write pictures (PNG) to this folder; needs matplotlib.")]


def inspect_command(basis: BasisFolder, plot: Plot = None, as_json: AsJson = False) -> None:
    """Show a basis: rank of every head's keys, attention mass kept by each candidate, what was chosen and its figures."""
    from loki_attention import KeyBasis
    from loki_attention.analysis.figures import write_figures

    loaded = KeyBasis.load(basis)
    if not as_json:
        _print_tables(loaded, draw=plot is not None)
    files = [] if plot is None else write_figures(loaded, plot)
    if as_json:
        print_json(_document(loaded, basis) | {"figures": [str(file) for file in files]})
    for file in [] if as_json else files:
        print(file)


def _document(basis: "KeyBasis", path: Path) -> dict[str, Any]:
    from loki_attention.analysis.rank import rank_table

    ranks = None if basis.moments is None else rank_table(basis).to_dict()
    return describe(basis, path) | {"ranks": ranks}


def _print_tables(basis: "KeyBasis", *, draw: bool) -> None:
    from loki_attention.analysis import report
    from loki_attention.analysis.figures import can_draw
    from loki_attention.analysis.rank import rank_table, spectra
    from loki_attention.calibration.summary import loss_table

    out = results()
    tables: list[Any] = [report.summary(basis)]
    if basis.moments is None:
        tables.append("[italic]No moments beside this basis: ranks and spectra cannot be shown.[/]")
    else:
        tables.append(report.rank_report(rank_table(basis)))
    tables += [report.mass_report(basis), report.choice_report(basis)]
    if basis.record.get("figures", {}).get("budgets"):
        tables.append(loss_table(basis))
    if draw and not can_draw() and basis.moments is not None:
        tables += [report.rank_drawing(rank_table(basis)), report.spectra_drawing(spectra(basis))]
    for table in tables:
        if table is not None:
            out.print(table)
            out.print()
