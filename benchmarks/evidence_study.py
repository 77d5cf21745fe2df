"""A study at equal bytes by point and column, and how its variants stand to the best of those that may be compared.

Standings are those of ``loki compare``: answers by the exact sign test, windows by the paired bootstrap. Knows nothing of how
they are shown.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from loki_attention.analysis.comparing import BOUND, DENSE, behind, best_of, better, difference
from loki_attention.results import Result

KL, PERPLEXITY = "kl_from_dense", "perplexity_over_dense"

Rows = dict[str, dict[str, Result]]
"""A point's results: by variant, then by column."""

Rule = Callable[[Mapping[str, Result]], bool]
"""Whether a variant with these results may be named the best."""


class Study(NamedTuple):
    """A study's rows by point, the largest first, its columns, dense attention's results, and every variant's standings."""

    points: dict[str, Rows]
    columns: tuple[str, ...]
    dense: dict[str, Result]
    left_out: dict[str, float]
    """Retrieval columns that are not of record, with dense attention's share of right answers."""
    rivals: frozenset[str]
    """The variants among which the best is named."""
    stands: dict[str, dict[str, list[str | None]]]
    """By point and variant how it stands in each column: best, noise, worse, better, or None where it has no result."""


def study_of(results: Sequence[Result], among: Rule, suffix: str = "") -> Study:
    """The study with these results, variants named less ``suffix``, whose best is one of those that ``among`` holds for."""
    found: dict[str, Rows] = {}
    dense: dict[str, Result] = {}
    left_out = {column_of(one): float(one.config["dense_value"] or 0) for one in results if not of_record(one)}
    for one in (one for one in results if column_of(one) not in left_out):
        column = column_of(one)
        if one.config["method"] == DENSE:
            dense[column] = one
            continue
        name = str(one.config["variant"]).partition(" @ ")[0].removesuffix(suffix)
        point = str(one.config["budget"]).removeprefix("bytes=")
        found.setdefault(point, {}).setdefault(name, {})[column] = one
    points = {point: found[point] for point in by_size(found)}
    columns = tuple(column for column in dense if column in (KL, PERPLEXITY) or is_retrieval(column))
    rivals = frozenset(name for rows in points.values() for name, of in rows.items() if among(of))
    stands = {
        point: {name: [standing(rows, name, column, rivals) for column in columns] for name in rows}
        for point, rows in points.items()
    }
    return Study(points, columns, dense, left_out, rivals, stands)


def by_size(points: Iterable[str]) -> list[str]:
    """Shares of dense attention's bytes from the largest on."""
    return sorted(points, key=Fraction, reverse=True)


def column_of(result: Result) -> str:
    """The metric, or a family and length: ``multi-key 4K``."""
    if result.metric != "retrieval_accuracy":
        return result.metric
    return f"{result.config['family']} {int(result.config['length'] or 0) // 1024}K"


def is_retrieval(column: str) -> bool:
    """Whether a column is a family at a length."""
    return column.endswith("K")


def of_record(result: Result) -> bool:
    """Whether dense attention finds at least half of what is hidden."""
    return result.config.get("of_record") != 0


def runs_as_counted(found: Mapping[str, Result]) -> bool:
    """Whether a variant reads what it counts, which a simulated one and the bound do not."""
    return is_no_bound(found) and first(found).config["simulated"] is None


def is_no_bound(found: Mapping[str, Result]) -> bool:
    """Whether a variant is no bound: whether its budget is one of bytes."""
    return first(found).config["method"] != BOUND


def first(found: Mapping[str, Result]) -> Result:
    """Any result of a variant: they share their settings."""
    return next(iter(found.values()))


def standing(rows: Rows, name: str, column: str, rivals: Collection[str]) -> str | None:
    """How a variant stands to the best of its rivals in a column: best, noise, worse, better, or None without a result."""
    best = best_of({other: rows[other] for other in rows if other in rivals}, column)
    if best is None or column not in rows[name]:
        return None
    ours, theirs = rows[name][column].value, rows[best][column].value
    if ours == theirs and name in rivals:
        return "best"
    gap = behind(rows[name], rows[best], column)
    assert gap is not None, f"{name} and {best} have no {column} of the same items"
    return "noise" if gap.is_noise else "better" if better(column, ours, theirs) else "worse"


def is_noise(ours: Result, theirs: Result) -> bool:
    """Whether two variants cannot be told apart by these results."""
    gap = difference(ours, theirs)
    return gap is None or gap.is_noise
