"""``loki bench``: how fast decode steps are on this machine, each checked before it is timed."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loki_attention.cli.bench_tables import attention_table, break_even_table, generate_table, machine_line
from loki_attention.cli.lists import fraction, length, listed, whole
from loki_attention.cli.output import AsJson, examples, messages, print_json, results

if TYPE_CHECKING:
    from loki_attention.results import Environment, Result

bench = typer.Typer(
    help="Measure decode speed on this machine: attention alone, the break-even, whole generation.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Item = TypeVar("Item")
Found = TypeVar("Found")
Plot = Annotated[Path | None, typer.Option(help="Write pictures (PNG) to this folder; needs matplotlib.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write the results with their environment here.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few small sizes and rounds: to see that it works.")]
Lengths = Annotated[
    str | None, typer.Option(help="Cached tokens, such as 2K,8K,32K.", show_default="2K to 128K, or 4K to 32K")
]
Rounds = Annotated[int | None, typer.Option(help="Timed rounds of every provider.", show_default="15, or 7")]
Dtype = Annotated[str, typer.Option(help="Of keys and values: bfloat16, float16 or float32.")]
TokenBudget = Annotated[str, typer.Option("--tokens", help="Tokens to attend: a share such as 12.5%, or a count.")]

_ATTENTION_EXAMPLES = examples(
    "loki bench attention --quick",
    "loki bench attention --shapes 32/8/128 --lengths 8K,32K --batches 1 -o attention.json --plot pictures",
)
_BREAK_EVEN_EXAMPLES = examples("loki bench break-even", "loki bench break-even --shape 40/40/128 --refresh --json")
_GENERATE_EXAMPLES = examples("loki bench generate --quick", "loki bench generate --lengths 32K -o generate.json")


@bench.command("attention", epilog=_ATTENTION_EXAMPLES)
def attention_command(
    shapes: Annotated[
        str | None,
        typer.Option(help="Query heads/key heads/head dim.", show_default="32/8/128,40/40/128,32/8/64"),
    ] = None,
    lengths: Lengths = None,
    batches: Annotated[str | None, typer.Option(help="Sequences at once.", show_default="1,8")] = None,
    planes: Annotated[str | None, typer.Option(help="Layouts of the low-rank keys.", show_default="four")] = None,
    fractions: Annotated[str | None, typer.Option(help="Budgets.", show_default="1/8,1/16,1/32")] = None,
    selections: Annotated[
        str | None, typer.Option(help="Where selected tokens lie.", show_default="random,recorded")
    ] = None,
    dtype: Dtype = "bfloat16",
    rounds: Rounds = None,
    quick: Quick = False,
    plot: Plot = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time one layer's decode step: torch's dense attention, ours, exact top-k and loki, with what reading alone costs.

    Every output is compared with a reference first; where one is wrong nothing is timed.
    """
    from loki_attention.benchmarking import attention
    from loki_attention.benchmarking.comparison import by_case
    from loki_attention.benchmarking.layers import Heads

    _check_dtype(dtype)
    chosen: dict[str, Any] = {
        "shapes": listed(shapes, Heads.parse),
        "lengths": listed(lengths, length),
        "batches": listed(batches, whole),
        "planes": listed(planes, str),
        "fractions": listed(fractions, fraction),
        "selections": listed(selections, str),
        "rounds": rounds,
    }
    small: dict[str, Any] = {
        "shapes": [Heads(32, 8, 128)], "lengths": [2048, 8192], "batches": [1], "planes": attention.PLANES[:1],
        "fractions": ["1/8"], "selections": ["random"], "rounds": 5, "flex": False,
    }  # fmt: skip
    given = {name: value for name, value in chosen.items() if value is not None}
    suite = attention.Suite(dtype=attention.DTYPES[dtype], **{**(small if quick else {}), **given})
    made_by = _environment(dtype)

    def measure(case: Any) -> Any:
        measured = attention.measure(case, suite)
        if not as_json:
            results().print(attention_table(str(case), measured.results, measured.left_out))
        return measured

    measured = _tracked("attention", suite.cases, measure)
    rows = [row for one in measured for row in one.results]
    pictures = [] if plot is None else _attention_pictures(by_case(rows), plot)
    _finish(rows, made_by, output, pictures, as_json=as_json)


@bench.command("break-even", epilog=_BREAK_EVEN_EXAMPLES)
def break_even_command(
    shape: Annotated[str, typer.Option(help="Query heads/key heads/head dim.")] = "32/8/128",
    planes: Annotated[str | None, typer.Option(help="Layout of the low-rank keys.", show_default="by head dim")] = None,
    tokens: TokenBudget = "12.5%",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    dtype: Dtype = "bfloat16",
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what is known already.")] = False,
    plot: Plot = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Show from which length on loki's step is faster than our dense attention; kept for dense_below="break-even"."""
    from loki_attention.analysis.figures import Curve, write_curves_figure
    from loki_attention.benchmarking.attention import DTYPES
    from loki_attention.benchmarking.break_even import results_of
    from loki_attention.benchmarking.layers import Heads
    from loki_attention.core.budget import Budget
    from loki_attention.core.planes import Planes
    from loki_attention.kernels.break_even import NEVER, BreakEvenShape, cache_file, curve

    _check_dtype(dtype)
    heads = Heads.parse(shape)
    made_by = _environment(dtype)
    wanted = BreakEvenShape(
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        dtype=DTYPES[dtype],
        planes=planes or str(Planes.default(heads.head_dim)),
        budget=Budget.parse(tokens),
        batch=batch,
    )
    found = curve(wanted, refresh=refresh, whole=True)
    rows = results_of(found, wanted)
    pictures = []
    if plot is not None:
        lengths = [point.tokens for point in found.points]
        lines = [
            Curve("dense (ours)", lengths, [1e3 * point.dense for point in found.points]),
            Curve("loki", lengths, [1e3 * point.sparse for point in found.points]),
        ]
        marked = None if found.tokens >= NEVER else found.tokens
        title = f"A layer's decode step, {shape}, batch {batch}, {wanted.planes}, {tokens}"
        pictures.append(write_curves_figure(lines, plot, "break_even", title=title, label="ms", marked=marked))
    if not as_json:
        results().print(break_even_table(found, wanted))
        results().print(f"kept in {cache_file()}", highlight=False)
    _finish(rows, made_by, output, pictures, as_json=as_json)


@bench.command("generate", epilog=_GENERATE_EXAMPLES)
def generate_command(
    lengths: Lengths = None,
    tokens: TokenBudget = "12.5%",
    new_tokens: Annotated[int, typer.Option(help="Tokens that a round generates.")] = 16,
    rounds: Rounds = None,
    quick: Quick = False,
    plot: Plot = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time whole generation on a random model as large as Llama 3.2 1B: transformers as it is, our cache, loki.

    Needs 8 GB of memory at 32K tokens. Sparse and dense logits are compared first.
    """
    from loki_attention.analysis.figures import Curve, write_curves_figure
    from loki_attention.benchmarking import generate
    from loki_attention.benchmarking.random_model import SMALL_MODEL
    from loki_attention.core.budget import Budget

    given = {"lengths": listed(lengths, length), "rounds": rounds}
    small = {"shape": SMALL_MODEL, "lengths": [1024], "rounds": 2}
    chosen = {name: value for name, value in given.items() if value is not None}
    settings: dict[str, Any] = {**(small if quick else {}), **chosen}
    suite = generate.Suite(budget=Budget.parse(tokens), new_tokens=new_tokens, **settings)
    made_by = _environment("bfloat16")
    messages().print(f"a random model of {suite.shape}, vocabulary {suite.shape.vocabulary} ...", highlight=False)
    generation = generate.Generation(suite)
    measured = _tracked("generate", list(suite.lengths), generation.measure)
    rows = [row for one in measured for row in one.results]
    pictures = []
    if plot is not None:
        by_name = {name: [row for row in rows if row.config["variant"] == name] for name in suite.variants}
        lines = [Curve(name, list(suite.lengths), [row.value for row in found]) for name, found in by_name.items()]
        title = f"Decoding end to end, {suite.shape}"
        pictures.append(write_curves_figure(lines, plot, "generate", title=title, label="tokens/s"))
    if not as_json:
        results().print(generate_table(rows))
    _finish(rows, made_by, output, pictures, as_json=as_json)


def _attention_pictures(cases: "dict[tuple[Any, ...], list[Result]]", folder: Path) -> list[Path]:
    """Time by length, a picture for each shape, batch and selection: dense attention and loki's first planes."""
    from loki_attention.analysis.figures import Curve, write_curves_figure
    from loki_attention.benchmarking.comparison import named

    lines: dict[tuple[str, ...], dict[str, list[tuple[int, float]]]] = {}
    for (heads, batch, tokens, _, selection), rows in cases.items():
        picture = lines.setdefault((str(heads), str(batch), str(selection)), {})
        first = next((row.config["planes"] for row in rows if row.config["provider"] == "loki"), None)
        for row in rows:
            kind, config = row.config["kind"], row.config
            ours = config["provider"] == "loki" and config["planes"] == first and config["tail"] == "linear"
            if kind == "dense" or ours:
                picture.setdefault(named(row), []).append((int(tokens), 1e3 * row.value))
    pictures = []
    for (heads, batch, selection), found in lines.items():
        curves = [Curve(name, *zip(*sorted(points), strict=True)) for name, points in found.items()]
        title = f"A layer's decode step, {heads}, batch {batch}, {selection} selection"
        name = f"attention_{heads.replace('/', '-')}_batch{batch}_{selection}"
        pictures.append(write_curves_figure(curves, folder, name, title=title, label="ms"))
    return pictures


def _finish(
    rows: "list[Result]", made_by: "Environment", output: Path | None, pictures: Sequence[Path], *, as_json: bool
) -> None:
    from loki_attention.results import save_results

    if output is not None:
        save_results(output, rows, made_by)
    if as_json:
        document = {"environment": asdict(made_by), "results": [row.to_dict() for row in rows]}
        print_json(document | {"figures": [str(picture) for picture in pictures]})
        return
    print(machine_line(made_by))
    for path in (*pictures, *([] if output is None else [output])):
        print(path)


def _tracked(name: str, items: Sequence[Item], measure: Callable[[Item], Found]) -> list[Found]:
    """``measure`` of every item under a progress bar that names it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found = []
    with Progress(*columns, console=messages(), transient=True) as progress:
        task = progress.add_task(name, total=len(items))
        for item in items:
            progress.update(task, description=f"{name}: {item}")
            found.append(measure(item))
            progress.advance(task)
    return found


def _environment(dtype: str) -> "Environment":
    from loki_attention.results import environment

    return environment(dtype=dtype)


def _check_dtype(dtype: str) -> None:
    from loki_attention.benchmarking.attention import DTYPES
    from loki_attention.errors import unknown_name

    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, tuple(DTYPES))
