"""Evaluation results side by side: quality beside bytes read, and which differences are more than noise.

Works on result rows alone, from one file or several; paired where two variants answered the same items.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from loki_attention.errors import ArgumentError
from loki_attention.intervals import Interval, bootstrap_interval, sign_test
from loki_attention.results import Result

DENSE = "dense"
BOUND = "exact-topk"
LOWER_IS_BETTER = ("kl_from_dense", "log_loss", "perplexity", "bits_per_byte", "perplexity_over_dense", "output_error")
NOISE = 0.05
"""A paired difference is noise where its p-value is at least this, or its 95 % interval holds 0."""

_FIRST = {"perplexity": "kl_from_dense", "fidelity": "kl_from_dense"}
_PAIRED_BY = {"perplexity": "log_loss", "perplexity_over_dense": "log_loss"}


class Difference(NamedTuple):
    """A variant less another on the same items; ``p`` from the sign test of answers, None where items are numbers."""

    other: str
    value: float
    interval: Interval
    p: float | None

    @property
    def is_noise(self) -> bool:
        """Whether the two cannot be told apart."""
        return self.p >= NOISE if self.p is not None else self.interval.low <= 0 <= self.interval.high


class Row(NamedTuple):
    """One variant's results by column, and its paired difference from the best of its budget, None for that one."""

    variant: str
    method: str
    budget: str
    read_fraction: float
    results: dict[str, Result]
    behind: Difference | None


class Table(NamedTuple):
    """A task's rows, dense first, then budget by budget. ``columns`` are metrics, of retrieval lengths too.

    ``first`` is the column by which the best is named; ``note`` says why no claim can rest on it, where that is so.
    """

    task: str
    columns: tuple[str, ...]
    first: str
    rows: list[Row]
    note: str | None


def tables(results: Iterable[Result]) -> list[Table]:
    """A table a task and set of items; raises ``ArgumentError`` for rows that ``loki evaluate`` did not write."""
    groups: dict[tuple[str, str], dict[str, dict[str, Result]]] = {}
    for result in results:
        config = result.config
        if not {"task", "items", "variant", "read_fraction"} <= config.keys():
            raise ArgumentError(
                f"a result of {result.metric} names no task and items; compare reads what `loki evaluate` wrote"
            )
        if config.get("layer", "all") == "all":
            # The lengths of a family stand side by side; other tasks are one set of items each.
            name, length = str(config["task"]), config.get("length")
            task = name if length is None else name.removesuffix(f":{length}")
            group = groups.setdefault((task, "" if length else str(config["items"])), {})
            column = result.metric if length is None else f"{result.metric} at {length}"
            group.setdefault(str(config["variant"]), {})[column] = result
    return [_table(task, variants) for (task, _), variants in groups.items()]


def difference(ours: Result, theirs: Result) -> Difference | None:
    """``ours`` less ``theirs``; None where they do not have the same items."""
    a, b = ours.items, theirs.items
    if a is None or b is None or len(a) != len(b) or ours.config.get("items") != theirs.config.get("items"):
        return None
    each = [x - y for x, y in zip(a, b, strict=True)]
    answers = all(item in (0, 1) for item in (*a, *b))
    return Difference(
        other=str(theirs.config["variant"]),
        value=sum(each) / len(each),
        interval=bootstrap_interval(each, seed=0),
        p=sign_test(sum(x > 0 for x in each), sum(x < 0 for x in each)) if answers else None,
    )


def better(metric: str, ours: float, theirs: float) -> bool:
    """Whether ``ours`` is the better value of a metric."""
    return ours < theirs if metric in LOWER_IS_BETTER else ours > theirs


def best_of(variants: Mapping[str, Mapping[str, Result]], column: str) -> str | None:
    """The variant with the best value of a column, the first of equals; None where no variant has that column."""
    best: str | None = None
    for name, found in variants.items():
        if column not in found:
            continue
        if best is None or better(column, found[column].value, variants[best][column].value):
            best = name
    return best


def behind(ours: Mapping[str, Result], best: Mapping[str, Result], column: str) -> Difference | None:
    """How far a variant's results by column are from another's; None where they do not have the same items.

    Perplexities are paired by their logarithms, which are means over the items.
    """
    by = _PAIRED_BY.get(column, column)
    return difference(ours[by], best[by]) if by in ours and by in best else None


def _table(task: str, variants: dict[str, dict[str, Result]]) -> Table:
    columns = tuple(dict.fromkeys(column for found in variants.values() for column in found))
    wanted = _FIRST.get(task, columns[-1])
    first = wanted if wanted in columns else columns[0]
    rows = [_row(found, first) for found in variants.values()]
    budgets = list(dict.fromkeys(row.budget for row in rows))
    best = {budget: _best_row([row for row in rows if row.budget == budget], first) for budget in budgets}
    compared = [row._replace(behind=_behind(row, best[row.budget], first)) for row in rows]
    ordered = sorted(compared, key=lambda row: (row.method != DENSE, budgets.index(row.budget)))
    return Table(task, columns, first, ordered, _note(rows, first))


def _row(found: dict[str, Result], first: str) -> Row:
    config = found.get(first, next(iter(found.values()))).config
    return Row(
        variant=str(config["variant"]),
        method=str(config["method"]),
        budget=str(config.get("budget") or ""),
        read_fraction=float(config["read_fraction"] or 1.0),
        results=found,
        behind=None,
    )


def _best_row(rows: Sequence[Row], first: str) -> Row | None:
    """The best variant of a budget among those that are no bound."""
    found = {row.variant: row for row in rows if row.method not in (DENSE, BOUND)}
    best = best_of({name: row.results for name, row in found.items()}, first)
    return None if best is None else found[best]


def _behind(row: Row, best: Row | None, first: str) -> Difference | None:
    if best is None or row.variant == best.variant:
        return None
    return behind(row.results, best.results, first)


def _note(rows: Sequence[Row], first: str) -> str | None:
    config = next(row.results[first] for row in rows if first in row.results).config
    if config.get("of_record") == 0:
        return f"dense attention is right in {config['dense_value']:.0%} alone: this says nothing of a method"
    if config.get("near_chance") == 1:
        return f"dense attention is near chance ({config['chance']:.0%}): this says nothing of a method"
    return None


def to_dict(table: Table) -> dict[str, Any]:
    """Plain JSON types."""
    return {
        "task": table.task,
        "columns": list(table.columns),
        "first": table.first,
        "note": table.note,
        "rows": [
            {
                "variant": row.variant,
                "method": row.method,
                "budget": row.budget,
                "read_fraction": row.read_fraction,
                "values": {
                    column: {"value": result.value, "interval": result.interval, "n": result.n}
                    for column, result in row.results.items()
                },
                "behind": None if row.behind is None else {**row.behind._asdict(), "noise": row.behind.is_noise},
            }
            for row in table.rows
        ],
    }
