"""``calibrate``: a model and text in, a ``KeyBasis`` out."""

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loki_attention.calibration.checkpoint import Checkpoint
from loki_attention.calibration.collect import collect
from loki_attention.calibration.corpus import Windows, windows_from_files, windows_from_ids, windows_from_texts
from loki_attention.calibration.fit import Fitting, fit
from loki_attention.calibration.ranks import all_ranks
from loki_attention.calibration.summary import expected_loss
from loki_attention.core.basis import KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.core.candidates import CANDIDATES
from loki_attention.core.planes import Planes
from loki_attention.core.spec import ModelSpec
from loki_attention.core.tail import check_tail
from loki_attention.errors import ArgumentError, LokiWarning, unknown_name
from loki_attention.integrations.huggingface.families import attention_modules
from loki_attention.integrations.huggingface.parallel import check_whole

_LONGEST_DEFAULT = 8192


def calibrate(
    model: Any,
    tokenizer: Any = None,
    texts: Iterable[str] | Sequence[Path] | Path | None = None,
    *,
    token_ids: Iterable[Any] | None = None,
    length: int | None = None,
    planes: Any = None,
    budget: Any = None,
    candidate: str | None = None,
    tail: str | None = None,
    fit_tokens: int = 131072,
    held_out_tokens: int = 16384,
    field: str = "text",
    seed: int = 0,
    dense_if_mass_below: float | int = 0.5,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> KeyBasis:
    """The low-rank key basis of ``model`` from one pass over text, chosen on held-out windows.

    Text is ``texts`` (strings, or ``Path`` objects of files and folders) with a ``tokenizer``, or ``token_ids``
    (LongTensors (B, S) whose rows are windows as given, the last quarter held out). ``length`` defaults to the
    model's maximum, at most 8192: calibrate at the length that will be served. ``planes`` (text or ``Planes``) default
    to ``Planes.default(head_dim)``, ``budget`` (a ``Budget``) to an eighth of the tokens. ``candidate`` and ``tail``
    force one instead of comparing. A layer whose best candidate keeps less than ``dense_if_mass_below`` of exact top-k's
    attention mass is marked dense, with a warning. With a ``checkpoint`` folder a killed run goes on where it was, to
    the identical result; the folder is removed at the end. ``progress`` draws bars and the expected loss on standard
    error.
    Where ``torch.distributed`` is initialised, all processes call this with the same arguments, each with a whole
    model: they share the windows out and all return the basis that one process would (``docs/distributed.md``).

    Raises a ``LokiError`` kind for an unsupported model, unusable text or a bad argument.
    """
    modules = attention_modules(model)
    check_whole(model)
    spec = ModelSpec.of(model)
    budget = Budget(fraction=1 / 8) if budget is None else Budget.checked(budget)
    chosen_planes = _checked_planes(planes, spec.head_dim)
    _check_choices(candidate, tail, dense_if_mass_below)
    length = _checked_length(length, spec.max_length)
    windows = _windows(
        tokenizer,
        texts,
        token_ids,
        length=length,
        vocab_size=spec.vocabulary,
        field=field,
        limits={"fit_tokens": fit_tokens, "held_out_tokens": held_out_tokens, "seed": seed},
    )
    for note in windows.notes:
        warnings.warn(note, LokiWarning, stacklevel=2)
    key = hashlib.sha256(repr((spec.to_dict(), sorted(modules), windows.fingerprint)).encode()).hexdigest()
    with all_ranks() as ranks:
        ranks.check_same((key, chosen_planes, budget, candidate, tail, dense_if_mass_below))
        kept = Checkpoint(None if checkpoint is None else Path(checkpoint), key, ranks)
        show = progress and ranks.first
        fitting = Fitting(
            model=model,
            spec=spec,
            moments=collect(model, windows.fit, kept, show=show),
            held_out=windows.held_out,
            planes=chosen_planes,
            budget=budget,
            checkpoint=kept,
            show=show,
        )
        basis = fit(fitting, candidate=candidate, tail=tail, dense_if_mass_below=dense_if_mass_below)
        kept.remove()
    basis = replace(basis, record={**_text_record(windows, seed), **basis.record})
    if show:
        expected_loss(basis)
    return basis


def _windows(
    tokenizer: Any, texts: Any, token_ids: Any, *, length: int, vocab_size: int, field: str, limits: dict[str, int]
) -> Windows:
    if (texts is None) == (token_ids is None):
        got = "neither" if texts is None else "both"
        raise ArgumentError(f"calibration needs one of texts (with a tokenizer) and token_ids, got {got}; give one")
    if token_ids is not None:
        return windows_from_ids(token_ids, length=length, vocab_size=vocab_size)
    if tokenizer is None:
        raise ArgumentError("texts need a tokenizer, got none; give the model's, or token_ids instead")
    paths: Any = [texts] if isinstance(texts, Path) else texts
    if isinstance(paths, list | tuple) and paths and all(isinstance(item, Path) for item in paths):
        return windows_from_files(paths, tokenizer, length=length, field=field, **limits)
    return windows_from_texts(paths, tokenizer, length=length, **limits)


def _text_record(windows: Windows, seed: int) -> dict[str, Any]:
    return {
        "length": windows.length,
        "fit_tokens": windows.fit_tokens,
        "held_out_tokens": windows.held_out_tokens,
        "sources": [{"name": source.name, "tokens": source.tokens} for source in windows.sources],
        "windows": windows.fingerprint,
        "seed": seed,
        "notes": list(windows.notes),
    }


def _checked_length(length: int | None, longest: int) -> int:
    if length is None:
        return min(longest, _LONGEST_DEFAULT)
    if isinstance(length, bool) or not isinstance(length, int) or not 2 <= length <= longest:
        raise ArgumentError(
            f"length must be a whole number of tokens from 2 to the model's maximum {longest}; got {length!r}"
        )
    return length


def _checked_planes(planes: Any, head_dim: int) -> Planes:
    chosen = Planes.default(head_dim) if planes is None else Planes.of(planes)
    chosen.check_fits(head_dim)
    return chosen


def _check_choices(candidate: str | None, tail: str | None, dense_if_mass_below: float | int) -> None:
    if candidate is not None and candidate not in CANDIDATES:
        raise unknown_name("candidate", candidate, CANDIDATES)
    if tail is not None:
        check_tail(tail)
    if not isinstance(dense_if_mass_below, float | int) or not 0 <= dense_if_mass_below <= 1:
        raise ArgumentError(f"dense_if_mass_below must be a number from 0 to 1; got {dense_if_mass_below!r}")
