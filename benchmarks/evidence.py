"""The numbers of record: every study of the bundled model, each to a result file of its own. Resumable: run it again.

    python benchmarks/evidence.py --list
    python benchmarks/evidence.py --text wiki.test.raw --calibration-text wiki.train.raw --only equal-bytes

``wikitext2`` is the table by share of tokens, ``equal-bytes`` and ``tails`` are those by share of bytes, ``ablation`` and
``calibration`` change one thing at a time. ``--model`` takes another model for the ablation, of G = 4 say
(``examples/train_reference_model.py`` trains one), which is asked how a group's heads agree alone; its file is named after it.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ablation import CHANGES, COMBINATIONS, TAIL_CHANGES, Changed, per_head
from loki_attention import Budget, KeyBasis, LokiWarning, calibrate
from loki_attention.core.candidates import CANDIDATES
from loki_attention.core.planes import Planes
from loki_attention.data import reference_model_path, sample_texts
from loki_attention.errors import LokiError
from loki_attention.evaluation.harness import Evaluation
from loki_attention.evaluation.method_grammar import Floors, parse_budgets, parse_methods
from loki_attention.evaluation.perplexity import Perplexity
from loki_attention.evaluation.retrieval import Retrieval
from loki_attention.evaluation.suite import plan
from loki_attention.evaluation.task import Task
from loki_attention.evaluation.text import detokenize_wikitext
from loki_attention.evaluation.text_files import read_text
from loki_attention.evaluation.variant import Variant
from loki_attention.integrations.huggingface.loading import load_model, load_tokenizer
from loki_attention.methods import METHOD_NAMES, method_class
from loki_attention.results import environment
from variants import FRACTIONS, budget, label, perplexity_variants

FLOORS = Floors(minimum=48, sinks=4, recent=16)
POINTS = ("bytes=1/4", "bytes=1/8", "bytes=1/16")
ABLATED_AT = ("1/8", "1/32")
Planned = list[tuple[Task, list[Variant]]]


@dataclass(kw_only=True)
class Setting:
    """The model, the texts, and bases made when a study first needs them."""

    model_path: Path
    text: Path
    calibration_text: Path
    code: Path | None
    model: Any = field(init=False)
    tokenizer: Any = field(init=False)
    _bases: dict[tuple[str, int], KeyBasis] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.model = load_model(str(self.model_path), dtype="float32")
        self.tokenizer = load_tokenizer(str(self.model_path))

    @property
    def prose(self) -> str:
        """WikiText-2 test as plain text."""
        return detokenize_wikitext(read_text(self.text))

    def basis(self, length: int, source: str = "wikitext") -> KeyBasis:
        """The basis calibrated on WikiText-2 train, or on the bundled novels, in windows of ``length`` tokens."""
        if (source, length) not in self._bases:
            texts: Any = sample_texts()
            if source == "wikitext":
                texts = [detokenize_wikitext(read_text(self.calibration_text))]
            made = calibrate(self.model, self.tokenizer, texts, length=length, budget=budget(1 / 8), progress=True)
            self._bases[source, length] = made
        return self._bases[source, length]

    def perplexity(self, windows: int, length: int = 2048, text: str | None = None, name: str = "perplexity") -> Task:
        """Windows of WikiText-2 test or of ``text``; the second half of each is scored."""
        prose = self.prose if text is None else text
        return Perplexity(self.model, self.tokenizer, prose, length=length, windows=windows, name=name)

    def retrieval(self, family: str, length: int, questions: int) -> Task:
        """Questions of a family hidden in WikiText-2 test."""
        return Retrieval(self.model, self.tokenizer, self.prose, family=family, length=length, questions=questions)


def wikitext2(setting: Setting) -> Planned:
    """Loss against dense by share of tokens: loki between its bounds and the methods that should lose."""
    return [(setting.perplexity(40), perplexity_variants(setting.basis(2048)))]


def equal_bytes(setting: Setting) -> Planned:
    """Every method at equal bytes; the bounds, which read every key, at the same shares of tokens."""
    others = [name for name in METHOD_NAMES if name not in ("dense", "loki")]
    return at_equal_bytes(setting, ["loki:tail=none", *others], "", (2048, 4096))


def tails(setting: Setting) -> Planned:
    """Every selection with a mean tail: is it the tail or the selection that wins? The baselines' mass is simulated."""
    kinds = ((name, method_class(name)) for name in METHOD_NAMES)
    names = [name for name, kind in kinds if kind and "mean" in kind.tails and name != "loki"]
    return at_equal_bytes(setting, names, "mean", (2048,))


def at_equal_bytes(setting: Setting, names: Sequence[str], tail: str, lengths: Sequence[int]) -> Planned:
    """The tasks of the equal-bytes tables, retrieval at these lengths, with these methods and loki."""
    tasks = [setting.perplexity(40)]
    tasks += [setting.retrieval(f, n, 400) for f, n in product(("single", "multi-key"), lengths)]
    bases = {task.name: setting.basis(4096 if task.name.endswith("4096") else 2048) for task in tasks}
    suffix = f":tail={tail}" if tail else ""
    specs = parse_methods(",".join(f"{name}{suffix}" for name in ("loki", *names)))
    bound = parse_methods(f"exact-topk{suffix}")
    planned: Planned = []
    for task in tasks:
        found = plan(setting.model, bases[task.name], [task], specs, parse_budgets(",".join(POINTS)), FLOORS)
        bounds = plan(setting.model, bases[task.name], [task], bound, parse_budgets("1/4,1/8,1/16"), FLOORS)
        planned.append((task, found.tasks[0][1] + bounds.tasks[0][1]))
        for name in found.left_out:
            Console(stderr=True).print(f"cannot read so little: {name} on {task.name}", highlight=False)
    return planned


def ablation(setting: Setting) -> Planned:
    """One change at a time at two budgets, without and with the tail; of another model what concerns a group's heads."""
    basis = setting.basis(2048)
    rows: list[Variant] = []
    for fraction, tail in product(ABLATED_AT, ("none", "linear")):
        share = 1 / int(fraction.removeprefix("1/"))
        common: dict[str, Any] = {"method": "loki", "basis": basis, "budget": budget(share), "tail": tail}

        def row(
            name: str, common: dict[str, Any] = common, at: str = f"tail {common['tail']} @ {fraction}", **changes: Any
        ) -> Variant:
            return Variant(name=f"{name}, {at}", **{**common, **changes})

        rows += [row("loki"), row("per query head", per="query-head")]
        if is_bundled(setting.model_path):
            rows += [row(f"{planes}", planes=str(planes)) for planes in every_planes(basis.spec.head_dim)]
            others = {name: basis.with_candidate(name) for name in CANDIDATES} | {"per head": per_head(basis)}
            rows += [row(name, basis=other) for name, other in others.items()]
            rows += [row(f"no {name}", budget=without(share, name)) for name in ("sinks", "recent")]
            rows.append(row("layer 0 sparse", layers={0: "sparse"}))
        changes = CHANGES if is_bundled(setting.model_path) else COMBINATIONS
        for change in (name for name in changes if tail == "linear" or name not in TAIL_CHANGES):
            rows.append(Changed(name=f"{change}, tail {tail} @ {fraction}", change=change, **common))
        if tail == "linear":
            rows.append(row("tail mean", at=f"@ {fraction}", tail="mean"))
    return [(setting.perplexity(20), rows)]


def calibration(setting: Setting) -> Planned:
    """Calibration of 512 against 4096 tokens, evaluated at 4096; on novels against WikiText, evaluated on source code."""
    by_length = [(f"calibrated at {length}", setting.basis(length)) for length in (512, 4096)]
    planned: Planned = [(setting.perplexity(16, 4096, name="perplexity at 4096"), of_bases(by_length))]
    if setting.code is None:
        raise LokiError("study 'calibration' is evaluated on source code; give a file of it as --code")
    by_text = [(f"calibrated on {source}", setting.basis(2048, source)) for source in ("wikitext", "novels")]
    code = setting.perplexity(20, text=read_text(setting.code), name="perplexity of source code")
    return [*planned, (code, of_bases(by_text))]


def of_bases(bases: Sequence[tuple[str, KeyBasis]]) -> list[Variant]:
    """Loki with each basis, at two budgets, without a tail and with the linear one."""
    return [
        Variant(
            name=label(f"{name}, tail {tail}", at), method="loki", basis=basis, budget=budget(FRACTIONS[at]), tail=tail
        )
        for (name, basis), at, tail in product(bases, ABLATED_AT, ("none", "linear"))
    ]


def every_planes(head_dim: int) -> list[Planes]:
    """The whole grammar from 4 to 32 bytes a token, in at most ``head_dim`` dims."""
    dims = range(4, head_dim + 1, 4)
    texts = [f"{n}@{bits}" for n, bits in product(dims, (8, 4, 2))] + [f"{n}@4+{m}@2" for n, m in product(dims, dims)]
    found = []
    for text in texts:
        try:
            planes = Planes.parse(text)
            planes.check_fits(head_dim)
        except LokiError:
            continue
        if 4 <= planes.bytes_per_token <= 32:
            found.append(planes)
    return sorted(found, key=lambda planes: planes.bytes_per_token)


def without(share: float, what: str) -> Budget:
    """The budget without sinks, or with no recent token but the new one."""
    kept = {"sinks": 4, "recent": 16} | {what: 0 if what == "sinks" else 1}
    return Budget(fraction=share, minimum=48, **kept)


STUDIES: Mapping[str, Callable[[Setting], Planned]] = {
    "wikitext2": wikitext2,
    "equal-bytes": equal_bytes,
    "tails": tails,
    "ablation": ablation,
    "calibration": calibration,
}


def main() -> None:
    """Run the studies that are asked for, each to its file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the studies and what they are")
    parser.add_argument("--text", type=Path, help="WikiText-2 test, raw form")
    parser.add_argument("--calibration-text", type=Path, help="WikiText-2 train, raw form")
    parser.add_argument("--code", type=Path, help="source code, for study 'calibration'")
    parser.add_argument("--model", type=Path, default=reference_model_path(), help="default: the bundled model")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(STUDIES), help="studies; default: all"
    )
    parser.add_argument("--estimate", action="store_true", help="time one item of every task, and measure nothing")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:12} {make.__doc__}" for name, make in STUDIES.items()))
        return
    if arguments.text is None or arguments.calibration_text is None or not set(arguments.only) <= set(STUDIES):
        parser.error(f"give --text and --calibration-text, and studies among {', '.join(STUDIES)}")
    warnings.simplefilter("ignore", LokiWarning)
    setting = Setting(
        model_path=arguments.model,
        text=arguments.text,
        calibration_text=arguments.calibration_text,
        code=arguments.code,
    )
    for name in arguments.only:
        try:
            planned = STUDIES[name](setting)
            if arguments.estimate:
                estimate(name, planned)
            else:
                run(setting, planned, arguments.folder / file_name(name, arguments.model))
        except LokiError as error:
            parser.exit(1, f"error: {error}\n")


def file_name(study: str, model: Path) -> str:
    """The table by share of tokens keeps its name; a study of another model is named after it."""
    of_model = "" if is_bundled(model) else f"-{model.name}"
    return f"{study}.json" if study == "wikitext2" else f"evidence-{study}{of_model}.json"


def is_bundled(model: Path) -> bool:
    """Whether a model is the bundled one."""
    return model == reference_model_path()


def run(setting: Setting, planned: Planned, output: Path) -> None:
    """Measure a study under a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bars = {task.name: progress.add_task(task.name, total=task.items) for task, _ in planned}
        Evaluation(
            model=setting.model,
            output=output,
            made_by=environment(dtype="float32"),
            on_item=lambda name, done: progress.update(bars[name], completed=done),
        ).run(planned)


def estimate(study: str, planned: Planned) -> None:
    """Print how long one item of every task takes, all its variants together, and what that makes of the study."""
    total = 0.0
    for task, variants in planned:
        start = time.perf_counter()
        task.measure(0, variants)
        seconds = time.perf_counter() - start
        total += seconds * task.items
        print(
            f"{study}: {task.name}, {len(variants)} variants: {seconds:.1f} s an item, {task.items} items", flush=True
        )
    print(f"{study}: {total / 3600:.1f} hours in all", flush=True)


if __name__ == "__main__":
    main()
