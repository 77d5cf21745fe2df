"""Two processes: a model split over them answers as the whole one does; text shared out gives the same basis."""

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import two_processes
from loki_attention import KeyBasis, LokiWarning, calibrate
from loki_attention.calibration import collect as collect_module
from loki_attention.calibration.checkpoint import Checkpoint
from loki_attention.core.spec import ModelSpec
from loki_attention.errors import ModelError
from loki_attention.integrations.huggingface.parallel import local_heads
from models import VOCABULARY, tiny_basis, tiny_model
from two_processes import CALIBRATION, CASES

LOCAL = ("llama", "qwen3")
GATHERED = ("phi3",)
"""Families whose plan gathers queries and keys before attention: every process sees all heads."""
FILES = ("basis.safetensors", "moments.safetensors", "manifest.json")
Answers = list[dict[str, Any]]


@cache
def even_model(family: str) -> tuple[PreTrainedModel, KeyBasis]:
    """A tiny model with a vocabulary that two processes can halve, as transformers 5.17 needs, and its basis."""
    model = copy.deepcopy(tiny_model(family))
    model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    return model, replace(tiny_basis(family), spec=ModelSpec.of(model))


def run_on_two(job: str, folder: Path) -> Answers:
    """The answers of both processes, which must end well."""
    script = Path(two_processes.__file__)
    environment = {**os.environ, "PYTHONPATH": str(script.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), job, str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"answer-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("split")
    for family in (*LOCAL, *GATHERED):
        model, basis = even_model(family)
        model.save_pretrained(folder / f"model-{family}")
        basis.save(folder / f"model-{family}" / "basis")
    return run_on_two("tensor_parallel", folder)


@cache
def whole_answers(family: str) -> dict[str, dict[str, Any]]:
    """The answers of one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LokiWarning)
        return two_processes.run_cases(*even_model(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", [*LOCAL, *GATHERED])
def test_a_split_model_answers_as_the_whole_one(family: str, split: Answers) -> None:
    whole = whole_answers(family)
    dense, _ = two_processes.generate(even_model(family)[0])
    assert min(len(set(row.tolist())) for row in dense) >= 8, "the model repeats itself: equality would show nothing"
    for name in CASES:
        alone, both = whole[name], [answers[f"model-{family}"][name] for answers in split]
        assert (alone["sparse_steps"] > 0) == (name != "whole")
        for ours in both:
            assert ours["sparse_steps"] == alone["sparse_steps"]
            assert torch.equal(ours["tokens"], alone["tokens"])
            torch.testing.assert_close(ours["logits"], alone["logits"], rtol=0, atol=1e-9)
    assert torch.equal(whole["whole"]["tokens"], dense)
    assert not torch.equal(whole["linear"]["logits"], whole["no tail"]["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("family", LOCAL)
def test_each_process_selects_reads_and_keeps_for_its_own_heads(family: str, split: Answers) -> None:
    whole = whole_answers(family)
    for name in CASES:
        if name == "whole":
            continue
        alone, both = whole[name], [answers[f"model-{family}"][name] for answers in split]
        assert set(alone["trace"]) == set(both[0]["trace"]) == set(both[1]["trace"]) != set()
        for layer, slots in alone["trace"].items():
            parts = [ours["trace"][layer] for ours in both]
            assert torch.equal(torch.cat(parts, dim=1), slots)
            assert not torch.equal(*parts), "both processes select the same slots: this would show nothing"
        for figure in ("bytes_read", "memory"):
            # The tail counts its tokens once a layer, not once a head.
            assert sum(ours[figure] for ours in both) == pytest.approx(alone[figure], rel=1e-3)


@pytest.mark.slow
def test_where_a_plan_gathers_heads_each_process_does_all(split: Answers) -> None:
    for family in GATHERED:
        first, second = (answers[f"model-{family}"]["linear"] for answers in split)
        assert all(slots.shape[1] == 2 for slots in first["trace"].values())
        assert all(torch.equal(slots, second["trace"][layer]) for layer, slots in first["trace"].items())


@pytest.mark.slow
def test_a_split_model_is_not_calibrated(split: Answers) -> None:
    for answers in split:
        assert answers["refusal"].startswith("ModelError: this model is split over processes")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Killed(Exception):
    pass


def kill_after(windows: int, model: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the checkpoint of one process that did so many windows."""
    real = Checkpoint.save_moments

    def save(self: Checkpoint, done: int, moments: Any) -> None:
        real(self, done, moments)
        if done == windows:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(collect_module, "_SECONDS_BETWEEN_SAVES", 0.0)
        patch.setattr(Checkpoint, "save_moments", save)
        calibrate(model, checkpoint=folder, **CALIBRATION)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_text_shared_out_gives_the_basis_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    model = two_processes.load(tmp_path / "model")
    with two_processes.counted(model) as lengths:
        calibrate(model, **CALIBRATION).save(tmp_path / "alone")
    kill_after(3, model, tmp_path / "killed", monkeypatch)
    first, second = run_on_two("calibration", tmp_path)
    for name in ("basis-0", "basis-1", "resumed-0", "resumed-1"):
        for file in FILES:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), (name, file)
    assert first["forwards"] + second["forwards"] == len(lengths)
    assert 0 < second["forwards"] < first["forwards"] < 0.7 * len(lengths), "the text is not shared out"
    assert first["resumed"] + second["resumed"] == len(lengths) - 3
    assert "moments" in first["drawn"] and "Expected loss" in first["drawn"]
    assert second["drawn"] == ""
    assert not (tmp_path / "killed").exists()
    for answers in (first, second):
        assert answers["refusal"].startswith("ArgumentError: the processes of this run were given different")


class Mesh:
    """A mesh of one axis, or with a ``tp`` axis among two, as a rank sees it."""

    def __init__(self, rank: int, size: int, ndim: int = 1) -> None:
        self._rank, self._size, self.ndim = rank, size, ndim

    def __getitem__(self, name: str) -> "Mesh":
        assert (self.ndim, name) == (2, "tp")
        return Mesh(self._rank, self._size)

    def size(self) -> int:
        assert self.ndim == 1
        return self._size

    def get_local_rank(self) -> int:
        return self._rank


def attention_on(mesh: Mesh | None) -> nn.Module:
    weights = [SimpleNamespace(), SimpleNamespace(device_mesh=mesh)]
    module = nn.Module()
    module.__dict__["parameters"] = lambda: iter(weights)
    return module


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("rank", range(4))
def test_local_heads_are_consecutive_shares(rank: int, ndim: int) -> None:
    attention = attention_on(Mesh(rank, 4, ndim))
    assert local_heads(attention, 8, seen=2) == slice(2 * rank, 2 * rank + 2)
    assert local_heads(attention, 8, seen=8) == slice(0, 8)


def test_heads_of_an_unknown_share_are_refused() -> None:
    for mesh in (Mesh(0, 4), None):
        with pytest.raises(ModelError, match="sees 3 key heads of 8"):
            local_heads(attention_on(mesh), 8, seen=3)
