"""Tables of ``comparing`` for a terminal and as Markdown."""

from rich.table import Table as Shown

from loki_attention.analysis.comparing import DENSE, Row, Table, better
from loki_attention.results import Result

_HEADINGS = {
    "kl_from_dense": "KL x 1000",
    "next_token_agreement": "same token",
    "perplexity_over_dense": "over dense",
    "bits_per_byte": "bits a byte",
    "retrieval_accuracy": "accuracy",
    "output_error": "output error",
}
_THOUSANDTHS = ("kl_from_dense",)
_SIGNED = ("perplexity_over_dense",)
_HIDDEN = ("log_loss",)
_METRICS_AT_ONCE = 2


def terminal_tables(table: Table) -> list[Shown]:
    """A task's table for a terminal; one of many columns comes in parts."""
    titles, rows = headings(table), [cells(table, row) for row in table.rows]
    # Bytes, the first metrics and the standing; then the others.
    parts = [[*range(1, 2 + _METRICS_AT_ONCE), len(titles) - 1]] if len(titles) > 3 + _METRICS_AT_ONCE else []
    rest = list(range(2 + _METRICS_AT_ONCE, len(titles) - 1)) if parts else list(range(1, len(titles)))
    return [_part(table, titles, rows, columns) for columns in (*parts, rest)]


def _part(table: Table, titles: list[str], rows: list[list[str]], columns: list[int]) -> Shown:
    shown = Shown(title=table.task, caption=table.note)
    shown.add_column(titles[0], no_wrap=True)
    for column in columns:
        shown.add_column(titles[column], justify="right")
    budget = None
    for row, texts in zip(table.rows, rows, strict=True):
        if row.budget != budget and row.method != DENSE:
            shown.add_section()
            budget = row.budget
        shown.add_row(texts[0], *(texts[column] for column in columns))
    return shown


def markdown_table(table: Table) -> str:
    """The same in Markdown, under a heading."""
    lines = [f"### {table.task}", ""]
    if table.note:
        lines += [f"*{table.note}*", ""]
    lines += ["| " + " | ".join(headings(table)) + " |", "|" + "---|" * len(headings(table))]
    lines += ["| " + " | ".join(cells(table, row)) + " |" for row in table.rows]
    return "\n".join(lines) + "\n"


def headings(table: Table) -> list[str]:
    """The columns of a task's table."""
    return ["variant", "bytes", *(_heading(column) for column in _shown(table)), "to the best"]


def cells(table: Table, row: Row) -> list[str]:
    """One row: its values, the first metric's with its interval, and how it stands to the best of its budget."""
    values = [_cell(row.results.get(column), interval=column == table.first) for column in _shown(table)]
    return [row.variant, f"{row.read_fraction:.1%}", *values, _standing(table, row)]


def _shown(table: Table) -> list[str]:
    return [column for column in table.columns if column not in _HIDDEN]


def _heading(column: str) -> str:
    metric, at, length = column.partition(" at ")
    return f"{_HEADINGS.get(metric, metric.replace('_', ' '))}{at}{length}"


def _cell(result: Result | None, *, interval: bool) -> str:
    if result is None:
        return "-"
    numbers = [result.value, *(result.interval or ())] if interval else [result.value]
    shown = [_number(result, number) for number in numbers]
    return shown[0] if len(shown) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _number(result: Result, number: float) -> str:
    if result.metric in _THOUSANDTHS:
        return f"{1000 * number:.2f}"
    if result.unit == "fraction":
        return f"{number:+.2%}" if result.metric in _SIGNED else f"{number:.1%}"
    return f"{number:.3f}"


def _standing(table: Table, row: Row) -> str:
    if row.method == DENSE or table.first not in row.results:
        return ""
    if row.behind is None:
        return "best" if any(other.behind and other.behind.other == row.variant for other in table.rows) else ""
    metric = row.results[table.first].metric
    verdict = "noise" if row.behind.is_noise else "better" if better(metric, row.behind.value, 0.0) else "worse"
    return verdict if row.behind.p is None else f"{verdict}, p {row.behind.p:.2g}"
