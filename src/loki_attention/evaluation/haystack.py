"""A question about sentences hidden in prose: how prose, hidden sentences, question and answer become token ids.

Knows where hidden sentences are put and which tokens answer; what they say is known to ``needles`` and ``families``.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int64
from torch import Tensor

from loki_attention.errors import ArgumentError
from loki_attention.evaluation.text import Tokenizer, tokenize

_LEAST_PROSE_TOKENS = 64
_SENTENCE_END = re.compile(r'(?<=[.!?])(?=\s+[A-Z"(=])')


@dataclass(frozen=True, slots=True, kw_only=True)
class Puzzle:
    """Sentences to hide in this order, and what is asked about them: ``question`` ends where the answer begins.

    ``asked`` is the number of the sentence that answers (the first of those that do). ``verbatim``: the answer stands
    in that sentence as it is, and must have the same tokens there.
    """

    hidden: Sequence[str]
    question: str
    answer: str
    asked: int
    verbatim: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """One retrieval question.

    ``prompt`` (S,) and ``answer`` (A,) are int64 token ids; the prompt ends where the answer begins, so that answer
    token i is right when the model, given the prompt and the i answer tokens before it, ranks it first.
    ``depth`` in [0, 1) is where the asked-for answer stands in the prompt: tokens before it / S.
    """

    kind: str
    prompt: Int64[Tensor, " S"]
    answer: Int64[Tensor, " A"]
    depth: float


def sentences_of(prose: str) -> list[str]:
    """The prose cut behind its sentences; together they are the prose."""
    return _SENTENCE_END.split(prose)


def ask(
    tokenizer: Tokenizer,
    sentences: list[str],
    puzzle: Puzzle,
    *,
    kind: str,
    length: int,
    rng: random.Random,
    depths: tuple[float, float] | None = None,
) -> Question:
    """The puzzle hidden in the last of ``sentences``, the front cut so that prompt and answer are ``length`` tokens.

    Hidden sentences stand at random sentence boundaries; within ``depths``, shares of the prose, the one that is asked
    for. Raises ``ArgumentError`` for a length without room for 64 tokens of prose, prose with too few tokens, and a
    tokenizer that writes an answer differently in its sentence and after the question.
    """
    other_tokens = sum(len(tokenize(tokenizer, " " + sentence)) for sentence in puzzle.hidden)
    other_tokens += len(tokenize(tokenizer, f" {puzzle.question} {puzzle.answer}"))
    taken = list(_take_last(tokenizer, sentences, length - other_tokens, length))
    text = f"{_insert(taken[::-1], puzzle, rng, depths)} {puzzle.question}"
    prompt = tokenize(tokenizer, text)
    whole = tokenize(tokenizer, f"{text} {puzzle.answer}")
    split = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    cut = len(whole) - length
    prompt, answer = whole[cut:split], whole[split:]
    place = _place(tokenizer, prompt, answer, text, puzzle)
    if cut < 0 or place is None:
        raise ArgumentError(
            f"this tokenizer writes {puzzle.answer!r} differently in its fact and after the question; needle questions"
            " need one that splits text at spaces and punctuation"
        )
    return Question(kind=kind, prompt=torch.tensor(prompt), answer=torch.tensor(answer), depth=place / len(prompt))


def _place(tokenizer: Tokenizer, prompt: list[int], answer: list[int], text: str, puzzle: Puzzle) -> int | None:
    """How many tokens of the prompt stand before the answer, or before the sentence that is asked for."""
    if puzzle.verbatim:
        return _find(prompt, answer)
    behind = text[text.index(puzzle.hidden[puzzle.asked]) :]
    return max(0, len(prompt) - len(tokenize(tokenizer, behind)))


def _take_last(tokenizer: Tokenizer, sentences: list[str], tokens: int, length: int) -> Iterator[str]:
    """The last of ``sentences``, last first, until they have ``tokens`` tokens between them."""
    if tokens < _LEAST_PROSE_TOKENS:
        raise ArgumentError(
            f"a length of {length} tokens leaves {max(tokens, 0)} for prose beside what is hidden and the question;"
            f" at least {_LEAST_PROSE_TOKENS} are needed: ask for a greater length"
        )
    found = 0
    for sentence in reversed(sentences):
        yield sentence
        found += len(tokenize(tokenizer, sentence))
        if found >= tokens:
            return
    raise ArgumentError(
        f"the prose has {found} tokens; questions of {length} tokens need {tokens}: give more prose or a smaller length"
    )


def _insert(sentences: list[str], puzzle: Puzzle, rng: random.Random, depths: tuple[float, float] | None) -> str:
    """The sentences as one text with the hidden ones between them, never before the first, whose front may be cut."""
    last = len(sentences)
    if depths is None:
        places = sorted(rng.randint(1, last) for _ in puzzle.hidden)
    else:
        low, high = (max(1, round(share * last)) for share in depths)
        own = rng.randint(low, max(low, high))
        before = sorted(rng.randint(1, own) for _ in puzzle.hidden[: puzzle.asked])
        behind = sorted(rng.randint(own, last) for _ in puzzle.hidden[puzzle.asked + 1 :])
        places = [*before, own, *behind]
    bounds = [0, *places, last]
    parts = ["".join(sentences[a:b]) for a, b in pairwise(bounds)]
    return parts[0] + "".join(f" {hidden}{part}" for hidden, part in zip(puzzle.hidden, parts[1:], strict=True))


def _find(ids: list[int], wanted: list[int]) -> int | None:
    """The first index at which ``wanted`` stands in ``ids``: 1 for [5, 7, 8, 7] and [7, 8]; ``None`` where it does not."""
    starts = range(len(ids) - len(wanted) + 1)
    return next((i for i in starts if ids[i : i + len(wanted)] == wanted), None)
