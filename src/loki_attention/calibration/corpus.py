"""Calibration text, from files, strings or token ids, to token windows.

Knows suffixes, encodings and what a caller may hand in; how texts are cut is known to ``cutting.py``.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from loki_attention.calibration.cutting import Document, cut_documents
from loki_attention.calibration.windows import Request, Source, Windows
from loki_attention.errors import ArgumentError, CorpusError, check_tokens
from loki_attention.evaluation.text import Tokenizer, tokenize
from loki_attention.evaluation.text_files import BLANK_LINE, read_text, text_files

__all__ = ["Windows", "windows_from_files", "windows_from_ids", "windows_from_texts"]

_CHARACTERS_READ_PER_TOKEN = (8, 32, 128)


def windows_from_files(
    paths: str | PathLike[str] | Iterable[str | PathLike[str]],
    tokenizer: Tokenizer,
    *,
    length: int,
    fit_tokens: int,
    held_out_tokens: int,
    field: str = "text",
    seed: int = 0,
) -> Windows:
    """Windows of ``length`` tokens, spread evenly by the seed over files: .txt, .md, .jsonl, each also with .gz.

    Folders are searched to any depth, in name order, leaving out other suffixes, empty files and names that begin
    with a dot. Records of a .jsonl file are joined by blank lines. A file named twice counts once. Files are read
    whole, one at a time, and only as many as are needed. Too little text is used up and noted (``cut_documents``).

    Raises ``CorpusError`` for a path that is not there, a folder without a usable file, another suffix, an empty
    file, a record that is no JSON object or lacks ``field``, bytes that are not UTF-8, and too little text in all;
    ``ArgumentError`` for a length below 2, a token count below 1, and no paths.
    """
    request = Request(length=length, fit_tokens=fit_tokens, held_out_tokens=held_out_tokens)
    listed = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
    if not listed:
        raise ArgumentError("no paths given; name at least one text file or folder")
    documents: dict[Path, Document] = {}
    for path in map(Path, listed):
        for file, name in text_files(path):
            documents.setdefault(file.resolve(), Document(name, partial(read_text, file, field)))
    return cut_documents(list(documents.values()), tokenizer, request, seed=seed)


def windows_from_texts(
    texts: Iterable[object], tokenizer: Tokenizer, *, length: int, fit_tokens: int, held_out_tokens: int, seed: int = 0
) -> Windows:
    """Windows of ``length`` tokens from strings, joined by blank lines in the order in which they come.

    Strings are read until there are 8 characters for each token asked for (more where that does not suffice), so the
    iterable may be endless; the windows are spread over what was read by the seed. Too little text is used up and
    noted (``cut_documents``).

    Raises ``ArgumentError`` for a single string, for items that are no strings, a length below 2 and a token count
    below 1; ``CorpusError`` for an empty iterable and for too little text in all.
    """
    request = Request(length=length, fit_tokens=fit_tokens, held_out_tokens=held_out_tokens)
    if isinstance(texts, str):
        raise ArgumentError(
            f"texts is one string ({texts[:40]!r}), not an iterable of strings; write [text], or give a file as a Path"
        )
    if not isinstance(texts, Iterable):
        raise ArgumentError(f"texts must be an iterable of strings; got {type(texts).__name__}")
    parts = _read_enough(_strings(texts), tokenizer, request.windows * length)
    if not parts:
        raise CorpusError("texts is empty: give at least one string of text to calibrate on")
    return cut_documents([Document("texts", partial(BLANK_LINE.join, parts))], tokenizer, request, seed=seed)


def windows_from_ids(token_ids: Iterable[object], *, length: int, vocab_size: int) -> Windows:
    """Windows from token ids: LongTensors or lists, (S,) or (B, S), each row a window as it is.

    Rows longer than ``length`` are split; pieces of one token, which predict nothing, are left out and noted. All
    are used: of n windows the last max(1, n // 4) are held out (5 windows: 1; 8 windows: 2).

    Raises ``ArgumentError`` for ids outside [0, ``vocab_size``), for what is no integer, for empty rows and for a
    length below 2; ``CorpusError`` for an empty iterable, fewer than two windows or fewer than 64 tokens in all.
    """
    check_tokens("length", length, least=2)
    rows = list(_id_rows(token_ids))
    if not rows:
        raise CorpusError("token_ids is empty: give at least two rows of token ids")
    for number, row in enumerate(rows):
        outside = row[(row < 0) | (row >= vocab_size)]
        if len(row) == 0:
            raise ArgumentError(f"row {number} of token_ids is empty; every row needs at least 2 tokens")
        if len(outside):
            raise ArgumentError(
                f"row {number} of token_ids has id {int(outside[0])}, outside the vocabulary of {vocab_size}; ids are"
                f" 0 to {vocab_size - 1}: use this model's own tokenizer, and cut padding off"
            )
    pieces = [piece.clone()[None] for row in rows for piece in row.split(length)]
    windows = [piece for piece in pieces if piece.shape[1] > 1]
    dropped = len(pieces) - len(windows)
    held_out = max(1, len(windows) // 4)
    return Windows(
        fit=tuple(windows[:-held_out]),
        held_out=tuple(windows[-held_out:]),
        length=max((window.shape[1] for window in windows), default=length),
        sources=(Source("token ids", sum(window.shape[1] for window in windows)),),
        notes=(f"left out {dropped} windows of a single token",) if dropped else (),
    )


def _strings(texts: Iterable[object]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ArgumentError(
                f"item {number} of texts is {type(text).__name__}, not a string; give strings, or token ids as token_ids"
            )
        yield text


def _read_enough(strings: Iterator[str], tokenizer: Tokenizer, tokens: int) -> list[str]:
    """The first of ``strings``: 8 characters for each of so many tokens; more where the tokenizer finds fewer tokens."""
    parts: list[str] = []
    size = 0
    for characters_per_token in _CHARACTERS_READ_PER_TOKEN:
        for text in strings:
            parts.append(text)
            size += len(text) + len(BLANK_LINE)
            if size >= characters_per_token * tokens:
                break
        else:
            return parts
        if len(tokenize(tokenizer, BLANK_LINE.join(parts))) >= tokens:
            break
    return parts


def _id_rows(token_ids: Iterable[object]) -> Iterator[Int64[Tensor, " _"]]:
    """The rows of every item, int64 on the CPU."""
    if isinstance(token_ids, (str, bytes)) or not isinstance(token_ids, Iterable):
        raise ArgumentError(f"token_ids must be an iterable of rows of ids; got {type(token_ids).__name__}")
    for number, item in enumerate(token_ids):
        for row in _as_rows(item, number):
            yield row.to("cpu", torch.int64)


def _as_rows(item: object, number: int) -> list[Tensor]:
    if isinstance(item, (list, tuple)) and any(isinstance(row, (list, tuple, Tensor)) for row in item):
        return [row for part in item for row in _as_rows(part, number)]
    try:
        ids = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.tensor(0)
    empty_list = isinstance(item, (list, tuple)) and not item
    integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim not in (1, 2) or not (integer or empty_list):
        raise ArgumentError(
            f"item {number} of token_ids is no row of integers but {type(item).__name__}; give LongTensors (B, S) or"
            " lists of ints"
        )
    return list(ids[None] if ids.ndim == 1 else ids)
