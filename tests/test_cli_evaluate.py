"""``loki evaluate`` and ``loki compare`` as a user meets them, on a random model of seconds."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from command_line import error_line, run, write_model
from loki_attention.results import load_results
from models import basis_of
from task_data import write_task_data

SMALL = ["--windows", "2", "--window", "128", "--lengths", "230,280", "--questions", "2", "--depths", "2"]
SMALL += ["--minimum", "8", "--sinks", "2", "--recent", "4", "--families", "single,multi-value"]
OPTIONS = {
    "evaluate": ["--basis", "--methods", "--budgets", "--tasks", "--text", "--lengths", "--task-data", "--json"],
    "compare": ["--markdown", "--plot", "--json"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its basis, and the results of three methods on three tasks."""
    path = tmp_path_factory.mktemp("evaluate")
    model = AutoModelForCausalLM.from_pretrained(write_model(path / "model"), dtype=torch.float32)
    basis_of(model).save(path / "basis")
    write_task_data(path / "tasks")
    done = evaluate(path, "--budgets", "1/8,bytes=1/4", "-o", path / "r.json", "--json")
    (path / "said.json").write_text(done, encoding="utf-8")
    return path


def evaluate(path: Path, *more: object) -> str:
    result = run("evaluate", path / "model", "--basis", path / "basis", *SMALL, *more)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("command", OPTIONS)
def test_help_has_options_and_examples(command: str) -> None:
    result = run(command, "--help", env={"COLUMNS": "160"})
    assert result.exit_code == 0
    assert all(option in result.stdout for option in OPTIONS[command])
    assert f"$ loki {command}" in result.stdout


def test_json_and_file_agree(folder: Path) -> None:
    said, saved = json.loads((folder / "said.json").read_text()), load_results(folder / "r.json")
    assert [row["value"] for row in said["results"]] == [row.value for row in saved.results]
    assert said["environment"]["command"] == saved.environment.command
    assert said["left_out"] == {
        "exact-topk @ bytes=1/4": [
            "perplexity",
            *(f"retrieval:{f}:{n}" for f in ("single", "multi-value") for n in (230, 280)),
            "fidelity",
        ]
    }
    for row in saved.results:
        assert row.config["rule"] == "continuation"
        assert row.interval is not None and row.read_bytes is not None
        assert row.items is not None or row.metric in ("perplexity", "perplexity_over_dense")
    assert {row.config["task"] for row in saved.results} == {
        "perplexity", "fidelity", *(f"retrieval:{f}:{n}" for f in ("single", "multi-value") for n in (230, 280))
    }  # fmt: skip
    assert {row.config["variant"] for row in saved.results} == {
        "dense", "exact-topk @ 1/8", "loki @ 1/8", "streaming @ 1/8", "loki @ bytes=1/4", "streaming @ bytes=1/4"
    }  # fmt: skip
    budgets = {
        row.config["task"]: row.config["fraction"]
        for row in saved.results
        if row.config["variant"] == "loki @ bytes=1/4"
    }
    assert len(set(budgets.values())) > 1, "budgets in bytes are solved for each task's lengths"
    layers = {row.config["layer"] for row in saved.results if row.metric == "set_recall"}
    assert layers == {"all", "1", "2"}


def test_the_same_command_measures_nothing_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("loki_attention.evaluation.perplexity.compare_window", never)
    monkeypatch.setattr("loki_attention.evaluation.fidelity.compare_window", never)
    monkeypatch.setattr("loki_attention.evaluation.retrieval.answer", never)
    shown = evaluate(folder, "--budgets", "1/8,bytes=1/4", "-o", folder / "r.json")
    for text in ("perplexity", "retrieval:single", "fidelity", "loki @ bytes=1/4", "of a method", "left out", "r.json"):
        assert text in shown


def test_compare_shows_tables_in_three_forms(folder: Path, tmp_path: Path) -> None:
    shown = run("compare", folder / "r.json")
    assert shown.exit_code == 0, shown.stderr
    assert "retrieval:multi-value" in shown.stdout and "streaming @ 1/8" in shown.stdout
    markdown = run("compare", folder / "r.json", "--markdown").stdout
    assert markdown.count("### ") == 4
    assert "| variant | bytes | " in markdown
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (extra 'plots')")
    said = json.loads(run("compare", folder / "r.json", "--json", "--plot", tmp_path).stdout)
    assert [table["task"] for table in said["tables"]] == [
        "perplexity",
        "retrieval:single",
        "retrieval:multi-value",
        "fidelity",
    ]
    assert len(said["figures"]) == 6
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in said["figures"])


def test_files_are_compared_together_but_not_twice(folder: Path, tmp_path: Path) -> None:
    one = ["--tasks", "perplexity", "--budgets", "24"]
    evaluate(folder, *one, "--methods", "streaming", "-o", tmp_path / "one.json")
    both = run("compare", folder / "r.json", tmp_path / "one.json")
    assert "both have dense on perplexity; leave one out" in error_line(both)
    content = json.loads((tmp_path / "one.json").read_text())
    content["results"] = [row for row in content["results"] if row["config"]["variant"] != "dense"]
    (tmp_path / "one.json").write_text(json.dumps(content))
    both = run("compare", folder / "r.json", tmp_path / "one.json", "--markdown")
    assert "| streaming @ 24 |" in both.stdout and "| loki @ 1/8 |" in both.stdout


def test_lm_eval_and_prompts(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval (extra 'eval')")
    tasks = ["--tasks", "lm-eval:piqa,fidelity", "--task-data", folder / "tasks", "--limit", "3"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} and then " * 12}) + "\n" for i in range(3)))
    evaluate(
        folder, *tasks, "--prompts", prompts, "--methods", "streaming", "--budgets", "12", "-o", tmp_path / "l.json"
    )
    rows = load_results(tmp_path / "l.json").results
    assert {(row.metric, row.n) for row in rows if row.config["task"] == "lm-eval:piqa"} == {
        ("acc", 3),
        ("acc_norm", 3),
    }
    assert all(row.config["near_chance"] == 1 for row in rows if row.metric == "acc")
    assert {row.n for row in rows if row.config["task"] == "fidelity"} == {2}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "perplexety"], "unknown task 'perplexety'; known: perplexity, retrieval, fidelity"),
        (["--tasks", "retrieval:multikey"], "did you mean 'multi-key'"),
        (["--families", "singel"], "unknown family 'singel'"),
        (["--tasks", "lm-eval"], "write lm-eval:hellaswag"),
        (["--methods", "lokii"], "did you mean 'loki'"),
        (["--methods", "loki:tale=none"], "did you mean 'tail'"),
        (["--budgets", "lots"], "neither a percentage nor a token count"),
        (["--lengths", "8K"], "this model takes at least 2 and at most 512"),
        (["--windows", "0"], "windows must be a whole number of windows, at least 1; got 0"),
        (["--limit", "0"], "limit must be a whole number of items"),
        (["--prompts", "tasks/boolq_val.jsonl", "--tasks", "fidelity"], "without text in field 'prompt'"),
        (["--text", "nowhere.txt"], "nowhere.txt is not there"),
        (["--tasks", "lm-eval:helaswag", "--task-data", "tasks"], "unknown task"),
    ],
)
def test_mistakes_are_one_line(folder: Path, args: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if "lm-eval:helaswag" in args:
        pytest.importorskip("lm_eval", reason="needs lm-eval (extra 'eval')")
        monkeypatch.setattr("loki_attention.integrations.lm_eval.TaskManager", _NoTasks)
    assert message in error_line(run("evaluate", "model", "--basis", "basis", *args))


def test_other_files_are_no_results(folder: Path) -> None:
    assert "no JSON file" in error_line(run("compare", folder / "model" / "model.safetensors"))
    assert "exclude each other" in error_line(run("compare", folder / "r.json", "--json", "--markdown"))


class _NoTasks:
    """Stands for lm-eval's index of its own tasks, which takes seconds to read."""

    all_tasks = ("hellaswag", "piqa")

    def __init__(self, **_: object) -> None:
        pass
