import json

import pytest

from loki_attention.errors import ArgumentError, CorpusError
from loki_attention.evaluation.task_files import FILE_TASKS, file_task, has_format
from task_data import RECORDS, WORDS, write_task_data

NAMES = [name for name in FILE_TASKS if name != "200_lines"] + ["20_lines"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_task_data(tmp_path_factory.mktemp("tasks"))


@pytest.mark.parametrize("name", NAMES)
def test_every_format_is_read(folder, name):
    task = file_task(name, folder)
    keys = {
        "choices": {"query", "choices", "gold"},
        "contexts": {"contexts", "target", "gold"},
        "word": {"query", "target"},
        "number": {"query", "target"},
        "mention": {"query", "target"},
    }[task.form]
    assert task.items
    assert all(set(item) == keys for item in task.items)
    if task.form in ("choices", "contexts"):
        assert all(
            0 <= item["gold"] < len(item["choices" if task.form == "choices" else "contexts"]) for item in task.items
        )
    assert has_format(name)


def test_prompts_are_lm_evals_own(folder):
    arc = file_task("arc_challenge", folder).items[1]
    assert arc["query"] == f"Question: {RECORDS['arc_challenge_val'][1]['question']}\nAnswer:"
    assert (arc["choices"], arc["gold"]) == (WORDS[:4], 1)
    mmlu = file_task("mmlu", folder).items[2]
    assert mmlu["query"].startswith(
        "The following are multiple choice questions (with answers) about old gardens.\n\nThe stone"
    )
    assert mmlu["query"].endswith("\nA. river\nB. lamp\nC. stone\nD. cloud\nAnswer:")
    assert (mmlu["choices"], mmlu["gold"]) == (list("ABCD"), 2)
    winogrande = file_task("winogrande", folder).items[0]
    assert winogrande["contexts"][1].endswith("So Gus") and winogrande["target"] == "went home."
    lambada = file_task("lambada", folder).items[0]
    assert lambada == {"query": RECORDS["lambada_test"][0]["text"].removesuffix(" why"), "target": " why"}
    truthful = file_task("truthfulqa", folder).items[1]
    assert (truthful["choices"], truthful["gold"]) == (["lamp", "river", "garden"], 0)
    assert file_task("boolq", folder).items[1]["gold"] == 1
    assert file_task("20_lines", folder).items[2]["target"] == "14"
    assert file_task("5_topics", folder).items[2]["target"] == "stone"


def test_examples_come_from_the_training_file(folder, tmp_path):
    task = file_task("gsm8k", folder)
    assert (len(task.items), len(task.examples), task.shots) == (2, 6, 5)
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps(RECORDS["gsm8k_test"][0]), encoding="utf-8")
    assert file_task("gsm8k", tmp_path).shots == 0


def test_the_test_split_goes_first(folder, tmp_path):
    for split in ("val", "test"):
        record = {"query": split, "choices": ["a"], "gold": 0}
        (tmp_path / f"arc_easy_{split}.jsonl").write_text(json.dumps(record), encoding="utf-8")
    assert file_task("arc_easy", tmp_path).items[0]["query"] == "test"


def test_what_cannot_be_read_is_refused(folder, tmp_path):
    with pytest.raises(ArgumentError, match=r"unknown task file 'helaswag'.*did you mean 'hellaswag'"):
        file_task("helaswag", folder)
    with pytest.raises(ArgumentError, match="no file for 'piqa'; expected"):
        file_task("piqa", tmp_path)
    with pytest.raises(ArgumentError, match="there is no folder"):
        file_task("piqa", tmp_path / "nowhere")
    (tmp_path / "boolq.jsonl").write_text('{"question": "is it"}\n', encoding="utf-8")
    with pytest.raises(
        CorpusError, match=r"boolq\.jsonl, record 1, is not in this task's form \(KeyError: 'passage'\)"
    ):
        file_task("boolq", tmp_path)
    (tmp_path / "piqa.jsonl").write_text("[1]\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="line 1, is no record"):
        file_task("piqa", tmp_path)
    (tmp_path / "mmlu.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="no records"):
        file_task("mmlu", tmp_path)
