"""Prose for evaluation: WikiText turned back into plain text, and consecutive windows of its tokens.

Knows how WikiText was tokenised and how a tokenizer is called; knows nothing of models, files or scores.
"""

import re
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from loki_attention.errors import ArgumentError

_JOINED = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", ""))
_BEFORE_PUNCTUATION = re.compile(r" +([.,;:!?%)\]])")
_AFTER_OPENING = re.compile(r"([(\[]) +")
_BEFORE_SUFFIX = re.compile(r" ('(?:s|S|t|m|d|re|ve|ll)|n't)\b")
_RUN_OF_SPACES = re.compile(r" {2,}")


@runtime_checkable
class Tokenizer(Protocol):
    """What this package asks of a tokenizer: any from ``transformers``, or a stand-in with this one call."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
        """A mapping whose ``"input_ids"`` is the list of token ids of ``text``."""
        ...


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of ``text``: no special tokens, no length limit, and no warning about one."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def detokenize_wikitext(text: str) -> str:
    """WikiText's raw or word-level form as plain text: joined hyphens and numbers, no space before punctuation.

    ``<unk>`` is dropped. Lines, headings (`` = Title = ``), the space at a line's start and the spaces inside
    double quotes stay: the form in which the bundled model was trained and its card's perplexities were measured.

    >>> detokenize_wikitext('He had a guest @-@ starring role ( in 1 @,@ 200 @.@ 5 films ) , Teddy \\'s <unk> Story .')
    "He had a guest-starring role (in 1,200.5 films), Teddy's Story."
    """
    for spaced, joined in _JOINED:
        text = text.replace(spaced, joined)
    text = _BEFORE_PUNCTUATION.sub(r"\1", text)
    text = _AFTER_OPENING.sub(r"\1", text)
    text = _BEFORE_SUFFIX.sub(r"\1", text)
    return _RUN_OF_SPACES.sub(" ", text)


def text_windows(
    tokenizer: Tokenizer, text: str, *, length: int, stride: int | None = None, count: int | None = None
) -> list[Int64[Tensor, "1 _"]]:
    """The first ``count`` windows of ``length`` tokens of ``text``, each (1, length), int64, on the CPU.

    They begin ``stride`` tokens apart, ``length`` by default; ``count=None``: all of them. A last piece shorter than
    ``length`` is left out: 10 tokens at length 4 are 2 windows, 4 at stride 2.

    Raises ``ArgumentError`` for a length, stride or count below 1, and where the text has fewer windows than asked for.
    """
    stride, wanted = length if stride is None else stride, 1 if count is None else count
    if min(length, stride, wanted) < 1:
        raise ArgumentError(f"windows of {length} tokens, {stride} apart, {count} of them: all must be at least 1")
    ids = torch.tensor(tokenize(tokenizer, text), dtype=torch.int64)
    starts = range(0, len(ids) - length + 1, stride)
    if len(starts) < wanted:
        raise ArgumentError(
            f"the text has {len(ids)} tokens, which is {len(starts)} windows of {length};"
            f" {wanted} asked for: give more text, or ask for fewer or shorter windows"
        )
    return [ids[start : start + length][None] for start in starts[:count]]
