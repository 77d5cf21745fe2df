"""Texts cut into token windows, spread evenly over the texts and over each text by a seed.

Knows tokenizers and seeds; knows nothing of files: a text is a name and a function that reads it when it is needed.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from loki_attention.calibration.windows import LEAST_TOKENS, Request, Source, Windows
from loki_attention.errors import CorpusError
from loki_attention.evaluation.text import Tokenizer, tokenize

CHARACTERS_PER_TOKEN = 16
"""A text with more characters than this for each token wanted from it is sampled, not tokenised whole."""

_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


class Document(NamedTuple):
    """A text: its name, and how it is read."""

    name: str
    read: Callable[[], str]


class _Stretch(NamedTuple):
    text: str
    start: int


class _Cut(NamedTuple):
    document: int
    position: int
    ids: Int64[Tensor, " _"]


def cut_documents(documents: Sequence[Document], tokenizer: Tokenizer, request: Request, *, seed: int) -> Windows:
    """Windows of ``documents``, as many as are asked for, or all there are with a note that says so.

    One window after another is taken from each document in turn, in an order drawn by the seed, so documents that are
    not needed are not read. Windows are ``request.length`` tokens long and never overlap; where they do not suffice,
    remainders of at least 64 tokens follow. A document with more than 16 characters for each token wanted from it is
    sampled at seeded places, one in each of as many equal stretches as it may give windows; others are tokenised
    whole. Held-out windows are spread over the documents too; with too little text they are at most a quarter (at
    least one). Where fewer than two windows come out, all texts are joined and cut in two or more.

    Raises ``CorpusError`` where that still gives fewer than two windows or fewer than 64 tokens.
    """
    cuts: list[_Cut] = []
    for share in sorted({math.ceil(request.windows / len(documents)), request.windows}):
        cuts = _pick(documents, tokenizer, request, share=share, seed=seed)
        if sum(len(cut.ids) for cut in cuts) >= request.windows * request.length:
            break
    if len(cuts) < 2:
        cuts = _cut_joined(documents, tokenizer, request.length)
    return _split(cuts, [document.name for document in documents], request, seed=seed)


def spread_order(count: int, phase: float) -> list[int]:
    """The numbers 0 to ``count - 1`` in an order whose every beginning is spread evenly over them.

    ``phase`` in [0, 1) turns the order: i comes before j where the fraction of i * golden ratio + phase is smaller.

    >>> spread_order(8, 0.0)
    [0, 5, 2, 7, 4, 1, 6, 3]
    """
    return sorted(range(count), key=lambda i: (i * _GOLDEN_RATIO + phase) % 1)


def _pick(
    documents: Sequence[Document], tokenizer: Tokenizer, request: Request, *, share: int, seed: int
) -> list[_Cut]:
    """The windows asked for, one from each document in turn; shorter remainders only where whole windows run out."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    streams = [_cuts(i, documents[i], tokenizer, request, share=share, seed=seed) for i in order]
    whole: list[_Cut] = []
    remainders: list[_Cut] = []
    while streams and len(whole) < request.windows:
        stream = streams.pop(0)
        cut = next(stream, None)
        if cut is None:
            continue
        (whole if len(cut.ids) == request.length else remainders).append(cut)
        streams.append(stream)
        if len(whole) == request.windows:
            return whole
    tokens = len(whole) * request.length
    for cut in remainders:
        if tokens >= request.windows * request.length:
            break
        whole.append(cut)
        tokens += len(cut.ids)
    return whole


def _cuts(
    index: int, document: Document, tokenizer: Tokenizer, request: Request, *, share: int, seed: int
) -> Iterator[_Cut]:
    """A document's windows in spread order, then its remainder; where it is long, one window for each stretch."""
    rng = random.Random(f"{seed}/{index}")
    text, length = document.read(), request.length
    if len(text) > CHARACTERS_PER_TOKEN * length * share:
        stretches = _stretches(text, min(request.windows, len(text) // (CHARACTERS_PER_TOKEN * length)), length, rng)
        del text
        for i in spread_order(len(stretches), rng.random()):
            ids = _first_tokens(tokenizer, stretches[i], length)
            if len(ids) >= min(LEAST_TOKENS, length):
                yield _Cut(index, i, ids)
        return
    ids = _ids(tokenizer, text)
    count = len(ids) // length
    for i in spread_order(count, rng.random()):
        yield _Cut(index, i, ids[i * length : (i + 1) * length])
    if len(ids) - count * length >= LEAST_TOKENS:
        yield _Cut(index, count, ids[count * length :])


def _stretches(text: str, count: int, length: int, rng: random.Random) -> list[_Stretch]:
    """``count`` equal parts of ``text`` with a seeded place in each, 16 * ``length`` characters before its end or more.

    Of a part longer than 128 * ``length`` characters only as much is kept, around that place.
    """
    part, most = len(text) // count, 8 * CHARACTERS_PER_TOKEN * length
    stretches = []
    for i in range(count):
        start = rng.randint(0, part - CHARACTERS_PER_TOKEN * length)
        first = max(0, min(start, part - most))
        stretches.append(_Stretch(text[i * part + first : i * part + min(first + most, part)], start - first))
    return stretches


def _first_tokens(tokenizer: Tokenizer, stretch: _Stretch, length: int) -> Int64[Tensor, " _"]:
    """``length`` tokens from a stretch's place on, where a word begins; fewer where the whole stretch has fewer."""
    text, start = stretch
    start = max(start, text.find(" ", start, start + 4 * length))
    for size in (CHARACTERS_PER_TOKEN * length // 2, CHARACTERS_PER_TOKEN * length):
        ids = _ids(tokenizer, text[start : start + size])
        if len(ids) >= length:
            return ids[:length]
    return _ids(tokenizer, text)[:length]


def _cut_joined(documents: Sequence[Document], tokenizer: Tokenizer, length: int) -> list[_Cut]:
    """Windows of all texts joined, cut where a text ends no less than elsewhere: at ``length``, or into two halves.

    Each is counted to the document it begins in. Raises ``CorpusError`` below 128 tokens in all.
    """
    texts = [_ids(tokenizer, document.read()) for document in documents]
    joined = torch.cat(texts)
    if len(joined) < 2 * LEAST_TOKENS:
        raise CorpusError(
            f"the text has {len(joined)} tokens in all, too little for two windows of at least {LEAST_TOKENS} (one to"
            " fit on, one held out): give more text"
        )
    length = min(length, len(joined) // 2)
    begins = torch.tensor([len(ids) for ids in texts]).cumsum(0)
    windows = joined[: len(joined) // length * length].view(-1, length)
    first = torch.arange(len(windows)) * length
    owners = torch.searchsorted(begins, first, right=True).tolist()
    return [_Cut(owner, i, ids) for i, (owner, ids) in enumerate(zip(owners, windows, strict=True))]


def _split(cuts: list[_Cut], names: list[str], request: Request, *, seed: int) -> Windows:
    """The windows in seeded order, the held-out ones spread over all of them, with what a user must be told."""
    rng = random.Random(seed)
    cuts = sorted(cuts, key=lambda cut: (cut.document, cut.position))
    tokens = sum(len(cut.ids) for cut in cuts)
    enough = tokens >= request.windows * request.length
    most = len(cuts) - 1 if enough else max(1, len(cuts) // 4)
    held: set[int] = set()
    for i in spread_order(len(cuts), rng.random())[:most]:
        if sum(len(cuts[j].ids) for j in held) < request.held_out_tokens:
            held.add(i)
    order = rng.sample(range(len(cuts)), len(cuts))
    windows = [cut.ids.clone()[None] for cut in cuts]
    used = [sum(len(cut.ids) for cut in cuts if cut.document == i) for i in range(len(names))]
    fit = tuple(windows[i] for i in order if i not in held)
    held_out = tuple(windows[i] for i in order if i in held)
    return Windows(
        fit=fit,
        held_out=held_out,
        length=max(window.shape[1] for window in windows),
        sources=tuple(Source(name, count) for name, count in zip(names, used, strict=True) if count),
        notes=_notes(fit, held_out, request),
    )


def _notes(fit: Sequence[Tensor], held_out: Sequence[Tensor], request: Request) -> tuple[str, ...]:
    """What differs from what was asked for: the tokens to be had, and the length of the windows."""
    notes = []
    fit_tokens, held_out_tokens = (sum(window.shape[1] for window in side) for side in (fit, held_out))
    if fit_tokens < request.fit_tokens or held_out_tokens < request.held_out_tokens:
        notes.append(
            f"asked for {request.fit_tokens} tokens to fit on and {request.held_out_tokens} held out; the text has"
            f" {fit_tokens + held_out_tokens}: used them all, {fit_tokens} to fit on and {held_out_tokens} held out"
        )
    lengths = [window.shape[1] for window in (*fit, *held_out)]
    short = sum(length < request.length for length in lengths)
    if short:
        notes.append(
            f"{short} of {len(lengths)} windows are shorter than {request.length} tokens (the longest has"
            f" {max(lengths)}): texts of at least {request.length} tokens would give whole windows"
        )
    return tuple(notes)


def _ids(tokenizer: Tokenizer, text: str) -> Int64[Tensor, " _"]:
    return torch.tensor(tokenize(tokenizer, text), dtype=torch.int64)
