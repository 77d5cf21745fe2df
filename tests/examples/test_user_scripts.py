"""The short examples run as they are and print the right answers; one basis serves them all."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import assisted
import batch
import chat
import pipeline
from loki_attention import Budget, KeyBasis, Planes
from loki_attention.calibration.checkpoint import Checkpoint
from loki_attention.calibration.collect import collect
from loki_attention.core.candidates import build
from loki_attention.core.spec import ModelSpec
from loki_attention.data import sample_texts

SPARSE_LAYERS = 3


@pytest.fixture(scope="module")
def basis_folder(reference_model, reference_tokenizer, tmp_path_factory) -> str:
    """A basis of the bundled model without the comparisons of ``calibrate``, which take most of its time."""
    text = sample_texts()[0].read_text(encoding="utf-8")
    ids = reference_tokenizer(text, return_tensors="pt").input_ids[:, : 6 * 512]
    moments = collect(reference_model, ids.split(512, dim=1), Checkpoint(None, ""))
    basis = KeyBasis(
        spec=ModelSpec.of(reference_model),
        layers={index: build("balanced", layer) for index, layer in moments.items()},
        planes=Planes.default(64),
        budget=Budget(fraction=1 / 8),
        tail="linear",
    )
    return str(basis.save(tmp_path_factory.mktemp("examples") / "basis"))


def sparse_steps(printed: str) -> list[int]:
    """What the reports say of each sparse layer."""
    return [int(steps) for steps in re.findall(r"^ +\d+  sparse +(\d+)", printed, re.MULTILINE)]


def test_pipeline(basis_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.main(basis_folder)
    printed = capsys.readouterr().out
    assert "The magic number for lantern is 48213." in printed
    assert sparse_steps(printed) == [6] * SPARSE_LAYERS


def test_chat(basis_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat.main(basis_folder)
    printed = capsys.readouterr().out
    assert re.findall(r"number for (\w+) is: (\d+)\.", printed) == [
        ("lantern", "48213"),
        ("violin", "70956"),
        ("lantern", "48213"),
    ]
    cached = [int(tokens) for tokens in re.findall(r"(\d+) tokens cached", printed)]
    assert cached == sorted(cached)
    assert sparse_steps(printed) == [3 * 6] * SPARSE_LAYERS


def test_batch(basis_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    batch.main(basis_folder)
    printed = capsys.readouterr().out
    answers = re.findall(r"in +(\d+) tokens: (\d+) is answered (\d+)\.", printed)
    assert [asked for _, asked, _ in answers] == [given for _, _, given in answers]
    assert len({tokens for tokens, _, _ in answers}) == len(answers) == len(batch.NAMES)
    assert sparse_steps(printed) == [6] * SPARSE_LAYERS


def test_assisted(basis_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps without a draft are sparse, those that check one dense, and both ways end in the same text."""
    assisted.main(basis_folder)
    printed = capsys.readouterr().out
    steps = re.findall(r"32 tokens in (\d+) steps: the prompt, (\d+) checks of a draft, (\d+) sparse steps", printed)
    assert len(steps) == 2
    for whole, checks, sparse in (map(int, counts) for counts in steps):
        assert whole == 1 + checks + sparse < 33
        assert checks > 0
    assert sparse_steps(printed) == [int(sparse) for _, _, sparse in steps for _ in range(SPARSE_LAYERS)]
    assert int(steps[0][2]) > 0


@pytest.mark.slow
def test_without_a_basis_a_script_calibrates_and_keeps_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline.py", str(tmp_path / "kept")])
    runpy.run_path(pipeline.__file__, run_name="__main__")
    assert "is 48213." in capsys.readouterr().out
    assert (tmp_path / "kept" / "manifest.json").is_file()
