"""Needles: facts of which one is asked for, in the three wordings that the bundled model was trained on.

Other models read them as plain English. How facts are hidden is known to ``haystack``.
"""

import random
from typing import NamedTuple

from loki_attention.errors import ArgumentError, unknown_name
from loki_attention.evaluation.haystack import Puzzle, Question, ask, sentences_of
from loki_attention.evaluation.text import Tokenizer

KINDS = ("magic number", "secret words", "pass key")
FACTS = 4

# Nouns of different endings: a small model finds a fact by the last token of its noun, and confuses those that share it.
NOUNS = """
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


def needle_questions(
    tokenizer: Tokenizer, prose: str, *, kind: str, length: int, count: int, seed: int = 0
) -> list[Question]:
    """``count`` questions of one kind, each ``length`` tokens in all: prose, four facts, the question, the answer.

    The facts stand at random sentence boundaries of ``prose``; one of them is asked for by the beginning of its
    sentence. Each question has its own slice of the prose (its end drawn by the seed without repetition; a slice
    that reaches the beginning goes on from the end). Question i depends on the prose, kind, length and seed, not on
    ``count``. The answer's tokens are exactly those it has in its fact.

    Raises ``ArgumentError`` for an unknown kind, a count below 1, and what ``haystack.ask`` refuses.
    """
    if kind not in KINDS:
        raise unknown_name("kind of needle", kind, KINDS)
    if count < 1:
        raise ArgumentError(f"count is {count}; at least 1 question must be asked for")
    sentences = sentences_of(prose)
    ends = list(range(len(sentences)))
    random.Random(f"{seed}/{kind}/{length}").shuffle(ends)
    questions = []
    for index in range(count):
        rng = random.Random(f"{seed}/{kind}/{length}/{index}")
        end = ends[index % len(ends)]
        puzzle = needles(kind, rng)
        questions.append(ask(tokenizer, sentences[end:] + sentences[:end], puzzle, kind=kind, length=length, rng=rng))
    return questions


def needles(kind: str, rng: random.Random, *, facts: int = FACTS) -> Puzzle:
    """Facts of one kind about different nouns, with different answers; one of them is asked for."""
    nouns = rng.sample(NOUNS, 4 * FACTS)
    numbers = rng.sample(range(10000, 100000), FACTS)
    asked = rng.randrange(facts)
    wording = _WORDINGS[kind]
    hidden = []
    for i, (name, number) in enumerate(zip(nouns[:facts], numbers, strict=False)):
        words = nouns[FACTS + 3 * i : FACTS + 3 * i + 3]
        answer = " ".join(words) if kind == "secret words" else str(number)
        opening = wording.opening.format(name=name)
        hidden.append(f"{opening} {answer}.{wording.rest.format(name=name, answer=answer)}")
        if i == asked:
            question, right = f"{wording.ask.format(name=name)} {opening}", answer
    return Puzzle(hidden=hidden, question=question, answer=right, asked=asked)
