"""lm-eval over an attached model: at full budget dense scores exactly, and every score from sparse rows."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import write_model
from loki_attention import Budget
from loki_attention.errors import ArgumentError, LokiError
from loki_attention.evaluation.lm_eval_task import LmEvalTask
from loki_attention.evaluation.variant import Variant
from task_data import write_task_data

pytest.importorskip("lm_eval", reason="needs lm-eval (extra 'eval')")

from lm_eval.api.instance import Instance

from loki_attention.integrations.lm_eval import AttachedLM
from loki_attention.integrations.lm_eval_forms import FORMS

DENSE = Variant(name="dense", method="dense", budget=None)
WHOLE = Variant(name="whole", method="streaming", budget=Budget(tokens=512, sinks=2, recent=4))
FEW = Variant(name="few", method="streaming", budget=Budget(tokens=12, sinks=2, recent=4))
CONTEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A tiny random model, its tokenizer, and a folder of task files."""
    folder = tmp_path_factory.mktemp("served")
    path = write_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(path), write_task_data(folder / "tasks")


def lm(served: tuple[Any, Any, Any], variant: Variant) -> AttachedLM:
    return AttachedLM(served[0], served[1], variant, max_length=512)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.mark.parametrize(
    "name", ["hellaswag", "arc_easy", "winogrande", "mmlu", "truthfulqa", "boolq", "lambada", "gsm8k", "20_lines"]
)
@pytest.mark.filterwarnings("ignore:every step stayed dense")
def test_a_full_budget_gives_the_dense_scores_exactly(
    served: tuple[Any, Any, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, data = served
    monkeypatch.setattr("loki_attention.integrations.lm_eval._MOST_NEW_TOKENS", 8)
    monkeypatch.setitem(FORMS["mention"]["generation_kwargs"], "max_gen_toks", 8)
    task = LmEvalTask(model, tokenizer, name, data=data, limit=2)
    dense, whole = task.measure(0, [DENSE])["dense"], task.measure(0, [WHOLE])["whole"]
    assert dense == whole
    assert all(metric[4] == 2 and (metric[5] is None or len(metric[5]) == 2) for metric in dense)
    scores = task.scores([whole], [dense])
    assert scores == task.scores([dense], [dense])
    assert all(
        score.interval is not None and score.interval.low <= score.value <= score.interval.high for score in scores
    )


@pytest.mark.filterwarnings("ignore:every step stayed dense")
def test_it_does_so_where_there_are_kernels_for_some_methods(served: tuple[Any, Any, Any]) -> None:
    """In bfloat16 dense steps have native kernels, which round otherwise; streaming has none."""
    _, tokenizer, data = served
    model = AutoModelForCausalLM.from_pretrained(data.parent / "model", dtype=torch.bfloat16).eval()
    task = LmEvalTask(model, tokenizer, "lambada", data=data, limit=4)
    assert task.measure(0, [DENSE])["dense"] == task.measure(0, [WHOLE])["whole"]


@pytest.mark.filterwarnings("ignore:every step stayed dense")
def test_likelihoods_are_the_models_own_and_sparse_ones_are_not(served: tuple[Any, Any, Any]) -> None:
    model, tokenizer, _ = served
    asked = requests("loglikelihood", (CONTEXT, " We had everything"), (CONTEXT, " before us"), ("", "We had nothing"))
    dense, whole, few = (lm(served, variant).loglikelihood(asked) for variant in (DENSE, WHOLE, FEW))
    assert dense == whole
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(dense[:2], few[:2], strict=True))
    for (context, rest), (value, greedy) in zip((request.args for request in asked), dense, strict=True):
        ids = tokenizer(context, add_special_tokens=False)["input_ids"] or [lm(served, DENSE).prefix_token_id]
        more = tokenizer(context + rest, add_special_tokens=False)["input_ids"][len(ids) if context else 0 :]
        with torch.inference_mode():
            logits = model(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
        assert value == pytest.approx(float(logits.gather(-1, torch.tensor(more)[:, None]).sum()), rel=1e-6)
        assert greedy == (logits.argmax(-1).tolist() == more)


@pytest.mark.filterwarnings("ignore:every step stayed dense")
def test_generation_is_the_models_own_up_to_a_stop_string(served: tuple[Any, Any, Any]) -> None:
    model, tokenizer, _ = served
    options = {"until": [], "do_sample": False, "max_gen_toks": 8}
    dense, whole = (
        lm(served, v).generate_until(requests("generate_until", (CONTEXT, options)))[0] for v in (DENSE, WHOLE)
    )
    ids = tokenizer(CONTEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert dense == whole == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    stop = dense[4:7]
    stopped = lm(served, DENSE).generate_until(requests("generate_until", (CONTEXT, options | {"until": [stop]})))[0]
    assert stopped == dense.partition(stop)[0]
    assert lm(served, FEW).generate_until(requests("generate_until", (CONTEXT, options)))[0] != dense


@pytest.mark.filterwarnings("ignore:every step stayed dense")
def test_rolling_likelihoods_cover_every_token_once(served: tuple[Any, Any, Any]) -> None:
    model, tokenizer, _ = served
    text = " ".join([CONTEXT] * 3)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (value,) = lm(served, DENSE).loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    start = lm(served, DENSE).prefix_token_id
    with torch.inference_mode():
        logits = model(torch.tensor([[start, *ids]])).logits[0, :-1].float().log_softmax(-1)
    assert value == pytest.approx(float(logits.gather(-1, torch.tensor(ids)[:, None]).sum()), rel=1e-6)
    short = AttachedLM(model, tokenizer, DENSE, max_length=32)
    (cut,) = short.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert cut != value and math.isfinite(cut)
    assert lm(served, DENSE).loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0]


def test_a_continuation_beyond_the_models_context_is_refused(served: tuple[Any, Any, Any]) -> None:
    short = AttachedLM(served[0], served[1], DENSE, max_length=8)
    with pytest.raises(LokiError, match=r"a text of \d+ tokens .* takes 8 in all"):
        short.loglikelihood(requests("loglikelihood", ("It was", CONTEXT)))


def test_tasks_near_chance_are_marked(served: tuple[Any, Any, Any]) -> None:
    task = LmEvalTask(served[0], served[1], "hellaswag", data=served[2])

    def marked(right: int) -> list[Any]:
        dense = [["acc", right / 6, 0.0, 1.0, 6, [1.0] * right + [0.0] * (6 - right)]]
        return [score.config["near_chance"] for score in task.scores([dense], [dense])]

    assert (
        task.scores([[["acc", 0.5, 0.0, 1.0, 2, [1.0, 0.0]]]], [[["acc", 0.5, 0.0, 1.0, 2, [1.0, 0.0]]]])[0].config[
            "chance"
        ]
        == 0.25
    )
    assert (marked(2), marked(6)) == ([1], [0])


def test_steps_are_those_of_scored_rows(served: tuple[Any, Any, Any]) -> None:
    model, tokenizer, data = served
    task = LmEvalTask(model, tokenizer, "boolq", data=data)
    contexts = [len(tokenizer(request.args[0])["input_ids"]) for request in task._task.instances]
    wholes = [len(tokenizer("".join(request.args))["input_ids"]) for request in task._task.instances]
    assert {step.prompt for step in task.steps} == {context - 1 for context in contexts}
    assert {step.tokens for step in task.steps} == {
        n for c, w in zip(contexts, wholes, strict=True) for n in range(c, w)
    }


def test_a_definition_of_ones_own_is_found(served: tuple[Any, Any, Any], tmp_path: Path) -> None:
    model, tokenizer, data = served
    write_definition(tmp_path, data / "hellaswag_val.jsonl")
    mine = LmEvalTask(model, tokenizer, "rivers", data=tmp_path, limit=2).measure(0, [DENSE])["dense"]
    files = LmEvalTask(model, tokenizer, "hellaswag", data=data, limit=2).measure(0, [DENSE])["dense"]
    assert mine == [metric for metric in files if metric[0] == "acc"]


@pytest.mark.slow
def test_other_names_are_refused(served: tuple[Any, Any, Any], tmp_path: Path) -> None:
    """Slow: lm-eval reads the definitions of all its tasks."""
    model, tokenizer, data = served
    write_definition(tmp_path, data / "hellaswag_val.jsonl")
    with pytest.raises(ArgumentError, match=r"unknown task 'river'.*did you mean 'rivers'"):
        LmEvalTask(model, tokenizer, "river", data=tmp_path)
    with pytest.raises(LokiError, match=r"cannot load its task 'piqa'.*--task-data"):
        LmEvalTask(model, tokenizer, "piqa")


def write_definition(folder: Path, items: Path) -> None:
    """A task in lm-eval's own YAML."""
    lines = [
        "task: rivers",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {items}}}, cache_dir: {folder / 'cache'}}}",
        "test_split: test",
        "output_type: multiple_choice",
        'doc_to_text: "{{ctx}}"',
        "doc_to_choice: endings",
        "doc_to_target: label",
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
    ]
    (folder / "rivers.yaml").write_text("\n".join(lines), encoding="utf-8")
