"""``loki bench`` as a user meets it, on sizes of milliseconds."""

import json

import pytest

from command_line import error_line, run
from loki_attention.benchmarking import timing
from loki_attention.kernels import native, stopwatch
from loki_attention.results import load_results

if not native.available():
    pytest.skip("the native extension is not built", allow_module_level=True)

COMMANDS = {
    "attention": ["--shapes", "--lengths", "--planes", "--quick", "--plot", "--output", "--json"],
    "break-even": ["--shape", "--refresh", "--plot", "--output", "--json"],
    "generate": ["--lengths", "--new-tokens", "--quick", "--plot", "--output", "--json"],
}
TINY = ["--quick", "--shapes", "4/2/64", "--planes", "16@4+32@2", "--lengths", "256,1K", "--rounds", "1"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "_BUSY_SHARE", 2.0)
    monkeypatch.setattr(stopwatch, "empty_caches", lambda threads=None: None)
    monkeypatch.setattr("loki_attention.analysis.figures._DOTS_PER_INCH", 40)
    monkeypatch.setattr("loki_attention.kernels.break_even._LONGEST", 1024)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_options_and_examples(command):
    result = run("bench", command, "--help", env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert all(option in result.stdout for option in COMMANDS[command])
    assert f"$ loki bench {command}" in result.stdout


def test_attention_shows_a_table_a_case():
    result = run("bench", "attention", *TINY)
    assert result.exit_code == 0, result.stderr
    for shown in (
        "4/2/64, batch 1, 256 tokens",
        "1024 tokens",
        "loki 16@4+32@2 1/8 no tail",
        "stream K and V",
        "threads",
    ):
        assert shown in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80


def test_attention_json_file_and_pictures_agree(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (extra 'plots')")
    result = run("bench", "attention", *TINY, "--json", "-o", tmp_path / "a.json", "--plot", tmp_path / "plots")
    assert result.exit_code == 0, result.stderr
    said, saved = json.loads(result.stdout), load_results(tmp_path / "a.json")
    assert [row["value"] for row in said["results"]] == [row.value for row in saved.results]
    assert {row.config["tokens"] for row in saved.results} == {256, 1024}
    assert said["environment"]["commit"] == saved.environment.commit
    assert said["figures"] == [str(tmp_path / "plots" / "attention_4-2-64_batch1_random.png")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())


def test_break_even_is_shown_and_kept(tmp_path):
    args = [
        "bench",
        "break-even",
        "--shape",
        "4/2/64",
        "--tokens",
        "25%",
        "--plot",
        tmp_path,
        "-o",
        tmp_path / "b.json",
    ]
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (extra 'plots')")
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    assert "loki's step is faster from" in result.stdout
    assert (tmp_path / "cache" / "loki-attention" / "break-even.json").exists()
    assert (tmp_path / "break_even.png").exists()
    first = load_results(tmp_path / "b.json").results
    assert [row.metric for row in first] == ["break_even"] + ["decode_step_time"] * 6
    again = json.loads(run(*args[:6], "--json").stdout)
    assert [row["value"] for row in again["results"]] == [row.value for row in first]


def test_generate_compares_every_variant(tmp_path):
    args = ["bench", "generate", "--quick", "--lengths", "256", "--new-tokens", "2", "-o", tmp_path / "g.json"]
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    for shown in ("transformers", "dense, our cache", "loki, break-even", "tokens/s"):
        assert shown in result.stdout
    assert len(load_results(tmp_path / "g.json").results) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["attention", "--shapes", "32/8"], "write it like 32/8/128"),
        (["attention", "--lengths", "many"], "'many' is no whole number"),
        (["attention", "--fractions", "0.1"], "write 1/8"),
        (["attention", "--quick", "--selections", "real"], "unknown selection 'real'"),
        (["attention", "--quick", "--planes", "16@5"], "outside the grammar"),
        (["attention", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["break-even", "--planes", "16@5"], "outside the grammar"),
        (["break-even", "--batch", "0"], "batch must be"),
        (["generate", "--tokens", "lots"], "neither a percentage nor a token count"),
    ],
)
def test_mistakes_are_one_line(args, message):
    assert message in error_line(run("bench", *args))
