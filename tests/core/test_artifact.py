"""The basis folder through ``KeyBasis.save`` and ``load``: same bytes, all or nothing, every refusal."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from helpers import FakeModel, random_basis, random_moments
from key_bases import LAYERS, SHAPE, assert_same, make_basis
from loki_attention.core import artifact
from loki_attention.core.basis import KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.core.candidates import CANDIDATES, TENSOR_FIELDS
from loki_attention.errors import ArtifactError

FILES = ("basis.safetensors", "manifest.json", "moments.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def resign(folder: Path, **changes: Any) -> None:
    """Change the manifest and sign it again, as a program of another version would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("manifest_sha256")
    manifest.update(changes)
    manifest["manifest_sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a saved basis."""
    return make_basis().save(tmp_path / "basis")


def test_round_trip(saved: Path) -> None:
    loaded = KeyBasis.load(saved, FakeModel())
    assert_same(loaded, make_basis())
    assert loaded.moments is not None
    for i in LAYERS:
        ours, theirs = loaded.moments[i], random_moments(SHAPE, seed=i)
        for name in ("pre_keys", "post_keys", "queries"):
            part, other = getattr(ours, name), getattr(theirs, name)
            assert part.count == other.count
            assert torch.equal(part.total, other.total)
            assert torch.equal(part.outer, other.outer)


def test_round_trip_of_text_paths_tokens_and_a_mix_of_candidates(tmp_path: Path) -> None:
    by = {name: random_basis(SHAPE, name) for name in CANDIDATES}
    mixed = {i: by["balanced"].pick(by, ("pca-pre", "balanced")) for i in LAYERS}
    basis = make_basis(layers=mixed, budget=Budget(tokens=128), tail="none", dense_layers=())
    loaded = KeyBasis.load(str(basis.save(str(tmp_path / "deep" / "er"))))
    assert loaded.candidate == "per-head"
    assert_same(loaded, basis)


def test_saves_are_byte_identical(saved: Path, tmp_path: Path) -> None:
    again = make_basis(layers={i: random_basis(SHAPE, "balanced", seed=i) for i in reversed(LAYERS)})
    assert contents(again.save(tmp_path / "again")) == contents(saved)
    assert tuple(contents(saved)) == FILES


def test_a_loaded_basis_saves_to_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    assert contents(KeyBasis.load(saved).save(tmp_path / "again")) == contents(saved)


def test_saving_replaces_an_older_basis_and_leaves_nothing_else(saved: Path) -> None:
    make_basis(tail="mean", moments=None).save(saved)
    assert KeyBasis.load(saved).tail == "mean"
    assert tuple(contents(saved)) == FILES[:2]
    assert [entry.name for entry in saved.parent.iterdir()] == ["basis"]


def test_saving_into_an_empty_folder(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert_same(KeyBasis.load(make_basis().save(folder)), make_basis())


def fail(*_: object, **__: object) -> NoReturn:
    raise OSError("no space left on device")


def fail_on(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Make one step of saving fail."""
    if what == "rename":
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda self, target: fail() if "partial" in self.name else rename(self, target)
        )
    elif what == "manifest":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(artifact, what, fail)


@pytest.mark.parametrize("what", ["save_file", "save_moments", "manifest", "rename"])
def test_a_failed_save_keeps_the_older_basis(saved: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    before = contents(saved)
    with monkeypatch.context() as patch:
        fail_on(patch, what)
        with pytest.raises(OSError, match="no space left"):
            make_basis(tail="mean").save(saved)
    assert contents(saved) == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["basis"]
    assert_same(KeyBasis.load(saved), make_basis())


@pytest.mark.parametrize("what", ["save_file", "rename"])
def test_a_failed_first_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    with monkeypatch.context() as patch:
        fail_on(patch, what)
        with pytest.raises(OSError, match="no space left"):
            make_basis().save(tmp_path / "basis")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_else_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "thesis"
    inside = target if kind == "file" else target / "chapter.txt"
    inside.parent.mkdir(exist_ok=True)
    inside.write_text("years of work")
    with pytest.raises(ArtifactError, match="thesis exists and is not a basis; name another folder"):
        make_basis().save(target)
    assert inside.read_text() == "years of work"


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no basis at .*nowhere: there is no such folder"):
        KeyBasis.load(tmp_path / "nowhere")


def test_a_folder_that_is_no_artefact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is not a basis: it holds no manifest\.json"):
        KeyBasis.load(tmp_path)


def test_a_file_that_is_no_artefact(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a basis"):
        KeyBasis.load(saved / "manifest.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"3", b'{"planes": "8@4"}', b"\xff\xfe\x00"])
def test_a_manifest_that_is_none(saved: Path, content: bytes) -> None:
    (saved / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged: it is not a manifest"):
        KeyBasis.load(saved)


@pytest.mark.parametrize("version", [2, 99, "1.0"])
def test_a_newer_format(saved: Path, version: object) -> None:
    resign(saved, format_version=version, wonders="yet to come")
    with pytest.raises(ArtifactError, match=f"has basis format {version}, this version reads up to 1; upgrade"):
        KeyBasis.load(saved)


@pytest.mark.parametrize("file", ["basis.safetensors", "moments.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "tampered"])
def test_a_damaged_tensor_file(saved: Path, file: str, damage: str) -> None:
    data = bytearray((saved / file).read_bytes())
    if damage == "truncated":
        data = data[:-100]
    else:
        data[-1] ^= 1
    (saved / file).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{file} is missing, truncated or was changed"):
        KeyBasis.load(saved)


def test_a_missing_basis_file(saved: Path) -> None:
    (saved / "basis.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"basis\.safetensors is missing"):
        KeyBasis.load(saved)


def test_a_tensor_file_of_another_kind(saved: Path) -> None:
    (saved / "basis.safetensors").write_bytes(b"not tensors")
    digest = hashlib.sha256(b"not tensors").hexdigest()
    resign(saved, files={"basis.safetensors": digest})
    with pytest.raises(ArtifactError, match="is not a safetensors file"):
        KeyBasis.load(saved)


@pytest.mark.parametrize(
    ("old", "new"), [('"8@4"', '"16@4"'), ('"tail": "linear"', '"tail": "mean"'), ("2048", "4096")]
)
def test_a_tampered_manifest(saved: Path, old: str, new: str) -> None:
    file = saved / "manifest.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ArtifactError, match=r"manifest\.json was changed after it was written"):
        KeyBasis.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", TENSOR_FIELDS)
def test_values_that_are_not_finite(tmp_path: Path, field: str, value: float) -> None:
    """Saved by ourselves, so that every hash is right."""
    broken = getattr(random_basis(SHAPE), field).clone()
    broken.view(-1)[3] = value
    layers = {**make_basis().layers, 1: dataclasses.replace(random_basis(SHAPE), **{field: broken})}
    folder = make_basis(layers=layers).save(tmp_path / "basis")
    with pytest.raises(ArtifactError, match=rf"not finite \(in 1\.{field}\)"):
        KeyBasis.load(folder)


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write a basis to"):
        make_basis().save(tmp_path / "file" / "basis")
