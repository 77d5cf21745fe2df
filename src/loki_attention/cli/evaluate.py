"""``loki evaluate``: what methods keep of a model's quality, and what they read for it."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loki_attention.cli.lists import length, listed
from loki_attention.cli.output import AsJson, Device, Dtype, Model, examples, messages, print_json, results

if TYPE_CHECKING:
    from loki_attention.core.basis import KeyBasis
    from loki_attention.evaluation.suite import Plan
    from loki_attention.results import Environment, Result

EVALUATE_EXAMPLES = examples(
    "loki evaluate MODEL --basis b --tasks fidelity --text my-prompts.txt",
    "loki evaluate MODEL --basis b --methods loki,exact-topk,streaming -o r.json",
    "loki evaluate MODEL --basis b --methods loki:planes=16@4+32@2,tail=none",
    "loki evaluate MODEL --basis b --budgets bytes=1/8 --tasks retrieval:multi-key",
    "loki evaluate MODEL --basis b --tasks lm-eval:hellaswag --task-data tasks/",
)

Basis = Annotated[Path | None, typer.Option("--basis", help="The basis folder; loki and the paper's methods need one.")]
Methods = Annotated[
    str | None,
    typer.Option(
        help="NAME or NAME:SETTING=VALUE,..., joined by commas. Settings: planes, tail, per, candidate, dense (layers: 0+1 "
        "or none), minimum, sinks, recent.",
        show_default="exact-topk, streaming, and loki with a basis",
    ),
]
Budgets = Annotated[str, typer.Option(help="Of the tokens 1/8 or 12.5%, tokens 512, or of dense's bytes bytes=1/8.")]
Tasks = Annotated[str, typer.Option(help="perplexity, retrieval[:FAMILY], fidelity, lm-eval:TASK.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="The results file; the same command goes on where it stopped.")
]
Text = Annotated[
    list[Path] | None, typer.Option(help="Files (.txt, .md, .jsonl) and folders.", show_default="a bundled novel")
]
Wikitext = Annotated[bool, typer.Option("--wikitext", help="The text is WikiText as released: undo its spaces.")]
Field = Annotated[str, typer.Option(help="The field of a .jsonl line that holds its text.")]
Prompts = Annotated[
    Path | None, typer.Option(help="A .jsonl of prompts (field prompt) for fidelity, instead of --text.")
]
Window = Annotated[str | None, typer.Option(help="Tokens a window.", show_default="2K, at most the model's")]
PromptTokens = Annotated[int | None, typer.Option("--prompt", help="Dense tokens of a window.", show_default="half")]
Stride = Annotated[int | None, typer.Option(help="Tokens from window to window.", show_default="a window")]
Windows = Annotated[int, typer.Option(help="Windows of text or prompts, at most.")]
Lengths = Annotated[str | None, typer.Option(help="Of retrieval, such as 2K,4K.", show_default="2K,4K")]
Families = Annotated[str | None, typer.Option(help="Of retrieval.", show_default="all six")]
Depths = Annotated[int, typer.Option(help="Parts of the text that questions ask about in turn.")]
Questions = Annotated[int, typer.Option(help="Questions a family and length.")]
Words = Annotated[Path | None, typer.Option(help="A file of words for retrieval.", show_default="bundled")]
TaskData = Annotated[Path | None, typer.Option(help="The folder with files of lm-eval tasks.")]
Limit = Annotated[int | None, typer.Option(help="Items of an lm-eval task, at most.", show_default="all")]
Minimum = Annotated[int, typer.Option(help="At least so many tokens, for budgets that are fractions of them.")]
Sinks = Annotated[int, typer.Option(help="First tokens that are always attended.")]
Recent = Annotated[int, typer.Option(help="Last tokens that are always attended.")]
Seed = Annotated[int, typer.Option(help="What questions are drawn by.")]
Plot = Annotated[Path | None, typer.Option(help="Write pictures (PNG) to this folder; needs matplotlib.")]
OtherWeights = Annotated[
    bool, typer.Option("--other-weights", help="Use a basis of other weights of the same architecture, a fine-tune's.")
]


def evaluate_command(
    model: Model,
    basis: Basis = None,
    methods: Methods = None,
    budgets: Budgets = "1/8,1/16",
    tasks: Tasks = "perplexity,retrieval,fidelity",
    output: Output = None,
    text: Text = None,
    wikitext: Wikitext = False,
    field: Field = "text",
    prompts: Prompts = None,
    window: Window = None,
    prompt: PromptTokens = None,
    stride: Stride = None,
    windows: Windows = 20,
    lengths: Lengths = None,
    families: Families = None,
    depths: Depths = 10,
    questions: Questions = 100,
    words: Words = None,
    task_data: TaskData = None,
    limit: Limit = None,
    minimum: Minimum = 64,
    sinks: Sinks = 4,
    recent: Recent = 32,
    seed: Seed = 0,
    plot: Plot = None,
    other_weights: OtherWeights = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure methods against dense attention on a model: perplexity, retrieval, fidelity, tasks of lm-eval.

    The prompt is dense, every later row selects as decode would (rule "continuation"). Bytes count keys and values in 16
    bits. Dense attention is always measured beside the methods.
    """
    from loki_attention.evaluation.families import FAMILIES
    from loki_attention.evaluation.method_grammar import Floors, parse_budgets, parse_methods
    from loki_attention.evaluation.suite import Choices, check_names, make_tasks, plan
    from loki_attention.integrations.huggingface.loading import load_model, load_tokenizer
    from loki_attention.results import environment

    specs = parse_methods(methods or ("exact-topk,streaming" if basis is None else "exact-topk,loki,streaming"))
    asked, names = parse_budgets(budgets), [name.strip() for name in tasks.split(",")]
    choices = Choices(
        text=text or (),
        wikitext=wikitext,
        field=field,
        prompts=prompts,
        window=None if window is None else length(window),
        prompt=prompt,
        stride=stride,
        windows=windows,
        lengths=listed(lengths, length),
        families=listed(families, str) or FAMILIES,
        depths=depths,
        questions=questions,
        words=words,
        task_data=task_data,
        limit=limit,
        seed=seed,
    )
    check_names(names, choices)
    loaded = None if basis is None else _load_basis(basis)
    served, tokenizer = load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    if loaded is not None:
        _check_serves(loaded, served, other_weights)
    made_by = environment(dtype=str(served.dtype).removeprefix("torch."))
    floors = Floors(minimum=minimum, sinks=sinks, recent=recent)
    planned = plan(served, loaded, make_tasks(names, served, tokenizer, choices), specs, asked, floors)
    _show(_evaluated(served, output, made_by, planned, seed), planned, made_by, output, plot, as_json=as_json)


def _load_basis(path: Path) -> "KeyBasis":
    from loki_attention import KeyBasis

    return KeyBasis.load(path)


def _check_serves(basis: "KeyBasis", model: Any, other_weights: bool) -> None:
    from loki_attention.core.spec import ModelSpec

    basis.spec.check_serves(ModelSpec.of(model), other_weights=other_weights)


def _evaluated(model: Any, output: Path | None, made_by: "Environment", planned: "Plan", seed: int) -> "list[Result]":
    """The rows of all tasks, under a progress bar."""
    from loki_attention.evaluation.harness import Evaluation

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=messages(), transient=True) as progress:
        bars = {task.name: progress.add_task(task.name, total=task.items) for task, _ in planned.tasks}

        def advance(name: str, done: int) -> None:
            progress.update(bars[name], completed=done)

        return Evaluation(model=model, output=output, made_by=made_by, seed=seed, on_item=advance).run(planned.tasks)


def _show(
    rows: "list[Result]",
    planned: "Plan",
    made_by: "Environment",
    output: Path | None,
    plot: Path | None,
    *,
    as_json: bool,
) -> None:
    from loki_attention.analysis.comparing import tables
    from loki_attention.analysis.comparison_report import terminal_tables
    from loki_attention.analysis.quality_figures import write_heat_maps, write_quality_figures

    found = tables(rows)
    pictures = [] if plot is None else [*write_quality_figures(found, plot), *write_heat_maps(rows, plot)]
    if as_json:
        document = {"environment": asdict(made_by), "results": [row.to_dict() for row in rows]}
        print_json(document | {"left_out": planned.left_out, "figures": [str(path) for path in pictures]})
        return
    for table in found:
        results().print(*terminal_tables(table))
    for name, tasks in planned.left_out.items():
        print(f"left out, for it cannot read so little: {name} on {', '.join(tasks)}")
    for path in (*pictures, *([] if output is None else [output])):
        print(path)
