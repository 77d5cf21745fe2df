import json
import math
import subprocess

import pytest
import torch

from loki_attention import results
from loki_attention.errors import ArgumentError
from loki_attention.results import (
    Interval,
    Result,
    bootstrap_interval,
    environment,
    load_results,
    save_results,
    wilson_interval,
)

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
        (lambda c: c["results"].append(5), "result 2: no record"),
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


def test_wilson_bounds_stay_in_range_and_hold_the_share():
    for n in (1, 10, 400):
        for successes in {0, 1, n // 2, n}:
            low, high = wilson_interval(successes, n)
            assert 0 <= low <= successes / n <= high <= 1
    assert wilson_interval(0, 10).high == pytest.approx(0.27753, abs=1e-5)
    for wrong in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ArgumentError):
            wilson_interval(*wrong)


def test_the_bootstrap_agrees_with_the_normal_approximation():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = bootstrap_interval(values, seed=0, resamples=2000)
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    assert low == pytest.approx(float(values.mean()) - half, abs=0.1 * half)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.1 * half)


def test_the_bootstrap_is_repeatable_and_refuses_nonsense():
    values = [0.0, 1.0, 1.0, 0.5]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(torch.tensor(values), seed=3)
    assert bootstrap_interval([0.25], seed=0) == (0.25, 0.25)
    for wrong in ([], [1.0, math.nan], torch.zeros(2, 2)):
        with pytest.raises(ArgumentError, match="finite values"):
            bootstrap_interval(wrong, seed=0)
    with pytest.raises(ArgumentError, match="at least 40"):
        bootstrap_interval(values, seed=0, resamples=10)
