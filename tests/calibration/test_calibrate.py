"""Calibration end to end on tiny models: choice, record, resuming, and every refusal."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from loki_attention import Budget, KeyBasis, LokiError, LokiWarning, calibrate
from loki_attention.calibration import collect as collect_module
from loki_attention.calibration.checkpoint import Checkpoint
from loki_attention.calibration.collect import collect
from loki_attention.core.candidates import CANDIDATES, build
from loki_attention.core.tail import TAILS
from loki_attention.integrations.huggingface.observe import observe
from models import random_ids, tiny_model

BUDGET = Budget(tokens=24, sinks=2, recent=4)
FILES = ("basis.safetensors", "moments.safetensors", "manifest.json")


@pytest.fixture(scope="module")
def basis() -> KeyBasis:
    return calibrate(tiny_model(), token_ids=[random_ids(8, 160, seed=3)], budget=BUDGET, dense_if_mass_below=0)


def test_moments_are_those_of_the_models_own_tensors() -> None:
    model, windows = tiny_model("qwen3"), list(random_ids(3, 80).split(1))
    moments = collect(model, windows, Checkpoint(None, ""))
    layer, attention = 1, model.model.layers[1].self_attn
    pre, post, queries = [], [], []
    hook = attention.k_norm.register_forward_hook(lambda _, args, out: pre.append(out[0].transpose(0, 1)))
    with (
        torch.inference_mode(),
        observe(
            model,
            lambda seen: (
                (post, queries)
                if seen.layer != layer
                else (post.append(seen.keys[0]), queries.append(seen.query[0].reshape(2, -1, 16)))
            ),
        ),
    ):
        for window in windows:
            model(window, use_cache=False)
    hook.remove()
    for part, vectors in (("pre_keys", pre), ("post_keys", post), ("queries", queries)):
        ours, whole = getattr(moments[layer], part), torch.cat(vectors, dim=1)
        assert ours.count == whole.shape[1]
        torch.testing.assert_close(ours.mean, whole.mean(1))
        torch.testing.assert_close(ours.second_moment, whole.mT @ whole / whole.shape[1])
    assert moments[layer].queries.count == 2 * moments[layer].post_keys.count == 2 * 240
    assert (moments[layer].pre_keys.mean - moments[layer].post_keys.mean).abs().max() > 1e-3


def test_every_figure_goes_into_the_record(basis: KeyBasis) -> None:
    record = basis.record
    assert record["length"] == 160, "the longest row: what the basis has seen"
    assert record["fit_tokens"] == 6 * 160
    assert record["held_out_tokens"] == 2 * 160
    figures = record["figures"]
    assert set(figures["mass"]) == {"0", "1", "2"}
    assert all(set(by) == {*CANDIDATES, "exact-topk"} for by in figures["mass"].values())
    assert set(CANDIDATES) <= set(figures["candidates"]) <= {*CANDIDATES, "per-head"}
    assert set(figures["tails"]) == set(TAILS)
    assert set(figures["budgets"]) == {"asked", "1/8", "1/16", "1/32"}
    assert set(figures["budgets"]["1/8"]) == {"loki", "exact-topk"}
    best = min(figures["candidates"], key=lambda name: figures["candidates"][name]["kl"])
    assert basis.candidate == best
    assert basis.tail == min(figures["tails"], key=lambda name: figures["tails"][name]["kl"])
    assert figures["tails"]["none"] == figures["candidates"][best]
    assert figures["budgets"]["asked"]["loki"] == figures["tails"][basis.tail]
    assert figures["candidates"][best]["kl"] > 0


def test_kept_mass_lies_between_nothing_and_exact(basis: KeyBasis) -> None:
    for by in basis.record["figures"]["mass"].values():
        exact = torch.tensor(by["exact-topk"])
        assert (exact <= 1 + 1e-9).all()
        for name in CANDIDATES:
            assert (torch.tensor(by[name]) > 0).all()
            # Sets are chosen for the group by a tempered maximum, not for the mean mass: a little more is possible.
            assert (torch.tensor(by[name]) <= 1.05 * exact).all()


def test_per_head_pick_takes_the_best_mass(basis: KeyBasis) -> None:
    from loki_attention.calibration.fit import _best_per_head

    best, _ = _best_per_head(basis.record["figures"]["mass"], 0.0)
    for layer, names in best.items():
        by = basis.record["figures"]["mass"][str(layer)]
        for head, name in enumerate(names):
            assert by[name][head] == max(by[other][head] for other in CANDIDATES)
    moments = basis.moments
    assert moments is not None
    built = {name: build(name, moments[0]) for name in CANDIDATES}
    mixed = built["balanced"].pick(built, ("pca-post", "balanced"))
    assert torch.equal(mixed.key_map[0], built["pca-post"].key_map[0])
    assert torch.equal(mixed.query_map[1], built["balanced"].query_map[1])


@pytest.mark.parametrize(("candidate", "tail"), [("pca-pre", "mean"), ("pca-post", "none")])
def test_forced_candidate_and_tail_are_not_compared(candidate: str, tail: str) -> None:
    basis = calibrate(
        tiny_model(),
        token_ids=[random_ids(4, 128, seed=3)],
        budget=BUDGET,
        candidate=candidate,
        tail=tail,
        dense_if_mass_below=0,
    )
    assert (basis.candidate, basis.tail) == (candidate, tail)
    assert set(basis.record["figures"]["candidates"]) == {candidate}
    assert set(basis.record["figures"]["tails"]) == {tail}


def test_a_layer_that_keeps_too_little_mass_is_marked_dense_and_named() -> None:
    with pytest.warns(LokiWarning, match=r"layer \d stays dense: its best basis keeps 0\.\d+ .* exact top-k keeps"):
        basis = calibrate(
            tiny_model(),
            token_ids=[random_ids(4, 160, seed=3)],
            budget=BUDGET,
            planes="8@4",
            dense_if_mass_below=1.0,
        )
    assert basis.dense_layers


def test_windows_shorter_than_the_budget_are_told() -> None:
    with pytest.warns(LokiWarning, match="nothing could be compared end to end"):
        basis = calibrate(tiny_model(), token_ids=[random_ids(4, 40)], budget=Budget(tokens=64), dense_if_mass_below=0)
    assert (basis.candidate, basis.tail) == ("balanced", "linear")
    assert basis.record["figures"]["budgets"] == {}


class Killed(Exception):
    pass


def test_a_killed_run_resumes_to_the_identical_basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [random_ids(8, 160, seed=3)]
    settings = {"token_ids": ids, "budget": BUDGET, "dense_if_mass_below": 0.0}
    calibrate(tiny_model(), **settings).save(tmp_path / "undisturbed")
    checkpoint = tmp_path / "run.partial"
    done = []

    def killing(real, after: int):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            done.append(1)
            if len(done) > after:
                raise Killed
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(collect_module, "_SECONDS_BETWEEN_SAVES", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoint, "save_moments", killing(Checkpoint.save_moments, 3))
        calibrate(tiny_model(), checkpoint=checkpoint, **settings)
    assert list(checkpoint.glob("moments-3.safetensors"))
    done.clear()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        from loki_attention.calibration import fit

        patch.setattr(fit, "compare_window", killing(fit.compare_window, 3))
        calibrate(tiny_model(), checkpoint=checkpoint, **settings)
    assert list(checkpoint.glob("*.json"))
    calibrate(tiny_model(), checkpoint=checkpoint, **settings).save(tmp_path / "resumed")
    assert not checkpoint.exists()
    for name in FILES:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_checkpoint_of_another_run_starts_afresh_and_other_folders_are_refused(tmp_path: Path) -> None:
    partial = tmp_path / "partial"

    def figures(key: str, settings: int, answer: int) -> list[int]:
        return list(Checkpoint(partial, key).once_each("figure", settings, lambda item: item + answer, [10, 20]))

    assert figures("one", 0, 1) == [11, 21]
    assert figures("one", 0, 2) == [11, 21]
    assert figures("one", 1, 3) == [13, 23]
    assert figures("two", 0, 2) == [12, 22]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(LokiError, match="not a calibration in progress"):
        Checkpoint(tmp_path / "photos", "one")


def test_refit_needs_no_text(basis: KeyBasis, tmp_path: Path) -> None:
    basis.save(tmp_path / "basis")
    loaded = KeyBasis.load(tmp_path / "basis", model=tiny_model())
    other = loaded.refit(candidate="pca-post", planes="16@2", budget=Budget(tokens=40))
    assert (other.candidate, str(other.planes), other.budget) == ("pca-post", "16@2", Budget(tokens=40))
    assert "figures" not in other.record
    moments = basis.moments
    assert moments is not None
    for layer, its_moments in moments.items():
        assert torch.equal(other.layers[layer].key_map, build("pca-post", its_moments).key_map)


def tokenize_letters(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) % 211 for letter in text]}


REFUSALS = {
    "nothing": ({}, "needs one of texts .* got neither"),
    "both": ({"texts": ["a"], "token_ids": [torch.zeros(1, 4)]}, "needs one of texts .* got both"),
    "no tokenizer": ({"texts": ["a"]}, "need a tokenizer"),
    "empty": ({"token_ids": []}, "token_ids is empty"),
    "one window": ({"token_ids": [random_ids(1, 100)]}, "two windows"),
    "too few tokens": ({"token_ids": [random_ids(2, 10)]}, "64 tokens"),
    "ids": ({"token_ids": [random_ids(4, 100) + 1000]}, "vocabulary"),
    "candidate": ({"token_ids": [random_ids(4, 100)], "candidate": "pca"}, "unknown candidate 'pca'"),
    "tail": ({"token_ids": [random_ids(4, 100)], "tail": "square"}, "unknown tail"),
    "planes": ({"token_ids": [random_ids(4, 100)], "planes": "32@4"}, "32 dims but the head dim is 16"),
    "length": ({"token_ids": [random_ids(4, 100)], "length": 1 << 20}, "model's maximum 2048"),
    "mass": ({"token_ids": [random_ids(4, 100)], "dense_if_mass_below": 2}, "from 0 to 1"),
    "missing path": ({"texts": [Path("no/such/file.txt")], "tokenizer": tokenize_letters}, "no/such/file.txt"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    arguments, sentence = REFUSALS[name]
    with pytest.raises(LokiError, match=sentence), warnings.catch_warnings():
        warnings.simplefilter("ignore", LokiWarning)
        calibrate(tiny_model(), **arguments)


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
from loki_attention import calibrate
from loki_attention.data import reference_model_path
from loki_attention.calibration import collect
collect._SECONDS_BETWEEN_SAVES = 0.0
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(reference_model_path(), dtype=torch.float32).eval()
ids = torch.randint(3, 2048, (24, 512), generator=torch.Generator().manual_seed(0))
print("ready", flush=True)
calibrate(model, token_ids=[ids], checkpoint=sys.argv[2] if len(sys.argv) > 2 else None).save(sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_killed_half_way_resumes_to_the_identical_basis(tmp_path: Path) -> None:
    """SIGKILL, as a machine that goes down would: the next run gives the same bytes."""
    script, partial = tmp_path / "run.py", tmp_path / "run.partial"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", str(script)]
    subprocess.run([*command, str(tmp_path / "undisturbed")], check=True)
    process = subprocess.Popen([*command, str(tmp_path / "resumed"), str(partial)])
    while not list(partial.glob("moments-9.safetensors")):
        assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "resumed").exists()
    subprocess.run([*command, str(tmp_path / "resumed"), str(partial)], check=True)
    for name in FILES:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
