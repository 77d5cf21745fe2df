"""The tables at equal bytes of docs/results.md: every method at one share of dense attention's bytes. Used by ``tables.py``."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import median

from evidence_study import (
    KL,
    PERPLEXITY,
    Rows,
    Study,
    is_no_bound,
    is_noise,
    is_retrieval,
    of_record,
    runs_as_counted,
    study_of,
)
from loki_attention.analysis.comparing import BOUND, best_of, tables
from loki_attention.analysis.quality_figures import write_quality_figures
from loki_attention.results import Result
from table_parts import interval, joined, kl, made_by, markdown, paragraph, saved

FILE, TAILS = "evidence-equal-bytes.json", "evidence-tails.json"
OURS, CONTROL, MEAN, NO_TAIL = "loki", "random", ":tail=mean", ":tail=none"
NOT_SO_LITTLE = "cannot"
GOOD = ("best", "noise")
EQUAL_BYTES = """## At equal bytes

Every method reads the same share of dense attention's bytes in a decode step of the sparse layers, all that it reads
counted: low-rank keys, labels, bounds of pages, sums, keys and values. Planes and K are solved for each method and
length (`--budgets bytes=1/8`, [evaluation](evaluation.md#methods-and-budgets)); no floor but sinks and recent tokens.
`loki` has the tail that calibration chose.

A cell is **bold** where it is the best, and has ≈ where it cannot be told from the best: by the paired bootstrap over
windows (KL, perplexity), by the exact sign test over questions (retrieval; in brackets questions lost to / won over
dense attention). The best is named among the methods that run as they count. *Simulated* ones, which do not, and the
*bound*, which reads every key, follow with their standing to that best, ▲ where they are above it. *cannot*: the
method cannot read so little there; `pca-attn`, which reads every value, cannot anywhere. A perplexity under dense
attention's is no merit of a method: KL decides.
"""
WITH_TAILS = """## Is it the tail or the selection?

The same with a `mean` tail for every selection. The baselines' tail has its exact mass, which reads every key and
counts nothing: simulated, and more than they could have. So the best is named among all but the bound.
"""
ALONE_AND_NOT = """### Selections alone and with a mean tail

KL from dense, x 1000, at equal bytes: alone → with a mean tail, and how many times less that is. `sparq` alone has
its own mean value, as its paper has it.
"""


def equal_bytes_parts(folder: Path, pictures: Path) -> list[str]:
    """The sections of both studies, each left out where its file is not there; draws into ``pictures``."""
    plain, tailed = saved(folder / FILE), saved(folder / TAILS)
    parts: list[str] = []
    if plain is not None:
        study = study_of(plain.results, runs_as_counted)
        parts += [EQUAL_BYTES, measured(study), *sentences(study), control(study), *point_tables(study)]
        parts += [drawn(plain.results, pictures / "equal-bytes"), made_by(plain.environment)]
    if tailed is not None:
        with_mean = study_of(tailed.results, is_no_bound, suffix=MEAN)
        parts += [WITH_TAILS, *sentences(with_mean), *point_tables(with_mean, ", with a mean tail")]
        if plain is not None:
            parts.append(alone_and_not(study, with_mean))
        parts.append(made_by(tailed.environment))
    return parts


def short_parts(folder: Path) -> list[str]:
    """What README.md shows of the study: KL and the hardest answers of those that run as they count; empty without its file."""
    file = saved(folder / FILE)
    if file is None:
        return []
    study = study_of(file.results, runs_as_counted)
    hardest = min(filter(is_retrieval, study.columns), key=lambda column: study.dense[column].value)
    names = dict.fromkeys(name for rows in study.points.values() for name in rows if name in study.rivals)
    lines = [["dense", *[short_cell(study.dense, hardest)] * len(study.points)]]
    for name in names:
        cells = [short_cell(rows[name], hardest) if name in rows else NOT_SO_LITTLE for rows in study.points.values()]
        lines.append([f"**{name}**" if name == OURS else name, *cells])
    return [markdown([f"KL from dense x 1000 · {hardest} found", *study.points], lines), made_by(file.environment)]


def short_cell(found: Mapping[str, Result], family: str) -> str:
    """KL and the share of answers."""
    loss = f"{1000 * found[KL].value:.2f}" if KL in found else NOT_SO_LITTLE
    return f"{loss} · {found[family].value:.1%}" if family in found else f"{loss} · {NOT_SO_LITTLE}"


def measured(study: Study) -> str:
    """What the study was measured on."""
    windows = {
        f"{one.n} windows of 2048 tokens of WikiText-2 test" for column, one in study.dense.items() if column == KL
    }
    questions = {
        f"{one.n} questions a family and length" for column, one in study.dense.items() if is_retrieval(column)
    }
    return paragraph(f"Measured on {joined([*windows, *sorted(questions)])}; intervals of 95 %.")


def point_tables(study: Study, note: str = "") -> list[str]:
    """A table a point: the methods that compete, the others, the bound."""
    names = dict.fromkeys(name for rows in study.points.values() for name in rows)
    ordered = sorted(names, key=lambda name: (is_bound(study, name), name not in study.rivals))
    head = ["method", "planes", "bytes", *map(heading, study.columns), "standing"]
    parts = []
    for point in study.points:
        lines = [line(study, point, name) for name in ordered]
        parts += [f"### {point} of dense attention's bytes{note}\n", markdown(head, [dense_line(study), *lines])]
    return parts


def is_bound(study: Study, name: str) -> bool:
    """Whether a variant is the bound, whatever the points that it has results at."""
    return not is_no_bound(next(rows[name] for rows in study.points.values() if name in rows))


def heading(column: str) -> str:
    """What a column is called."""
    return {KL: "KL from dense, x 1000", PERPLEXITY: "perplexity over dense"}.get(column, column)


def dense_line(study: Study) -> list[str]:
    """Dense attention's own accuracy and perplexity."""
    return ["dense", "", "100%", *(dense_cell(column, study.dense[column]) for column in study.columns), ""]


def dense_cell(column: str, result: Result) -> str:
    """Dense attention's accuracy or perplexity, nothing in a column that measures the distance from it."""
    if is_retrieval(column):
        return f"{result.value:.1%}"
    return f"{result.config['dense_perplexity']:.2f}" if column == PERPLEXITY else ""


def line(study: Study, point: str, name: str) -> list[str]:
    """A variant's cells at a point; one that is left out there keeps its place."""
    note = " (bound)" if is_bound(study, name) else "" if name in study.rivals else " (simulated)"
    shown = f"**{name}**" if name == OURS else f"{name}{note}"
    found = study.points[point].get(name)
    if found is None:
        return [shown, "", "", *[NOT_SO_LITTLE] * len(study.columns), ""]
    stands = study.stands[point][name]
    cells = [cell(found.get(column), stand) for column, stand in zip(study.columns, stands, strict=True)]
    settings = [found[column].config for column in study.columns if column in found]
    planes = dict.fromkeys(str(one["planes"]) for one in settings if one["planes"])
    read = sorted({f"{one['read_fraction']:.1%}" for one in settings})
    return [shown, ", ".join(planes), " to ".join(dict.fromkeys((read[0], read[-1]))), *cells, verdict(stands)]


def cell(result: Result | None, stand: str | None) -> str:
    """A value, marked by its standing."""
    if result is None:
        return NOT_SO_LITTLE
    if result.metric == KL:
        text = kl(result)
    elif result.metric == PERPLEXITY:
        text = f"{result.value:+.2%} {interval(result, 100, '+.2f')}"
    else:
        text = f"{result.value:.1%} ({result.config['lost_to_dense']} / {result.config['won_over_dense']})"
    return {"best": f"**{text}**", "noise": f"{text} ≈", "better": f"{text} ▲"}.get(str(stand), text)


def verdict(stands: Sequence[str | None]) -> str:
    """How often each standing; one word where all columns agree."""
    counts = {stand: stands.count(stand) for stand in ("best", "better", "noise", "worse", None) if stand in stands}
    words = {"noise": "within noise", None: NOT_SO_LITTLE}
    if len(counts) == 1:
        (only,) = counts
        return words.get(only, str(only))
    return ", ".join(f"{count} {words.get(stand, stand)}" for stand, count in counts.items())


def sentences(study: Study) -> list[str]:
    """Where loki is best or within noise of it, by metric, and where it is not; what is not shown."""
    groups: dict[str, list[bool]] = {}
    missed = []
    for point, rows in study.points.items():
        rivals = {name: found for name, found in rows.items() if name in study.rivals}
        stands = study.stands[point].get(OURS, [None] * len(study.columns))
        for column, stand in zip(study.columns, stands, strict=True):
            groups.setdefault("retrieval" if is_retrieval(column) else column, []).append(stand in GOOD)
            if stand not in GOOD:
                missed.append(f"{heading(column)} at {point} (best: {best_of(rivals, column)})")
    names = {KL: "KL", PERPLEXITY: "perplexity"}
    counts = [f"{names.get(group, group)} {sum(good)} of {len(good)}" for group, good in groups.items()]
    every = [good for found in groups.values() for good in found]
    text = f"loki is best or within noise of the best in {sum(every)} of {len(every)} comparisons: {joined(counts)}."
    parts = [paragraph(f"{text} Not in {joined(missed)}." if missed else text)]
    for column, share in study.left_out.items():
        parts.append(paragraph(f"Not shown: {column}, where dense attention is right in {share:.0%} alone."))
    return parts


def control(study: Study) -> str:
    """How visible random selection is at the least bytes."""
    point, rows = list(study.points.items())[-1]
    if CONTROL not in rows or not {KL, PERPLEXITY} <= rows[CONTROL].keys():
        return ""
    broken = rows[CONTROL]
    families = [column for column in study.columns if is_retrieval(column) and column in broken]
    told = [column for column in families if not is_noise(broken[column], study.dense[column])]
    text = (
        f"Random selection, which an evaluation must see as broken, at {point}: KL x 1000 {1000 * broken[KL].value:.0f}"
    )
    if OURS in rows and KL in rows[OURS]:
        text += f" (loki {1000 * rows[OURS][KL].value:.2f})"
    text += f", perplexity {broken[PERPLEXITY].value:+.0%}"
    if families:
        dense, found = ([of[column].value for column in families] for of in (study.dense, broken))
        text += (
            f", answers {span(found)} where dense has {span(dense)}, told from dense in {len(told)} of {len(families)}"
        )
    return paragraph(f"{text}.")


def span(shares: Collection[float | int]) -> str:
    """The lowest and the highest."""
    return f"{min(shares):.1%} to {max(shares):.1%}"


def alone_and_not(plain: Study, tailed: Study) -> str:
    """KL of every selection without a tail and with a mean one."""
    shared = [point for point in tailed.points if point in plain.points]
    pairs = {point: alone_and_tailed(plain.points[point], tailed.points[point]) for point in shared}
    lines = []
    for name in dict.fromkeys(name for found in pairs.values() for name in found):
        cells = [both_values(found.get(name)) for found in pairs.values()]
        lines.append([f"**{name}**" if name == OURS else name, *cells])
    findings = [finding(point, found) for point, found in pairs.items() if found.keys() - {BOUND}]
    return "\n".join([ALONE_AND_NOT, paragraph(" ".join(findings)), markdown(["method", *pairs], lines)])


def alone_and_tailed(plain: Rows, tailed: Rows) -> dict[str, tuple[float | int, float | int]]:
    """KL of each selection without and with a mean tail; loki as it comes has a tail, so its row is that of ``tail=none``."""
    alone = {
        name.removesuffix(NO_TAIL): found[KL].value for name, found in plain.items() if name != OURS and KL in found
    }
    return {name: (alone[name], found[KL].value) for name, found in tailed.items() if name in alone and KL in found}


def both_values(pair: tuple[float | int, float | int] | None) -> str:
    """KL without and with the tail, empty for a method that cannot read so little."""
    return "" if pair is None else f"{1000 * pair[0]:.2f} → {1000 * pair[1]:.2f} ({pair[0] / pair[1]:.1f}x)"


def finding(point: str, pairs: Mapping[str, tuple[float | int, float | int]]) -> str:
    """What the tail and what the selection are worth at a point, the bound apart."""
    rivals = {name: pair for name, pair in pairs.items() if name != BOUND}
    gains = sorted(alone / tailed for alone, tailed in rivals.values())
    before, after = (min(rivals, key=lambda name: rivals[name][which]) for which in (0, 1))
    return (
        f"At {point} the best selection alone is {before} ({1000 * rivals[before][0]:.2f}), with a tail {after} "
        f"({1000 * rivals[after][1]:.2f}); the tail divides KL by {gains[0]:.1f} to {gains[-1]:.1f}, median "
        f"{median(gains):.1f}."
    )


def drawn(results: Sequence[Result], folder: Path) -> str:
    """Links to the pictures of ``loki compare --plot``, drawn into ``folder`` under docs/pictures."""
    paths = write_quality_figures(tables(one for one in results if of_record(one)), folder)
    links = [f"![Quality against bytes read]({folder.parent.name}/{folder.name}/{path.name})" for path in paths]
    return "\n".join(["### Quality against bytes read\n", *links]) + "\n"
