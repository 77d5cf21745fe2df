import json
import math
import subprocess

import pytest
import torch

from loki_attention import results
from loki_attention.errors import ArgumentError
from loki_attention.intervals import Interval, wilson_interval
from loki_attention.results import Result, environment, load_results, save_results

RESULTS = [
    Result(
        metric="retrieval",
        value=0.97,
        unit="share of questions",
        n=400,
        seed=0,
        interval=wilson_interval(388, 400),
        read_bytes=12345.5,
        config={"method": "loki", "planes": "16@4+32@2", "length": 2048, "fraction": 0.125, "tail": None},
    ),
    Result(metric="perplexity", value=22, unit="per token", n=20),
    Result(metric="log_loss", value=2.5, unit="nats", n=3, items=(1, 0.25, 1.5e-07)),
]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "new" / "results.json"
    save_results(path, RESULTS, environment("loki demo"))
    return path


def test_results_survive_the_file(saved):
    loaded = load_results(saved)
    assert list(loaded.results) == RESULTS
    assert isinstance(loaded.results[0].interval, Interval)
    assert loaded.environment.command == "loki demo"
    assert [path.name for path in saved.parent.iterdir()] == ["results.json"]


def test_items_are_one_text_and_older_files_have_none(saved):
    content = json.loads(saved.read_text())
    assert content["results"][2]["items"] == "1 0.25 1.5e-07"
    for record in content["results"]:
        del record["items"]
    saved.write_text(json.dumps(content))
    assert [result.items for result in load_results(saved).results] == [None] * 3
    content["results"][0]["items"] = "1 two 3"
    saved.write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match="field 'items' has '1 two 3'"):
        load_results(saved)


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    before = saved.read_text()
    monkeypatch.setattr(results.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_results(saved, [], environment("other"))
    assert saved.read_text() == before
    assert [path.name for path in saved.parent.iterdir()] == ["results.json"]


def test_the_environment_names_machine_and_versions(monkeypatch):
    monkeypatch.setattr(results.sys, "argv", ["/opt/env/bin/loki", "demo", "--out=/home/me/out", "data/a.txt", "a b"])
    here = environment(dtype="float32")
    assert here.command == "loki demo --out=out data/a.txt 'a b'"
    assert "cores" in here.hardware
    assert here.threads == torch.get_num_threads()
    assert here.versions["torch"] == torch.__version__
    assert set(here.versions) == {"python", "torch", "transformers", "loki-attention"}
    assert here.dtype == "float32"
    assert here.date.endswith("Z")


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("/data/x/basis", "basis"),
        ("--out=/data/x,/data/y", "--out=x,y"),
        ("~/model", "model"),
        (r"C:\data\model", "model"),
        ("data/text.txt", "data/text.txt"),
        ("--planes=16@4+32@2", "--planes=16@4+32@2"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_machine_paths_are_cut(word, kept):
    assert results._without_folders(word) == kept


def test_the_commit_is_the_one_of_this_file(tmp_path, monkeypatch):
    def git(*arguments):
        options = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *options, *arguments], check=True, capture_output=True)

    module = tmp_path / "results.py"
    module.write_text("1")
    monkeypatch.setattr(results, "__file__", str(module))
    assert results._commit() == "unknown"
    git("init")
    assert results._commit() == "unknown"
    git("add", "results.py")
    git("commit", "-m", "first")
    commit = results._commit()
    assert len(commit) == 40
    (tmp_path / "new.txt").write_text("2")
    assert results._commit() == commit
    module.write_text("2")
    assert results._commit() == commit + "+changes"


def test_no_git_means_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert results._commit() == "unknown"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema=2), "schema version 2; this version reads 1"),
        (lambda c: c.update(schema=True), "schema version True"),
        (lambda c: c.pop("schema"), "no schema version"),
        (lambda c: c.pop("results"), "no list of results"),
        (lambda c: c.pop("environment"), "environment: no record"),
        (lambda c: c["environment"].pop("commit"), "environment: field 'commit' is missing"),
        (lambda c: c["environment"].update(threads="two"), "environment: field 'threads' has 'two'"),
        (lambda c: c["results"].append(5), "result 3: no record"),
        (lambda c: c["results"][1].update(valeu=1), "result 1: field 'valeu' is unknown; known fields: metric"),
        (lambda c: c["results"][0].pop("unit"), "result 0: field 'unit' is missing"),
        (lambda c: c["results"][0].update(value="0.97"), "result 0: field 'value' has '0.97'"),
        (lambda c: c["results"][0].update(interval=[1]), "result 0: field 'interval'"),
        (lambda c: c["results"][0].update(config={"a": []}), "result 0: field 'config'"),
    ],
)
def test_other_files_are_refused(saved, change, message):
    content = json.loads(saved.read_text())
    change(content)
    saved.write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match=message):
        load_results(saved)


def test_what_is_no_results_file_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="cannot be read: No such file"):
        load_results(tmp_path / "absent.json")
    for number, content in enumerate(("not JSON", "[]", "")):
        file = tmp_path / f"{number}.json"
        file.write_text(content)
        with pytest.raises(ArgumentError, match=r"no JSON file|no schema version"):
            load_results(file)


@pytest.mark.parametrize(
    "wrong",
    [{"value": math.nan}, {"value": math.inf}, {"n": 0}, {"interval": (0.0, math.nan)}, {"config": {"x": math.inf}}],
)
def test_a_result_is_finite(wrong):
    with pytest.raises(ArgumentError, match=r"finite|at least 1"):
        Result(**{"metric": "kl", "value": 1.0, "unit": "nats", "n": 1, **wrong})
