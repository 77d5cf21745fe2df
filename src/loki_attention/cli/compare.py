"""``loki compare``: evaluations side by side, from saved results."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loki_attention.cli.output import AsJson, examples, print_json, results
from loki_attention.errors import ArgumentError

if TYPE_CHECKING:
    from loki_attention.results import Result

COMPARE_EXAMPLES = examples(
    "loki compare results.json",
    "loki compare loki.json others.json --plot pictures",
    "loki compare results.json --markdown > table.md",
)

Files = Annotated[list[Path], typer.Argument(metavar="RESULTS", help="Files that `loki evaluate` wrote.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")]
Plot = Annotated[Path | None, typer.Option(help="Write pictures (PNG) to this folder; needs matplotlib.")]


def compare_command(files: Files, markdown: Markdown = False, plot: Plot = None, as_json: AsJson = False) -> None:
    """Show quality beside bytes read, method by method, and which differences are more than noise.

    Two variants are compared on the same items: questions by the exact sign test, windows by the paired bootstrap.
    """
    if markdown and as_json:
        raise ArgumentError("--markdown and --json exclude each other; give one of them")
    rows = _rows(files)
    from loki_attention.analysis.comparing import tables, to_dict
    from loki_attention.analysis.comparison_report import markdown_table, terminal_tables
    from loki_attention.analysis.quality_figures import write_heat_maps, write_quality_figures

    found = tables(rows)
    pictures = [] if plot is None else [*write_quality_figures(found, plot), *write_heat_maps(rows, plot)]
    if as_json:
        print_json({"tables": [to_dict(table) for table in found], "figures": [str(path) for path in pictures]})
        return
    for table in found:
        if markdown:
            print(markdown_table(table))
        else:
            results().print(*terminal_tables(table))
    for path in pictures:
        print(path)


def _rows(files: list[Path]) -> "list[Result]":
    """The rows of all files; raises where two files have the same variant on the same items."""
    from loki_attention.results import load_results

    seen: dict[tuple[object, ...], Path] = {}
    rows = []
    for path in files:
        for row in load_results(path).results:
            key = (row.metric, *(row.config.get(name) for name in ("task", "items", "variant", "layer")))
            if key in seen:
                raise ArgumentError(
                    f"{path} and {seen[key]} both have {row.config.get('variant')} on {row.config.get('task')}; leave one out"
                )
            seen[key] = path
            rows.append(row)
    return rows
