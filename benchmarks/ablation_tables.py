"""The tables of one change at a time in docs/results.md: the ablation of every model, and calibration. Used by ``tables.py``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from loki_attention.analysis.comparing import difference
from loki_attention.core.planes import Planes
from loki_attention.errors import LokiError
from loki_attention.results import Result, SavedResults
from table_parts import joined, kl, made_by, markdown, paragraph, saved

ABLATION, CALIBRATION = "evidence-ablation", "evidence-calibration.json"
OURS, BUNDLED = "loki", "G = 2"
KL = "kl_from_dense"
CHANGED = """## One change at a time

KL from dense, x 1000 [95 %], and the change against loki's own row of the same column; ≈ where the two cannot be told
apart by the paired bootstrap over windows. K is a share of the tokens, `Budget(fraction, minimum=48, sinks=4,
recent=16)`: changes of planes and of sets change the bytes too. *Tail* is the `linear` one unless the row names
another.
"""
GROUPS = {
    "The tail": ("tail ",),
    "The tail: its sample, its cap, kappa": ("sample ", "cap ", "no cap", "kappa "),
    "The basis": ("pca-", "balanced", "per head"),
    "The query in 8 bits against floats": ("query in floats",),
    "One set a KV head against one a query head": ("per query head",),
    "How a group's heads agree": ("0 L", "0.5 L", "0.75 L", "1 L", "over sd", "mean probability"),
    "Tokens and layers that are always kept": ("no sinks", "no recent", "layer 0"),
}
OTHERS = "Others"
LENGTH, TEXT = "perplexity at 4096", "perplexity of source code"
CALIBRATED = {
    LENGTH: ("### Calibrated in windows of 512 and of 4096 tokens, evaluated at 4096\n", "calibrated at 4096"),
    TEXT: ("### Calibrated on novels and on WikiText, evaluated on source code\n", "calibrated on wikitext"),
}


class Place(NamedTuple):
    """A column: a model, a budget, and the tail that its rows share."""

    model: str
    fraction: str
    tail: str


Rows = dict[Place, dict[str, Result]]
"""KL by column, in the order of the file, then by change."""


def ablation_parts(folder: Path) -> list[str]:
    """A table a group of changes, empty where the bundled model's file is not there; other models' files stand beside it."""
    bundled = saved(folder / f"{ABLATION}.json")
    if bundled is None:
        return []
    files = {BUNDLED: bundled}
    for path in sorted(folder.glob(f"{ABLATION}-*.json")):
        found = saved(path)
        assert found is not None
        files[path.stem.removeprefix(f"{ABLATION}-")] = found
    rows: Rows = {}
    for model, file in files.items():
        add_rows(rows, model, file)
    groups = grouped(rows)
    parts = [CHANGED, windows_of(files)]
    parts += [f"### {group}\n\n{changes_table(rows, names)}" for group, names in groups.items()]
    return [*parts, planes_part(rows), *(made_by(file.environment) for file in files.values())]


def windows_of(files: Mapping[str, SavedResults]) -> str:
    """How many windows each model was measured on."""
    models = [f"the bundled model ({name})" if name == BUNDLED else name for name in files]
    counts = [f"{file.results[0].n} for {model}" for model, file in zip(models, files.values(), strict=True)]
    return paragraph(f"Windows of 2048 tokens of WikiText-2 test, their second half scored: {joined(counts)}.")


def calibration_parts(folder: Path) -> list[str]:
    """A table for the length and one for the text of calibration, empty where the file is not there."""
    file = saved(folder / CALIBRATION)
    if file is None:
        return []
    parts = [
        "## What calibration sees\n",
        "KL from dense, x 1000 [95 %]; changes against the row without one, marked as above.\n",
    ]
    for task, (title, own) in CALIBRATED.items():
        rows: Rows = {}
        add_rows(rows, BUNDLED, SavedResults(tuple(of_task(file.results, task)), file.environment))
        if rows:
            names = dict.fromkeys(name for found in rows.values() for name in found)
            parts += [title, changes_table(rows, list(names), own)]
    return [*parts, made_by(file.environment)]


def of_task(results: Sequence[Result], task: str) -> list[Result]:
    """The results of one task."""
    return [one for one in results if one.config["task"] == task]


def add_rows(rows: Rows, model: str, file: SavedResults) -> None:
    """The file's KL by column and change. Loki without a tail, or with a mean one, is also a change of the tail's column."""
    for one in file.results:
        if one.metric != KL or one.config["method"] == "dense":
            continue
        name, _, fraction = str(one.config["variant"]).partition(" @ ")
        tail = str(one.config["tail"])
        change = name.removesuffix(f", tail {tail}").removesuffix(",")
        if change == f"tail {tail}":
            rows.setdefault(Place(model, fraction, "linear"), {})[change] = one
        else:
            rows.setdefault(Place(model, fraction, tail), {})[change] = one
            if change == OURS and tail == "none":
                rows.setdefault(Place(model, fraction, "linear"), {})["tail none"] = one


def grouped(rows: Rows) -> dict[str, list[str]]:
    """The changes that are no planes, by group."""
    names = dict.fromkeys(name for found in rows.values() for name in found if name != OURS)
    found: dict[str, list[str]] = {group: [] for group in (*GROUPS, OTHERS)}
    for name in (name for name in names if planes_of(name) is None):
        group = next((group for group, starts in GROUPS.items() if name.startswith(starts)), OTHERS)
        found[group].append(name)
    return {group: changes for group, changes in found.items() if changes}


def changes_table(rows: Rows, names: Sequence[str], own: str = OURS) -> str:
    """A row a change, loki's own first, in the columns that have any of them."""
    places = [place for place in rows if any(name in rows[place] for name in names)]
    shown = [own, *(name for name in names if name != own)]
    lines = [[name if name != own else f"**{name}**", *(cell(rows[p], name, own) for p in places)] for name in shown]
    return markdown(["", *(heading(place, places) for place in places)], lines)


def heading(place: Place, places: Sequence[Place]) -> str:
    """What a column is called; the model where there are several."""
    model = f"{place.model}: " if len({one.model for one in places}) > 1 else ""
    return f"{model}{place.fraction}, {'no tail' if place.tail == 'none' else 'tail'}"


def cell(found: Mapping[str, Result], name: str, own: str = OURS) -> str:
    """KL, its interval, and the change against loki's own row."""
    if name not in found:
        return ""
    return kl(found[name]) if name == own else f"{kl(found[name])} {change_of(found[name], found[own])}"


def change_of(ours: Result, base: Result) -> str:
    """The change in percent, marked where it is noise."""
    gap = difference(ours, base)
    return f"{ours.value / base.value - 1:+.1%}{' ≈' if gap is not None and gap.is_noise else ''}"


def planes_of(name: str) -> Planes | None:
    """The planes that a change names, None for another change."""
    try:
        return Planes.parse(name)
    except LokiError:
        return None


def planes_part(rows: Rows) -> str:
    """The best planes of each size in every column, and how often the default is."""
    sizes: dict[int, list[str]] = {}
    for name in dict.fromkeys(name for found in rows.values() for name in found):
        planes = planes_of(name)
        if planes is not None:
            sizes.setdefault(planes.bytes_per_token, []).append(name)
    places = [place for place, found in rows.items() if any(planes_of(name) for name in found)]
    if not sizes:
        return ""
    lines = [["**loki**", *(cell(rows[place], OURS) for place in places)]]
    for size, names in sorted(sizes.items()):
        lines.append([f"{size} bytes", *(best_cell(rows[place], names) for place in places)])
    count = sum(map(len, sizes.values()))
    text = (
        f"Of {count} layouts from {min(sizes)} to {max(sizes)} bytes a token and KV head the best of every size, column by "
        f"column; the others are in the result file. {standing_of_default(rows, places, sizes)}"
    )
    table = markdown(["planes", *(heading(place, places) for place in places)], lines)
    return f"### Planes\n\n{paragraph(text)}\n{table}"


def best_cell(found: Mapping[str, Result], names: Sequence[str]) -> str:
    """The best planes of a size, their KL, and the change against the default's."""
    present = [name for name in names if name in found]
    if not present:
        return ""
    best = min(present, key=lambda name: found[name].value)
    return f"{best}: {cell(found, best)}"


def standing_of_default(rows: Rows, places: Sequence[Place], sizes: Mapping[int, Sequence[str]]) -> str:
    """In how many columns the default's planes are the best of their size, or cannot be told from it."""
    default = planes_of(str(rows[places[0]][OURS].config["planes"]))
    rivals = [] if default is None else sizes.get(default.bytes_per_token, [])
    good = 0
    for found in (rows[place] for place in places):
        best = min((found[name] for name in rivals if name in found), key=lambda one: one.value, default=None)
        gap = None if best is None else difference(found[OURS], best)
        good += gap is not None and (gap.is_noise or gap.value <= 0)
    return f"The default, {default}, is the best of its size or within noise of it in {good} of {len(places)} columns."
