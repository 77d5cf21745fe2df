"""The speed tables of docs/results.md and README.md, from the CPU result files. Used by ``tables.py``."""

from collections.abc import Sequence
from pathlib import Path

from loki_attention.benchmarking.comparison import Compared, by_case, compared, named
from loki_attention.benchmarking.generate import BREAK_EVEN, DEFAULT, VARIANTS
from loki_attention.results import Environment, Result, SavedResults, Setting
from table_parts import saved

ATTENTION, GENERATE = "cpu-attention.json", "cpu-generate.json"
LESSER = ("cpu-attention-avx2.json", "cpu-attention-portable.json")
SHORT_LENGTHS, SHORT_HEADS = (8192, 32768, 131072), "32/8/128"
INTRODUCTION = """# Speed on the CPU

One decode step of one layer, bfloat16, from cold caches, all providers interleaved in one process; medians, with 20th and 80th
percentile in brackets. *Of probe*: the time of merely reading the same bytes (a streaming loop; for selected rows a loop
over those very rows), over this time. *Over sdpa*: torch's `scaled_dot_product_attention(..., enable_gqa=True)`. *Over dense*: the
fastest dense attention measured in that case, ours included. Selected tokens lie uniformly at random (the worst case
for memory) or as the bundled model selects them (`recorded`).

What bytes saved are worth: rows of 256 bytes here and there are read at a half to a third of the rate of streaming (compare
*gather* with *stream* in the full tables; prefetching more, or other lines first, changed nothing), so a step cannot be as many
times faster than dense attention as it reads less. And the scan of low-rank keys is bound by instructions where a byte holds
four dims: with `32@4+64@2` and four query heads, 96 dot products of 64 bytes for every 16 tokens.
"""


def speed_document(folder: Path) -> str | None:
    """All of docs/speed.md, None where neither file is there."""
    parts = [INTRODUCTION]
    attention, generate = saved(folder / ATTENTION), saved(folder / GENERATE)
    if attention is not None:
        parts += summaries(attention.results)
        parts += [case_table(case) for key, case in by_case(attention.results).items() if in_full(key)]
        parts.append(made_by(attention.environment))
        parts += instruction_sets([attention, *(one for name in LESSER if (one := saved(folder / name)) is not None)])
    if generate is not None:
        parts += ["## Whole generation\n", generate_table(generate.results), made_by(generate.environment)]
    return "\n".join(parts) if len(parts) > 1 else None


def short_tables(folder: Path) -> str | None:
    """What README.md shows, None where neither file is there."""
    parts = []
    attention, generate = saved(folder / ATTENTION), saved(folder / GENERATE)
    if attention is not None:
        parts += [short_table(attention.results), made_by(attention.environment)]
    if generate is not None:
        parts += [generate_table(generate.results), made_by(generate.environment)]
    return "\n".join(parts) or None


def in_full(key: tuple[Setting, ...]) -> bool:
    """Whether a case's whole table is shown: batch 1, random selection, the lengths of the short table."""
    _, batch, tokens, _, selection = key
    return batch == 1 and tokens in SHORT_LENGTHS and selection == "random"


def summaries(results: Sequence[Result]) -> list[str]:
    """A table for every shape, batch and selection: a row a length and layout of the low-rank keys."""
    groups: dict[tuple[Setting, ...], list[str]] = {}
    for (heads, batch, _, _, selection), case in by_case(results).items():
        groups.setdefault((heads, batch, selection), []).extend(summary_rows(case))
    tables = []
    for (heads, batch, selection), lines in groups.items():
        head = [
            f"## {heads}, batch {batch}, {selection} selection\n",
            "| tokens, planes | sdpa, ms | our dense, ms (of probe) | select (of probe) | attend 1/8 (of probe) | "
            "step 1/8, ms (of probe) | over sdpa · dense at 1/8 | 1/16 | 1/32 | tail's share of 1/8 |",
            "|" + "---|" * 10,
        ]
        tables.append("\n".join([*head, *lines]) + "\n")
    return tables


def summary_rows(case: Sequence[Result]) -> list[str]:
    """A line for each layout of a case."""
    rows = {named(one.result): one for one in compared(case)}
    layouts = dict.fromkeys(str(one.config["planes"]) for one in case if one.config["provider"] == "loki")
    lines = []
    for planes in layouts:
        steps = [rows[name] for name in rows if name.startswith(f"loki {planes} ") and not name.endswith("no tail")]
        first = steps[0].result
        bare = rows[f"{named(first)} no tail"].result
        cells = [
            f"{case[0].config['tokens']:,}, {planes}",
            f"{1e3 * rows['sdpa'].result.value:.2f}",
            timed(rows["dense (ours)"].result),
            timed(rows[f"select {planes}"].result),
            timed(rows[f"attend {first.config['fraction']}"].result),
            timed(first),
            *(f"{gain(one.over_sdpa)} · {gain(one.over_dense)}" for one in steps),
            *[""] * (3 - len(steps)),
            f"{1 - bare.value / first.value:.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def instruction_sets(files: Sequence[SavedResults]) -> list[str]:
    """The cases of the lesser instruction sets beside the same ones of the best, all at the first planes measured there."""
    tables = {str(file.results[0].config["isa"]): by_case(file.results) for file in files}
    if len(tables) == 1:
        return []
    lines = [
        "## Other instruction sets\n",
        "The same machine, made to use a lesser set by `LOKI_NATIVE_ISA`. *Over sdpa* is within each run: torch keeps its own.\n",
        "| case, planes | set | sdpa, ms | our dense, ms (of probe) | step 1/8, ms (of probe) | over sdpa · dense at 1/8 | 1/16 | 1/32 |",
        "|" + "---|" * 8,
    ]
    for key in list(tables.values())[-1]:
        heads, batch, tokens, _, selection = key
        for isa, cases in tables.items():
            if key not in cases:
                continue
            rows = {named(one.result): one for one in compared(cases[key])}
            steps = [one for name, one in rows.items() if name.startswith("loki") and not name.endswith("no tail")][:3]
            cells = [
                f"{heads}, batch {batch}, {tokens:,}, {selection}, {steps[0].result.config['planes']}",
                isa,
                f"{1e3 * rows['sdpa'].result.value:.2f}",
                timed(rows["dense (ours)"].result),
                timed(steps[0].result),
                *(f"{gain(one.over_sdpa)} · {gain(one.over_dense)}" for one in steps),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return ["\n".join(lines) + "\n", *(made_by(file.environment) for file in files[1:])]


def timed(result: Result) -> str:
    """Milliseconds, and what reading alone takes of them."""
    share = result.config["share_of_probe"]
    return f"{1e3 * result.value:.3f}" + ("" if share is None else f" ({share:.0%})")


def case_table(case: Sequence[Result]) -> str:
    """Every provider on one case."""
    config = case[0].config
    others = "" if config["others_cpu"] is None else f", others took {config['others_cpu']:.1%} of the CPU time"
    lines = [
        f"### {config['heads']}, batch {config['batch']}, {config['tokens']:,} tokens, {config['selection']} selection\n",
        f"{config['isa']}, {config['threads']} threads, load {config['load_before']:.2f} before and "
        f"{config['load_after']:.2f} after{others}.\n",
        "| provider | ms | MB read | of probe | over sdpa | over dense |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(row, compared(case))]) + "\n"


def row(one: Compared) -> str:
    """A line of a case's table."""
    result, config = one.result, one.result.config
    name = f"**{named(result)}**" if config["provider"] == "loki" else named(result)
    share = "" if config["share_of_probe"] is None else f"{config['share_of_probe']:.0%}"
    return (
        f"| {name} | {1e3 * result.value:.3f} [{1e3 * config['p20']:.3f}, {1e3 * config['p80']:.3f}] | "
        f"{(result.read_bytes or 0) / 1e6:.2f} | {share} | {gain(one.over_sdpa)} | {gain(one.over_dense)} |"
    )


def gain(times: float | None) -> str:
    """How many times faster."""
    return "" if times is None else f"{times:.2f}x"


def short_table(results: Sequence[Result]) -> str:
    """Loki with its first planes on one shape at batch 1, a row a length and selection."""
    lines = [
        "| heads/KV heads/D, tokens, selection | torch sdpa, ms | our dense | loki 1/8 | over sdpa · over dense | 1/16 | 1/32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for (heads, batch, tokens, _, selection), case in by_case(results).items():
        if heads == SHORT_HEADS and batch == 1 and tokens in SHORT_LENGTHS:
            rows = {named(one.result): one for one in compared(case)}
            loki = [one for one in rows.values() if one.result.config["provider"] == "loki"]
            ours = [one for one in loki if one.result.config["tail"] != "none"]
            first = [one for one in ours if one.result.config["planes"] == ours[0].result.config["planes"]]
            cells = [f"{1e3 * rows[name].result.value:.2f}" for name in ("sdpa", "dense (ours)")]
            cells.append(f"{1e3 * first[0].result.value:.2f}")
            cells += [f"{gain(one.over_sdpa)} · {gain(one.over_dense)}" for one in first]
            lines.append(f"| {heads}, {tokens:,}, {selection} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def generate_table(results: Sequence[Result]) -> str:
    """Tokens/s, a row a length."""
    config = results[0].config
    variants = [name for name in VARIANTS if any(one.config["variant"] == name for one in results)]
    lines = [
        f"Random model: {config['model']}, vocabulary {config['vocabulary']}; budget {loki_budget(results)}.\n",
        "| tokens/s over a cache of | " + " | ".join(variants) + " |",
        "|---|" + "---|" * len(variants),
    ]
    for tokens in dict.fromkeys(one.config["tokens"] for one in results):
        of = {one.config["variant"]: one for one in results if one.config["tokens"] == tokens}
        cells = [f"{of[name].value:.2f} ({of[name].value / of[DEFAULT].value:.2f}x)" for name in variants]
        lines.append(f"| {tokens:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def loki_budget(results: Sequence[Result]) -> str:
    """The budget of the sparse variants."""
    return next((str(one.config["budget"]) for one in results if one.config["variant"] not in (DEFAULT, BREAK_EVEN)
                 and one.config["budget"]), "none")  # fmt: skip


def made_by(environment: Environment) -> str:
    """Command, hardware, versions and commit in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return (
        f"`{environment.command}` · {environment.hardware} · {environment.threads} threads · {environment.dtype} · {versions} · "
        f"commit {environment.commit} · {environment.date[:10]}\n"
    )
