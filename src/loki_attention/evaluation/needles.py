"""Retrieval questions: facts hidden in prose, one of them asked for at the end.

Knows the three kinds of fact, where they are put and which tokens answer; knows nothing of models or scores.
The wording is the one the bundled model was trained on; other models read it as plain English.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from loki_attention.errors import ArgumentError, unknown_name
from loki_attention.evaluation.text import Tokenizer, tokenize

KINDS = ("magic number", "secret words", "pass key")

_FACTS = 4
_LEAST_PROSE_TOKENS = 64
_SENTENCE_END = re.compile(r'(?<=[.!?])(?=\s+[A-Z"(=])')
# Nouns of different endings: a small model finds a fact by the last token of its noun, and confuses those that share it.
_NOUNS = """
    acorn almond anchor apple arrow badge banjo barrel beach bench berry blanket brick brush button
    cabbage cabin canoe chimney cloud coffee coral crayon curtain daisy desert drum elbow engine feather
    finger flute forest garden glove goat gravel guitar hammer honey island jewel kite knot ladder leaf
    lizard marble moss mushroom nest oak onion orchard palm peanut quilt rabbit rope sheep silver spider
    statue straw swan tent thunder turnip valley winter wool yacht
""".split()  # noqa: SIM905 - a list of 72 lines is no easier to read


class _Wording(NamedTuple):
    ask: str
    opening: str
    rest: str


_WORDINGS = {
    "magic number": _Wording(
        "What is the special magic number for {name}?", "The special magic number for {name} is:", ""
    ),
    "secret words": _Wording("What are the secret words of {name}?", "The secret words of {name} are:", ""),
    "pass key": _Wording(
        "What is the pass key for {name}?",
        "The pass key for {name} is",
        " Remember it. {answer} is the pass key for {name}.",
    ),
}


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


class _Fact(NamedTuple):
    sentence: str
    question: str
    answer: str


def needle_questions(
    tokenizer: Tokenizer, prose: str, *, kind: str, length: int, count: int, seed: int = 0
) -> list[Question]:
    """``count`` questions of one kind, each ``length`` tokens in all: prose, four facts, the question, the answer.

    The facts stand at random sentence boundaries of ``prose``; one of them is asked for by the beginning of its
    sentence. Each question has its own slice of the prose (its end drawn by the seed without repetition; a slice
    that reaches the beginning goes on from the end). Question i depends on the prose, kind, length and seed, not on
    ``count``. The answer's tokens are exactly those it has in its fact.

    Raises ``ArgumentError`` for an unknown kind, a count below 1, a length without room for 64 tokens of prose, prose
    with too few tokens, and a tokenizer that writes an answer differently in a fact and after a question.
    """
    if kind not in KINDS:
        raise unknown_name("kind of needle", kind, KINDS)
    if count < 1:
        raise ArgumentError(f"count is {count}; at least 1 question must be asked for")
    sentences = _SENTENCE_END.split(prose)
    ends = list(range(len(sentences)))
    random.Random(f"{seed}/{kind}/{length}").shuffle(ends)
    questions = []
    for index in range(count):
        rng = random.Random(f"{seed}/{kind}/{length}/{index}")
        end = ends[index % len(ends)]
        before = sentences[end:] + sentences[:end]
        questions.append(_question(tokenizer, before, kind=kind, length=length, rng=rng))
    return questions


def _question(tokenizer: Tokenizer, sentences: list[str], *, kind: str, length: int, rng: random.Random) -> Question:
    """One question on the last of ``sentences``, the front cut so that prompt and answer are ``length`` tokens."""
    facts = _facts(kind, rng)
    asked = facts[rng.randrange(_FACTS)]
    other_tokens = sum(len(tokenize(tokenizer, " " + fact.sentence)) for fact in facts)
    other_tokens += len(tokenize(tokenizer, f" {asked.question} {asked.answer}"))
    taken = list(_take_last(tokenizer, sentences, length - other_tokens, length))
    text = f"{_insert(taken[::-1], facts, rng)} {asked.question}"
    prompt = tokenize(tokenizer, text)
    whole = tokenize(tokenizer, f"{text} {asked.answer}")
    split = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    cut = len(whole) - length
    prompt, answer = whole[cut:split], whole[split:]
    place = _find(prompt, answer)
    if cut < 0 or place is None:
        raise ArgumentError(
            f"this tokenizer writes {asked.answer!r} differently in its fact and after the question; needle questions"
            " need one that splits text at spaces and punctuation"
        )
    return Question(kind=kind, prompt=torch.tensor(prompt), answer=torch.tensor(answer), depth=place / len(prompt))


def _facts(kind: str, rng: random.Random) -> list[_Fact]:
    """Four facts of one kind about four different nouns, with different answers."""
    nouns = rng.sample(_NOUNS, 4 * _FACTS)
    numbers = rng.sample(range(10000, 100000), _FACTS)
    wording = _WORDINGS[kind]
    facts = []
    for i, (name, number) in enumerate(zip(nouns, numbers, strict=False)):
        words = nouns[_FACTS + 3 * i : _FACTS + 3 * i + 3]
        answer = " ".join(words) if kind == "secret words" else str(number)
        opening = wording.opening.format(name=name)
        rest = wording.rest.format(name=name, answer=answer)
        facts.append(_Fact(f"{opening} {answer}.{rest}", f"{wording.ask.format(name=name)} {opening}", answer))
    return facts


def _take_last(tokenizer: Tokenizer, sentences: list[str], tokens: int, length: int) -> Iterator[str]:
    """The last of ``sentences``, last first, until they have ``tokens`` tokens between them."""
    if tokens < _LEAST_PROSE_TOKENS:
        raise ArgumentError(
            f"a length of {length} tokens leaves {max(tokens, 0)} for prose beside {_FACTS} facts and a question;"
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


def _insert(sentences: list[str], facts: list[_Fact], rng: random.Random) -> str:
    """The sentences as one text with the facts between them, never before the first, whose front may be cut."""
    places = sorted(rng.randint(1, len(sentences)) for _ in facts)
    bounds = [0, *places, len(sentences)]
    parts = ["".join(sentences[a:b]) for a, b in pairwise(bounds)]
    return parts[0] + "".join(f" {fact.sentence}{part}" for fact, part in zip(facts, parts[1:], strict=True))


def _find(ids: list[int], wanted: list[int]) -> int | None:
    """The first index at which ``wanted`` stands in ``ids``: 1 for [5, 7, 8, 7] and [7, 8]; ``None`` where it does not."""
    starts = range(len(ids) - len(wanted) + 1)
    return next((i for i in starts if ids[i : i + len(wanted)] == wanted), None)
