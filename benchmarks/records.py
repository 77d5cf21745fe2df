"""What the scripts of record share: the bundled model, its calibration, and losses as result rows."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loki_attention import Budget, KeyBasis, calibrate
from loki_attention.data import reference_model_path
from loki_attention.evaluation.continuation import Loss
from loki_attention.evaluation.retrieval import DENSE
from loki_attention.evaluation.text import detokenize_wikitext
from loki_attention.evaluation.variant import Variant
from loki_attention.integrations.huggingface.loading import load_model, load_tokenizer
from loki_attention.results import Result, bootstrap_interval, wilson_interval

RULE = "continuation"
BUDGET = Budget(fraction=1 / 8, minimum=48, sinks=4, recent=16)


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The options that both scripts of record take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="held-out prose: WikiText-2 test, raw form")
    parser.add_argument("--calibration-text", type=Path, required=True, help="WikiText-2 train, raw form")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser


def model_and_tokenizer() -> tuple[Any, Any]:
    """The bundled model in float32 and its tokenizer."""
    folder = str(reference_model_path())
    return load_model(folder, dtype="float32"), load_tokenizer(folder)


def calibrated(model: Any, tokenizer: Any, text: Path, *, length: int) -> KeyBasis:
    """The basis of record: detokenised WikiText-2 train, default token counts, windows of ``length``."""
    prose = detokenize_wikitext(text.read_text(encoding="utf-8"))
    return calibrate(model, tokenizer, [prose], length=length, budget=BUDGET, progress=True)


def loss_results(variants: Sequence[Variant], losses: Mapping[str, Sequence[Loss]]) -> list[Result]:
    """Three rows a variant: KL from dense, next-token agreement, perplexity over dense's; intervals over windows."""
    results = []
    table = Table("variant", "bytes read", "KL x 1000", "same next token", "perplexity", "over dense")
    for variant in variants:
        windows = losses[variant.name]
        total = sum(windows, Loss())
        read = total.read / total.dense_read
        config = variant.config | {"rule": RULE, "read_fraction": read, "dense_perplexity": total.dense_perplexity}
        figures = {
            "kl_from_dense": ([loss.kl for loss in windows], total.kl, "nats"),
            "next_token_agreement": ([loss.agreement for loss in windows], total.agreement, "fraction"),
            "perplexity_over_dense": (
                [loss.perplexity_change for loss in windows],
                total.perplexity_change,
                "fraction",
            ),
        }
        for metric, (each, value, unit) in figures.items():
            results.append(
                Result(
                    metric=metric,
                    value=value,
                    unit=unit,
                    n=len(windows),
                    seed=0,
                    interval=bootstrap_interval(each, seed=0),
                    read_bytes=total.read / total.tokens,
                    config=config,
                )
            )
        table.add_row(
            variant.name,
            f"{read:.1%}",
            f"{1000 * total.kl:.3f}",
            f"{total.agreement:.2%}",
            f"{total.perplexity:.3f}",
            f"{total.perplexity_change:+.2%}",
        )
    Console().print(table)
    return results


def retrieval_results(variants: Sequence[Variant], items: Sequence[Mapping[str, bool]], length: int) -> list[Result]:
    """One row a variant and one for dense: accuracy with its 95 % Wilson interval, and pairs that differ from dense."""
    results = []
    table = Table("variant", f"accuracy at {length}", "95 % interval", "lost", "won")
    configs = {DENSE: {"variant": DENSE, "method": DENSE}} | {v.name: v.config for v in variants}
    for name, config in configs.items():
        right = sum(item[name] for item in items)
        lost = sum(item[DENSE] and not item[name] for item in items)
        won = sum(item[name] and not item[DENSE] for item in items)
        low, high = wilson_interval(right, len(items))
        results.append(
            Result(
                metric="retrieval_accuracy",
                value=right / len(items),
                unit="fraction",
                n=len(items),
                seed=0,
                interval=(low, high),
                read_bytes=None,
                config={**config, "rule": RULE, "length": length, "lost_to_dense": lost, "won_over_dense": won},
            )
        )
        table.add_row(name, f"{right / len(items):.1%}", f"{low:.1%} to {high:.1%}", str(lost), str(won))
    Console().print(table)
    return results
