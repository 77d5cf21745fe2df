"""``loki calibrate``: a model and text in, a basis folder out."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loki_attention.cli.lists import length as tokens
from loki_attention.cli.output import AsJson, Device, Dtype, Model, describe, examples, print_json
from loki_attention.errors import ArgumentError, CorpusError, LokiWarning

if TYPE_CHECKING:
    from loki_attention.calibration.ranks import Ranks

CALIBRATE_EXAMPLES = examples(
    "loki calibrate path/to/model --text book.txt -o my-basis",
    "loki calibrate Qwen/Qwen3-0.6B --text texts/ more.jsonl -o my-basis",
    "loki calibrate path/to/model --text *.txt --length 4K --budget 512 -o b",
    "torchrun --nproc-per-node 8 --no-python loki calibrate MODEL --text t -o b",
)

Text = Annotated[list[Path], typer.Option("--text", help="Files (.txt, .md, .jsonl) and folders; repeat, or list.")]
MoreText = Annotated[list[Path] | None, typer.Argument(metavar="PATH", help="More of --text: --text *.txt works.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The basis folder to write.")]
Field = Annotated[str, typer.Option(help="The field of a .jsonl line that holds its text.")]
Length = Annotated[
    str | None, typer.Option(help="Tokens a window, such as 4K.", show_default="the model's maximum, at most 8K")
]
PlanesOption = Annotated[
    str | None, typer.Option(help="Layout of the low-rank keys, such as 16@4+32@2.", show_default="by the head dim")
]
BudgetOption = Annotated[str, typer.Option(help="Tokens a step attends: a percentage or a count, 12.5% or 512.")]
Minimum = Annotated[int, typer.Option(help="At least so many tokens, for a budget in percent.")]
Sinks = Annotated[int, typer.Option(help="First tokens that are always attended.")]
Recent = Annotated[int, typer.Option(help="Last tokens that are always attended.")]
Candidate = Annotated[str | None, typer.Option(help="Force pca-pre, pca-post or balanced instead of comparing.")]
Tail = Annotated[str | None, typer.Option(help="Force none, mean or linear instead of comparing.")]
FitTokens = Annotated[str, typer.Option(help="Tokens to collect moments from.")]
HeldOutTokens = Annotated[str, typer.Option(help="Tokens to compare on.")]
Seed = Annotated[int, typer.Option(help="Spreads the windows over the text.")]
DenseBelow = Annotated[
    float, typer.Option(help="Leave a layer dense that keeps less than this share of exact top-k's attention mass.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a basis that is already there.")]


def calibrate_command(
    model: Model,
    text: Text,
    output: Output,
    more_text: MoreText = None,
    field: Field = "text",
    length: Length = None,
    planes: PlanesOption = None,
    budget: BudgetOption = "12.5%",
    minimum: Minimum = 64,
    sinks: Sinks = 4,
    recent: Recent = 32,
    candidate: Candidate = None,
    tail: Tail = None,
    fit_tokens: FitTokens = "128K",
    held_out_tokens: HeldOutTokens = "16K",
    seed: Seed = 0,
    dense_if_mass_below: DenseBelow = 0.5,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Calibrate MODEL on text and write a basis; prints the loss to expect.

    A run that was stopped goes on where it was when the same command is given again. Under torchrun all processes share
    the text out, and the first one writes and prints.
    """
    texts = [*text, *(more_text or [])]
    _check_paths(texts, output, overwrite)
    window = None if length is None else tokens(length)
    fit, held_out = tokens(fit_tokens), tokens(held_out_tokens)
    from loki_attention import Budget, Planes, calibrate
    from loki_attention.calibration.ranks import launched_ranks
    from loki_attention.integrations.huggingface.loading import load_model, load_tokenizer

    chosen_budget = Budget.parse(budget, minimum=minimum, sinks=sinks, recent=recent)
    chosen_planes = None if planes is None else Planes.parse(planes)
    partial = output.resolve().with_name(f"{output.resolve().name}.partial")
    with launched_ranks() as ranks, _first_alone_speaks(ranks, partial):
        basis = calibrate(
            load_model(model, dtype=dtype, device=_own_device(device, ranks)),
            load_tokenizer(model),
            texts,
            length=window,
            planes=chosen_planes,
            budget=chosen_budget,
            candidate=candidate,
            tail=tail,
            fit_tokens=fit,
            held_out_tokens=held_out,
            field=field,
            seed=seed,
            dense_if_mass_below=dense_if_mass_below,
            checkpoint=partial,
            progress=True,
        )
    if not ranks.first:
        return
    basis.save(output)
    if as_json:
        print_json(describe(basis, output))
        return
    print(f"Wrote the basis to {output}. Next:")
    print(f"loki inspect {output}")
    print(f"loki generate {model} --basis {output} --prompt-file prompt.txt --max-new-tokens 100")


def _check_paths(texts: list[Path], output: Path, overwrite: bool) -> None:
    """Raise for what would fail only after the model was loaded, or after all the work."""
    for path in texts:
        if not path.exists():
            raise CorpusError(f"there is no text at {path}; give files or folders that exist")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "manifest.json").is_file():
        raise ArgumentError(f"{output} exists and is not a basis; name another folder with -o")
    if not overwrite:
        raise ArgumentError(f"{output} holds a basis already; pass --overwrite to replace it, or name another folder")


def _own_device(device: str, ranks: "Ranks") -> str:
    """The device of this process: of several on one machine, each has its own GPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and ranks.size > 1 else device


@contextmanager
def _first_alone_speaks(ranks: "Ranks", partial: Path) -> Iterator[None]:
    """Warn in the first process only; say there, where the user stops the run, that it can go on."""
    with warnings.catch_warnings():
        if not ranks.first:
            warnings.simplefilter("ignore", LokiWarning)
        try:
            yield
        except KeyboardInterrupt:
            if ranks.first:
                print(f"stopped; the same command goes on from {partial}", file=sys.stderr)
            raise typer.Exit(130) from None
