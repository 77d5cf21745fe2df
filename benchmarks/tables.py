"""Write docs/results.md, docs/speed.md and the short tables in README.md from the result files. No figure is typed by hand.

python benchmarks/tables.py
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ablation_tables import ablation_parts, calibration_parts
from evidence_tables import equal_bytes_parts, short_parts
from loki_attention.results import Result, load_results
from speed_tables import short_tables, speed_document
from table_parts import between, interval, kl, made_by, paragraph, write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- made by benchmarks/tables.py -->\n", "<!-- end -->\n"
SPEED_BEGIN, SPEED_END = "<!-- speed, made by benchmarks/tables.py -->\n", "<!-- end of speed -->\n"
SHORT = ("exact-topk, query-head", "exact-topk, kv-head", "loki", "loki, tail none", "paper-loki", "streaming")
PICTURES = ROOT / "docs" / "pictures"
INTRODUCTION = """# Results of the bundled model

Made by the commands below and written here by `benchmarks/tables.py` from `benchmarks/results/*.json`. The bundled
model is small (3.5M parameters, 4 layers, G = 2): these tables show that the method is implemented as described, what
each part of it is worth, and how it stands to other methods on the same text. They do not show what a large model
loses, nor how fast anything is ([speed](speed.md)): bytes are counted. Attention is sparse in the continuation only
(rule `continuation`: a dense prompt, then rows that select as decode would), and layer 0 stays dense but for the
paper's methods. What did not work stands in the [log](log.md).
"""
BY_SHARE = """## By share of the tokens: loss against dense attention

`Budget(fraction, minimum=48, sinks=4, recent=16)`: here methods read as many tokens, not as many bytes. Bytes count
K/V in 16 bits.
"""


def main() -> None:
    """Read the result files and write both documents."""
    write(ROOT / "docs" / "results.md", results_document(RESULTS, PICTURES))
    perplexity = load_results(RESULTS / "wikitext2.json")
    short = "\n".join(
        [short_table(by_variant(perplexity.results)), made_by(perplexity.environment), *short_parts(RESULTS)]
    )
    readme = between((ROOT / "README.md").read_text(encoding="utf-8"), BEGIN, END, short)
    speed, short_speed = speed_document(RESULTS), short_tables(RESULTS)
    if speed is not None and short_speed is not None:
        write(ROOT / "docs" / "speed.md", speed)
        readme = between(readme, SPEED_BEGIN, SPEED_END, short_speed)
    write(ROOT / "README.md", readme)


def results_document(folder: Path, pictures: Path) -> str:
    """All of docs/results.md; studies that are not in ``folder`` are left out, pictures drawn into ``pictures``."""
    perplexity = load_results(folder / "wikitext2.json")
    losses = by_variant(perplexity.results)
    dense = losses[next(iter(losses))]["perplexity_over_dense"].config["dense_perplexity"]
    parts = [
        INTRODUCTION,
        *equal_bytes_parts(folder, pictures),
        BY_SHARE,
        paragraph(
            f"WikiText-2 test: {perplexity.results[0].n} windows of 2048 tokens, the second half scored; dense "
            f"perplexity {dense:.2f}. Intervals: 95 %, bootstrap over windows."
        ),
        *(loss_table(losses, fraction) for fraction in ("1/8", "1/16", "1/32")),
        made_by(perplexity.environment),
        *ablation_parts(folder),
        *calibration_parts(folder),
    ]
    return "\n".join(parts)


def by_variant(results: Iterable[Result]) -> dict[str, dict[str, Result]]:
    """Variant name to metric to result."""
    found: dict[str, dict[str, Result]] = {}
    for result in results:
        if result.config["method"] != "dense":
            found.setdefault(str(result.config["variant"]), {})[result.metric] = result
    return found


def loss_table(losses: Mapping[str, Mapping[str, Result]], fraction: str) -> str:
    """Every variant at one budget."""
    lines = [
        f"### K = {fraction} of the tokens\n",
        "| method | bytes read | KL from dense, x 1000 | same next token | perplexity over dense |",
        "|---|---|---|---|---|",
    ]
    for name, metrics in losses.items():
        variant, at = name.split(" @ ")
        if at == fraction:
            lines.append(loss_row(variant, metrics))
    return "\n".join(lines) + "\n"


def loss_row(variant: str, metrics: Mapping[str, Result]) -> str:
    """One line of a loss table."""
    loss, same, over = (metrics[m] for m in ("kl_from_dense", "next_token_agreement", "perplexity_over_dense"))
    name = f"**{variant}**" if variant == "loki" else variant
    return (
        f"| {name} | {loss.config['read_fraction']:.1%} | {kl(loss)} | "
        f"{same.value:.1%} | {over.value:+.2%} {interval(over, 100, '+.2f')} |"
    )


def short_table(losses: Mapping[str, Mapping[str, Result]]) -> str:
    """KL and perplexity of the main methods over the three budgets."""
    fractions = ("1/8", "1/16", "1/32")
    lines = ["| KL from dense x 1000 · perplexity over dense | " + " | ".join(fractions) + " |", "|---|---|---|---|"]
    for variant in SHORT:
        cells = []
        for fraction in fractions:
            metrics = losses[f"{variant} @ {fraction}"]
            cells.append(f"{1000 * metrics['kl_from_dense'].value:.2f} · {metrics['perplexity_over_dense'].value:+.2%}")
        name = f"**{variant}**" if variant == "loki" else variant
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
