"""``loki generate``: text from a prompt with a sparse method, and what it read for that."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loki_attention.cli.output import AsJson, Device, Dtype, Model, examples, print_json
from loki_attention.errors import ArgumentError

if TYPE_CHECKING:
    from loki_attention.core.basis import KeyBasis
    from loki_attention.core.budget import Budget

GENERATE_EXAMPLES = examples(
    "loki generate path/to/model --basis my-basis --prompt-file prompt.txt",
    "cat f.txt | loki generate path/to/model --basis b --prompt-file - --tokens 25%",
    "loki generate path/to/model --method streaming --tokens 512 --prompt-file f.txt",
    "loki generate path/to/model --basis b --prompt-file f.txt --monitor-every 16",
)

Basis = Annotated[Path | None, typer.Option("--basis", help="The basis folder; loki and the paper's methods need one.")]
PromptFile = Annotated[str, typer.Option("--prompt-file", help="A text file; - reads standard input.")]
Method = Annotated[str, typer.Option(help="loki, dense, or any method of docs/methods.md.")]
Tokens = Annotated[
    str | None, typer.Option(help="Tokens a step attends: 25% or 512.", show_default="what the basis was chosen for")
]
PlanesOption = Annotated[
    str | None, typer.Option(help="Layout of the low-rank keys, such as 16@4+32@2.", show_default="the basis's")
]
Tail = Annotated[
    str | None, typer.Option(help="none, mean or linear.", show_default="the basis's choice for loki, else none")
]
NewTokens = Annotated[int, typer.Option(help="Tokens to generate, at most.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy; above, tokens are sampled.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
MonitorEvery = Annotated[
    int | None,
    typer.Option(
        help="Check every so many decode steps, on one layer in turn, against dense attention; the report says what it "
        "found.",
        show_default="no checks",
    ),
]
OtherWeights = Annotated[
    bool, typer.Option("--other-weights", help="Use a basis of other weights of the same architecture, a fine-tune's.")
]


def generate_command(
    model: Model,
    prompt_file: PromptFile,
    basis: Basis = None,
    method: Method = "loki",
    tokens: Tokens = None,
    planes: PlanesOption = None,
    tail: Tail = None,
    max_new_tokens: NewTokens = 100,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    monitor_every: MonitorEvery = None,
    other_weights: OtherWeights = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Generate text from a prompt: the text on standard output as it comes, then the report on standard error."""
    prompt = _read_prompt(prompt_file)
    from loki_attention import KeyBasis, Planes, attach
    from loki_attention.core.spec import ModelSpec
    from loki_attention.integrations.huggingface.generation import generate_text
    from loki_attention.integrations.huggingface.loading import load_model, load_tokenizer

    _check_method(method, basis, tokens)
    loaded = None if basis is None else KeyBasis.load(basis)
    budget = _budget(tokens, loaded)
    chosen_planes = None if planes is None else Planes.parse(planes)
    served = load_model(model, dtype=dtype, device=device)
    tokenizer = load_tokenizer(model)
    if loaded is not None:
        loaded.spec.check_serves(ModelSpec.of(served), other_weights=other_weights)
    with attach(
        served, loaded, method=method, budget=budget, planes=chosen_planes, tail=tail, monitor_every=monitor_every
    ) as attached:
        made = generate_text(
            served,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            on_text=_discard if as_json else _stream,
        )
        report = attached.report()
    if as_json:
        counts = {"prompt_tokens": made.prompt_tokens, "new_tokens": made.new_tokens}
        print_json({"text": made.text, **counts, "report": report.to_dict()})
        return
    print(flush=True)
    print(f"\n{made.prompt_tokens} tokens of prompt, {made.new_tokens} new\n{report}", file=sys.stderr)
    if monitor_every is not None and report.monitor is None:
        print(f"monitor: no checks, for there were fewer than {monitor_every} sparse decode steps", file=sys.stderr)


def _read_prompt(name: str) -> str:
    if name == "-":
        return sys.stdin.read()
    try:
        return Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArgumentError(f"there is no prompt file at {name}; give a text file, or - for standard input") from None
    except UnicodeDecodeError:
        raise ArgumentError(f"{name} is not text in UTF-8; give a text file as --prompt-file") from None


def _check_method(method: str, basis: Path | None, tokens: str | None) -> None:
    from loki_attention.methods import method_class

    kind = method_class(method)
    if kind is not None and kind.needs_basis and basis is None:
        raise ArgumentError(f"method {method!r} needs a basis, got none; give --basis DIR (loki calibrate writes one)")
    if kind is not None and basis is None and tokens is None:
        raise ArgumentError(f"method {method!r} without a basis needs a budget, got none; give --tokens 512 or 25%")


def _budget(tokens: str | None, basis: "KeyBasis | None") -> "Budget | None":
    """The budget asked for, with the basis's minimum, sinks and recent tokens where there is a basis."""
    from loki_attention import Budget

    if tokens is None:
        return None
    if basis is None:
        return Budget.parse(tokens)
    least = basis.budget
    return Budget.parse(tokens, minimum=least.minimum, sinks=least.sinks, recent=least.recent)


def _stream(text: str) -> None:
    print(text, end="", flush=True)


def _discard(text: Any) -> None:
    """Text that is printed as a whole later."""
