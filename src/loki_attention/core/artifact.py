"""The basis folder: safetensors and a JSON manifest, written whole or not at all, checked when read.

``basis.safetensors`` is what is deployed, ``moments.safetensors`` what it was fitted from, ``manifest.json`` all else
with the sha256 of both. No time stamps and no pickle: the same input gives the same bytes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loki_attention.core.moments import LayerMoments, Moments
from loki_attention.errors import ArtifactError

FORMAT_VERSION = 1
BUDGET_FIELDS = ("tokens", "fraction", "minimum", "sinks", "recent")
_MANIFEST, _BASIS, _MOMENTS = "manifest.json", "basis.safetensors", "moments.safetensors"
_MOMENT_FIELDS = ("pre_keys", "post_keys", "queries")


def save(
    path: Path,
    manifest: Mapping[str, Any],
    tensors: Mapping[tuple[int, str], Tensor],
    moments: Mapping[int, LayerMoments] | None,
) -> Path:
    """Write the folder under a temporary name, then rename it to ``path``, which is returned as given.

    Raises ``ArtifactError`` where ``path`` holds something that is not a basis, or cannot be written to.
    """
    given, path = path, path.resolve()
    if path.exists() and not (path / _MANIFEST).is_file() and not _is_empty_folder(path):
        raise ArtifactError(f"{given} exists and is not a basis; name another folder")
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise ArtifactError(f"cannot write a basis to {given}: {error.strerror}; name another folder") from None
    try:
        save_file({f"{layer}.{name}": t.contiguous() for (layer, name), t in tensors.items()}, draft / _BASIS)
        if moments is not None:
            save_moments(draft / _MOMENTS, moments)
        digests = {file.name: _sha256(file) for file in sorted(draft.iterdir())}
        whole = {"format_version": FORMAT_VERSION, "files": digests, **manifest}
        whole["manifest_sha256"] = _digest_of(whole)
        (draft / _MANIFEST).write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for name in digests:
            # safetensors writes files that only their owner can read.
            shutil.copymode(draft / _MANIFEST, draft / name)
        _replace_folder(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return given


def load(path: Path) -> tuple[dict[str, Any], dict[tuple[int, str], Tensor], dict[int, LayerMoments] | None]:
    """The manifest, the basis tensors by (layer, name) and the moments, all checked."""
    manifest = _load_manifest(path)
    files = manifest["files"]
    tensors = _load_tensors(path / _BASIS, files.get(_BASIS))
    named = {}
    for key, tensor in tensors.items():
        layer, name = key.split(".", 1)
        named[int(layer), name] = tensor
    moments = None
    if (path / _MOMENTS).is_file() and _MOMENTS in files:
        moments = moments_from(_load_tensors(path / _MOMENTS, files[_MOMENTS]))
    return manifest, named, moments


def save_moments(path: Path, moments: Mapping[int, LayerMoments]) -> None:
    """Write moments to one safetensors file (not atomic: callers rename)."""
    tensors = {}
    for layer, layer_moments in moments.items():
        for name in _MOMENT_FIELDS:
            part: Moments = getattr(layer_moments, name)
            tensors[f"{layer}.{name}.count"] = torch.tensor(part.count)
            tensors[f"{layer}.{name}.total"] = part.total.clone()
            tensors[f"{layer}.{name}.outer"] = part.outer.clone()
    save_file(tensors, path)


def moments_from(tensors: Mapping[str, Tensor]) -> dict[int, LayerMoments]:
    """The moments that :func:`save_moments` wrote, from the tensors read back."""
    layers = sorted({int(key.split(".")[0]) for key in tensors})

    def part(layer: int, name: str) -> Moments:
        count, total, outer = (tensors[f"{layer}.{name}.{field}"] for field in ("count", "total", "outer"))
        return Moments(int(count), total, outer)

    return {layer: LayerMoments(*(part(layer, name) for name in _MOMENT_FIELDS)) for layer in layers}


def _load_manifest(path: Path) -> dict[str, Any]:
    file = path / _MANIFEST
    if not path.exists():
        raise ArtifactError(f"no basis at {path}: there is no such folder; write one with `loki calibrate`")
    if not file.is_file():
        reason = f"it holds no {_MANIFEST}" if path.is_dir() else "it is a file, a basis is a folder"
        raise ArtifactError(f"{path} is not a basis: {reason}; write one with `loki calibrate`")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{file} is damaged: it is not a manifest; calibrate again") from None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has basis format {version}, this version reads up to {FORMAT_VERSION}; upgrade loki-attention"
        )
    if manifest.pop("manifest_sha256", None) != _digest_of(manifest):
        raise ArtifactError(f"{file} was changed after it was written; calibrate again")
    return manifest


def _load_tensors(file: Path, digest: str | None) -> dict[str, Tensor]:
    if not file.is_file() or digest != _sha256(file):
        raise ArtifactError(f"{file} is missing, truncated or was changed after it was written; calibrate again")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ArtifactError(f"{file} is not a safetensors file ({error}); calibrate again") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{file} holds values that are not finite (in {name}); calibrate again")
    return tensors


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _replace_folder(draft: Path, path: Path) -> None:
    """Rename ``draft`` to ``path``; an older folder steps aside first, goes last, and comes back where that fails."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    try:
        draft.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
