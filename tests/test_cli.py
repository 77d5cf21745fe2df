"""The command ``loki`` as a user meets it: help, one clear line for every mistake, JSON, and the round trip."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from command_line import CALIBRATION, error_line, run, write_model
from loki_attention import Budget, KeyBasis, attach
from loki_attention.cli import demo
from loki_attention.data import haystack_text, reference_model_path, sample_texts
from loki_attention.evaluation.answers import Answer
from models import tiny_basis

COMMANDS = {
    "demo": ["--output", "--json"],
    "calibrate": ["--text", "--output", "--length", "--planes", "--budget", "--candidate", "--tail", "--json"],
    "info": ["--planes", "--context", "--basis", "--json"],
    "inspect": ["--plot", "--json"],
    "generate": ["--basis", "--prompt-file", "--tokens", "--planes", "--max-new-tokens", "--monitor-every", "--json"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def calibrated(model, tmp_path_factory):
    """The folder of a basis, and what ``loki calibrate --json`` said of it."""
    folder = tmp_path_factory.mktemp("work") / "basis"
    text, more = sample_texts()[:2]
    result = run("calibrate", model, "--text", text, more, "-o", folder, *CALIBRATION, "--json")
    assert result.exit_code == 0, result.stderr
    return folder, result


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    file.write_text(haystack_text().read_text(encoding="utf-8")[:500], encoding="utf-8")
    return file


def test_help_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_its_options_and_examples(command):
    result = run(command, "--help", env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert all(option in result.stdout for option in COMMANDS[command])
    assert f"$ loki {command}" in result.stdout


def test_help_waits_for_no_torch():
    code = "import sys, loki_attention.cli; sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_version_is_printed():
    assert run("--version").stdout.startswith("loki-attention 0.")


@pytest.mark.parametrize("args", [["generate"], ["calibrate", "m"], ["nonsense"], ["inspect", "x", "--wrong"]])
def test_wrong_usage_exits_with_2(args):
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_calibrate_writes_the_basis_that_it_describes(calibrated, model):
    folder, result = calibrated
    basis = KeyBasis.load(folder)
    said = json.loads(result.stdout)
    assert said["candidate"] == basis.candidate
    assert said["planes"] == "8@4"
    assert said["budget"] == {"tokens": 24, "fraction": None, "minimum": 8, "sinks": 2, "recent": 4}
    assert said["record"] == basis.record
    assert set(said["record"]["figures"]["budgets"]) == {"asked", "1/8", "1/16", "1/32"}
    assert len(said["record"]["sources"]) == 2
    assert not folder.with_name("basis.partial").exists()
    assert "Expected loss" in result.stderr


def test_calibrate_replaces_a_basis_only_when_told_to(calibrated, model):
    folder, _ = calibrated
    before = (folder / "manifest.json").read_bytes()
    args = ["calibrate", model, "--text", sample_texts()[0], "-o", folder, *CALIBRATION]
    assert "--overwrite" in error_line(run(*args))
    result = run("calibrate", model, "--text", *sample_texts()[:2], "-o", folder, *CALIBRATION, "--overwrite")
    assert result.exit_code == 0
    assert f"loki inspect {folder}" in result.stdout
    assert (folder / "manifest.json").read_bytes() == before


def test_little_text_is_said_in_one_line(model, tmp_path):
    (tmp_path / "short.txt").write_text(sample_texts()[0].read_text(encoding="utf-8")[:3000], encoding="utf-8")
    result = run("calibrate", model, "--text", tmp_path / "short.txt", "-o", tmp_path / "basis", *CALIBRATION)
    assert result.exit_code == 0
    assert [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert "LokiWarning" not in result.stderr


def test_a_stopped_calibration_says_that_it_goes_on(model, tmp_path, monkeypatch):
    def stop(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("loki_attention.calibration.calibrate.calibrate", stop)
    result = run("calibrate", model, "--text", sample_texts()[0], "-o", tmp_path / "basis", *CALIBRATION)
    assert result.exit_code == 130
    assert str(tmp_path / "basis.partial") in result.stderr


def test_calibrate_takes_lengths_in_thousands(model, tmp_path, monkeypatch):
    asked: dict[str, object] = {}

    def stop(*args, **keywords):
        asked.update(keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr("loki_attention.calibration.calibrate.calibrate", stop)
    calibrate = ["calibrate", model, "--text", sample_texts()[0], "-o", tmp_path / "basis"]
    names = ("length", "fit_tokens", "held_out_tokens")
    run(*calibrate)
    assert [asked[name] for name in names] == [None, 131072, 16384]
    run(*calibrate, "--length", "2K", "--fit-tokens", "32k", "--held-out-tokens", "3000")
    assert [asked[name] for name in names] == [2048, 32768, 3000]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "not/there.txt"], "not/there.txt"),
        (["--budget", "lots"], "'lots' is neither a percentage nor a token count"),
        (["--budget", "0"], "tokens must be"),
        (["--budget", "120%"], "at most 100%; got '120%'"),
        (["--budget", "8", "--recent", "32"], "cannot hold"),
        (["--planes", "16@5"], "outside the grammar"),
        (["--planes", "32@4"], "head dim is 16"),
        (["--candidate", "balance"], "did you mean 'balanced'"),
        (["--tail", "long"], "tail"),
        (["--length", "100000"], "length must be"),
        (["--fit-tokens", "32M"], "'32M' is no whole number"),
        (["--held-out-tokens", "0"], "'0' is no whole number above 0"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--device", "toaster"], "unknown device 'toaster'"),
        (["--dense-if-mass-below", "2"], "dense_if_mass_below"),
    ],
)
def test_calibrate_refuses_in_one_line(model, tmp_path, options, message):
    args = ["calibrate", model, "--text", sample_texts()[0], "-o", tmp_path / "basis", "--dtype", "float32", *options]
    assert message in error_line(run(*args))
    assert not (tmp_path / "basis").exists()


def test_calibrate_keeps_away_from_a_folder_of_something_else(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    result = run("calibrate", model, "--text", sample_texts()[0], "-o", tmp_path, "--overwrite")
    assert "is not a basis" in error_line(result)
    assert (tmp_path / "thesis.tex").exists()


def test_a_model_that_is_not_there_is_named(tmp_path):
    result = run("calibrate", tmp_path / "nothing", "--text", sample_texts()[0], "-o", tmp_path / "basis")
    assert "cannot load" in error_line(result)


def test_weights_that_cannot_be_read_are_said_in_one_line(model, prompt, tmp_path):
    shutil.copytree(model, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = error_line(generate(tmp_path / "broken", prompt, "--method", "dense"))
    assert line.startswith(f"error: cannot load a model from '{tmp_path / 'broken'}': ")


def test_inspect_shows_ranks_mass_choice_and_loss(calibrated):
    result = run("inspect", calibrated[0])
    assert result.exit_code == 0
    for shown in ("before RoPE", "Attention mass kept", "exact-topk", "What calibration compared", "Expected loss"):
        assert shown in result.stdout


def test_inspect_json_has_the_ranks(calibrated):
    said = json.loads(run("inspect", calibrated[0], "--json").stdout)
    assert [(head["layer"], head["kv_head"]) for head in said["ranks"]["heads"]] == [
        (layer, head) for layer in range(3) for head in range(2)
    ]
    assert said["figures"] == []


def test_inspect_of_a_basis_without_moments_and_figures(calibrated, tmp_path):
    bare = KeyBasis.load(calibrated[0]).refit()
    folder = bare.save(tmp_path / "bare")
    (folder / "moments.safetensors").unlink()
    assert "No moments" in run("inspect", folder).stdout
    assert json.loads(run("inspect", folder, "--json").stdout)["ranks"] is None


def test_inspect_plots(calibrated, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (extra 'plots')")
    monkeypatch.setattr("loki_attention.analysis.figures._DOTS_PER_INCH", 40)
    said = json.loads(run("inspect", calibrated[0], "--plot", tmp_path, "--json").stdout)
    assert sorted(said["figures"]) == sorted(str(file) for file in tmp_path.iterdir())
    assert len(said["figures"]) == 5


def test_inspect_draws_in_the_terminal_where_there_is_no_matplotlib(calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr("loki_attention.analysis.figures.can_draw", lambda: False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("inspect", calibrated[0], "--plot", tmp_path)
    assert result.exit_code == 1
    assert "█" in result.stdout
    assert "pip install 'loki-attention[plots]'" in result.stderr


def test_inspect_refuses_what_is_no_basis(tmp_path):
    assert "is not a basis" in error_line(run("inspect", tmp_path))
    assert "not/there" in error_line(run("inspect", "not/there"))


def generate(model, prompt, *options, **keywords):
    args = ["generate", model, "--prompt-file", prompt, "--max-new-tokens", 12, "--dtype", "float32", *options]
    return run(*args, **keywords)


def test_generate_prints_what_the_attached_model_generates(calibrated, model, prompt):
    folder, _ = calibrated
    result = generate(model, prompt, "--basis", folder, "--tokens", "25%", "--tail", "mean")
    assert result.exit_code == 0
    loaded = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    budget = Budget(fraction=0.25, minimum=8, sinks=2, recent=4)
    with attach(loaded, KeyBasis.load(folder), budget=budget, tail="mean"):
        output = loaded.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    new = output[0, ids.shape[1] :]
    assert len(set(new.tolist())) > 4
    assert result.stdout == tokenizer.decode(new, skip_special_tokens=True) + "\n"
    assert "12 new" in result.stderr
    assert "25 % of the tokens" in result.stderr


def test_generate_json_holds_text_and_report(calibrated, model, prompt):
    said = json.loads(generate(model, prompt, "--basis", calibrated[0], "--json").stdout)
    assert said["new_tokens"] == 12
    assert said["report"]["method"] == "loki"
    assert said["report"]["budget"].startswith("24 tokens")
    assert 0 < said["report"]["read_fraction"] < 1
    assert said["text"]


def test_generate_monitors_every_few_steps(calibrated, model, prompt):
    # 12 new tokens are 11 decode steps: every second is checked, on layers 1 and 2 in turn.
    shown = generate(model, prompt, "--basis", calibrated[0], "--monitor-every", 2)
    said = json.loads(generate(model, prompt, "--basis", calibrated[0], "--monitor-every", 2, "--json").stdout)
    monitor = said["report"]["monitor"]
    assert monitor["checks"] == 5
    assert 0 < monitor["mean_mass"] < 1
    assert monitor["lowest_mass"]["layer"] in (1, 2)
    (line,) = (line for line in shown.stderr.splitlines() if line.startswith("monitor: "))
    assert line.startswith(f"monitor: 5 checks; mass kept {monitor['mean_mass']:.1%}")
    assert (
        "no checks, for there were fewer than 50"
        in generate(model, prompt, "--basis", calibrated[0], "--monitor-every", 50).stderr
    )
    assert "monitor_every must be" in error_line(
        generate(model, prompt, "--basis", calibrated[0], "--monitor-every", 0)
    )


def test_generate_reads_standard_input_and_needs_no_basis_for_streaming(model, prompt):
    options = ["--method", "streaming", "--tokens", "40"]
    piped = generate(model, "-", *options, input=prompt.read_text(encoding="utf-8"))
    assert piped.exit_code == 0
    assert piped.stdout == generate(model, prompt, *options).stdout


def test_sampling_repeats_with_its_seed(model, prompt):
    first, again, other = (
        generate(model, prompt, "--method", "dense", "--temperature", "1.5", "--seed", seed).stdout for seed in "001"
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs a basis, got none; give --basis DIR"),
        (["--method", "lokki"], "did you mean 'loki'"),
        (["--basis", "not/there"], "not/there"),
        (["--method", "streaming"], "budget"),
        (["--method", "streaming", "--tokens", "few"], "'few' is neither a percentage nor a token count"),
        (["--method", "streaming", "--tokens", "64", "--tail", "linear"], "has no tail"),
        (["--method", "dense", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--method", "dense", "--temperature", "-1"], "temperature"),
        (["--method", "dense", "--prompt-file", "not/there.txt"], "not/there.txt"),
        (["--method", "dense", "--device", "toaster"], "unknown device 'toaster'"),
    ],
)
def test_generate_refuses_in_one_line(model, prompt, options, message):
    assert message in error_line(generate(model, prompt, *options))


def test_generate_refuses_planes_another_models_basis_and_an_empty_prompt(calibrated, model, prompt, tmp_path):
    folder, _ = calibrated
    assert "outside the grammar" in error_line(generate(model, prompt, "--basis", folder, "--planes", "lots"))
    assert "another model" in error_line(generate(reference_model_path(), prompt, "--basis", folder))
    assert "no tokens" in error_line(generate(model, "-", "--method", "dense", input=""))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in error_line(generate(model, tmp_path / "bytes.txt", "--method", "dense"))


def test_demo_draws_in_the_terminal_where_there_is_no_matplotlib(capsys):
    def answers(right):
        dense = {"tokens_read": 24.0, "tokens_cached": 240.0, "bytes_read": 10.0, "bytes_dense": 100.0}
        return [
            Answer(variant=name, text="12345" if hit else "[/]", right=hit, **({} if name == "dense" else dense))
            for name, hit in zip(demo.METHODS, right, strict=True)
        ]

    hits = ((True, True, True, False), (True, False, False, False))
    asked = [demo._Asked("The pass key for river is", "12345", 2345, answers(right)) for right in hits]
    demo._print(demo._Demo(tiny_basis(), Path("out/basis"), asked, demo._scores(asked)), [])
    shown = capsys.readouterr().out
    for text in ("pass key for river", "2,345 tokens back", "1 of 2 times, from 10.0%", "✗ [/]", "█", "2 of 2"):
        assert text in shown
    assert "pip install 'loki-attention[plots]'" in shown
    assert "loki inspect out/basis" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.slow
def test_demo_finds_what_dense_finds_and_streaming_does_not(tmp_path):
    result = run("demo", "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    scores = {score["variant"]: score for score in said["scores"]}
    assert scores["dense"]["right"] >= 4
    assert scores["loki"]["right"] >= scores["dense"]["right"] - 1
    assert scores["streaming"]["right"] <= 1
    assert scores["loki"]["read_fraction"] < 0.12
    assert {question["tokens_back"] >= 2000 for question in said["questions"]} == {True}
    assert all(Path(picture).stat().st_size > 10_000 for picture in said["figures"])
    assert "warning" not in result.stderr
    assert json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))["scores"] == said["scores"]
    assert KeyBasis.load(tmp_path / "basis").record["length"] == 2048
