"""Units are measured once, whatever stops a run; the file says everything a score depends on."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from loki_attention.errors import ArgumentError
from loki_attention.evaluation.harness import Evaluation
from loki_attention.evaluation.reading import DecodeStep
from loki_attention.evaluation.retrieval import Retrieval
from loki_attention.evaluation.task import Score, accuracy, mean_score
from loki_attention.evaluation.variant import Variant
from loki_attention.results import environment, load_results
from models import BUDGET, tiny_model

MADE_BY = environment("loki evaluate my-model", dtype="float64")
STREAMING = Variant(name="streaming @ 24", method="streaming", budget=BUDGET)
EXACT = Variant(name="exact-topk @ 24", method="exact-topk", budget=BUDGET)


@dataclass
class Counting:
    """A task that counts what it is asked, and stops at the ``stop``-th question."""

    name: str = "counting"
    digest: str = "0123"
    items: int = 3
    steps: tuple[DecodeStep, ...] = (DecodeStep(90, 100), DecodeStep(90, 200))
    together: bool = True
    stop: int | None = None
    asked: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)

    def measure(self, index: int, variants: Any) -> dict[str, Any]:
        if len(self.asked) == self.stop:
            raise KeyboardInterrupt
        self.asked.append((index, tuple(variant.name for variant in variants)))
        return {variant.name: [index, len(variant.name)] for variant in variants}

    def scores(self, outcomes: Any, dense: Any) -> list[Score]:
        return [
            mean_score("name_length", [length for _, length in outcomes], "letters", seed=0),
            accuracy("like_dense", [int(one == other) for one, other in zip(outcomes, dense, strict=True)]),
        ]


def run(task: Any, variants: list[Variant], output: Path | None, **changes: Any) -> Any:
    made_by = replace(MADE_BY, **changes)
    return Evaluation(model=tiny_model(), output=output, made_by=made_by).run([(task, variants)])


def test_every_score_says_what_it_depends_on(tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    rows = run(Counting(), [STREAMING], output)
    saved = load_results(output)
    assert list(saved.results) == rows
    assert saved.environment == MADE_BY
    assert [row.config["variant"] for row in rows] == ["dense", "dense", "streaming @ 24", "streaming @ 24"]
    for row in rows:
        config = row.config
        assert (config["rule"], config["task"], config["items"]) == ("continuation", "counting", "0123")
        assert config["commit"] == MADE_BY.commit
        assert (row.n, len(row.items or ())) == (3, 3)
        assert row.interval is not None and row.read_bytes is not None
    dense, _, sparse, _ = rows
    assert (dense.read_bytes, dense.config["read_fraction"]) == (2 * 2 * 16 * 2 * 150, 1.0)
    assert sparse.config["read_fraction"] == pytest.approx(24 / 150)
    assert (sparse.value, sparse.config["tokens"], sparse.config["sinks"]) == (14, 24, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("together", [True, False])
def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, together: bool) -> None:
    whole = run(Counting(together=together), [STREAMING, EXACT], None)
    output, task = tmp_path / "r.json", Counting(together=together, stop=2)
    with pytest.raises(KeyboardInterrupt):
        run(task, [STREAMING, EXACT], output)
    assert (tmp_path / "r.json.partial").is_file() and not output.exists()
    again = Counting(together=together)
    assert run(again, [STREAMING, EXACT], output) == whole
    assert len(again.asked) == (1 if together else 7)
    assert not set(again.asked) & set(task.asked)
    finished = Counting(together=together)
    assert run(finished, [STREAMING, EXACT], output) == whole
    assert finished.asked == []


def test_a_task_is_saved_before_the_next_begins(tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    planned = [(Counting(), [STREAMING]), (Counting(name="second", stop=1), [STREAMING])]
    with pytest.raises(KeyboardInterrupt):
        Evaluation(model=tiny_model(), output=output, made_by=MADE_BY).run(planned)
    assert {row.config["task"] for row in load_results(output).results} == {"counting"}
    first, second = Counting(), Counting(name="second")
    rows = Evaluation(model=tiny_model(), output=output, made_by=MADE_BY).run(
        [(first, [STREAMING]), (second, [STREAMING])]
    )
    assert first.asked == []
    assert [index for index, _ in second.asked] == [1, 2]
    assert {row.config["task"] for row in rows} == {"counting", "second"}


def test_another_variant_joins_a_finished_file(tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    before = run(Counting(), [STREAMING], output)
    task = Counting()
    after = run(task, [STREAMING, EXACT], output)
    assert {names for _, names in task.asked} == {("dense", "exact-topk @ 24")}
    assert [row for row in after if row.config["variant"] != "exact-topk @ 24"] == before


def test_changed_settings_or_items_are_measured_anew(tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    run(Counting(), [STREAMING], output)
    with pytest.raises(ArgumentError, match=r"would drop: (dense|streaming @ 24) on counting"):
        run(Counting(digest="4567"), [STREAMING], output)
    with pytest.raises(ArgumentError, match="would drop: streaming @ 24 on counting; ask for them too"):
        run(Counting(), [replace(STREAMING, budget=replace(BUDGET, tokens=48))], output)


def test_results_of_other_conditions_are_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    run(Counting(), [STREAMING], output)
    for changes, message in (
        ({"hardware": "another machine"}, "hardware .* and this run has another machine"),
        ({"versions": {"torch": "0.1"}}, "this run has torch 0.1"),
        ({"dtype": "bfloat16"}, "dtype float64, and this run has bfloat16"),
    ):
        with pytest.raises(ArgumentError, match=message):
            run(Counting(), [STREAMING], output, **changes)
    run(Counting(), [STREAMING], output, commit="another")


def test_progress_is_told() -> None:
    told: list[tuple[str, int]] = []
    Evaluation(
        model=tiny_model(), output=None, made_by=MADE_BY, on_item=lambda task, done: told.append((task, done))
    ).run([(Counting(), [STREAMING])])
    assert told == [("counting", 1), ("counting", 2), ("counting", 3)]


def test_retrieval_of_a_model_that_knows_nothing_is_marked(reference_tokenizer: Any) -> None:
    """The bundled tokenizer's ids are beyond the tiny model's vocabulary: its own words do not matter here."""
    task = Retrieval(tiny_model(), _Folded(reference_tokenizer), PROSE, family="single", length=200, questions=4)
    rows = run(task, [STREAMING], None)
    assert [row.value for row in rows] == [0, 0]
    for row in rows:
        assert (row.config["of_record"], row.config["lost_to_dense"], row.config["won_over_dense"]) == (0, 0, 0)
        assert row.config["length"] == 200
        assert row.interval == pytest.approx((0, 0.48989), abs=1e-4)


PROSE = " ".join(f"The {word} of the house was not at home." for word in re.findall(r"\w+", __doc__ or "") * 20)


class _Folded:
    """A tokenizer whose ids are folded into the tiny model's vocabulary."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + i % 210 for i in self._tokenizer(text, **options)["input_ids"]]}
