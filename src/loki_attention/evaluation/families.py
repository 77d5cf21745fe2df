"""Six families of retrieval questions in the manner of RULER (arXiv:2404.06654), from any prose and word list.

``single`` and ``multi-key`` have the wordings of ``needles``. Answers with several parts are asked for in the order in
which their parts stand in the text (``common-words``: most frequent first), so that one answer is right.
"""

import random
from collections.abc import Callable, Sequence

from loki_attention.errors import ArgumentError, unknown_name
from loki_attention.evaluation.haystack import Puzzle
from loki_attention.evaluation.needles import KINDS, NOUNS, needles

_LEAST_WORDS = 20
_CHAIN = 4
_REPEATS = (7, 5, 3)


def puzzle(family: str, index: int, rng: random.Random, words: Sequence[str] = NOUNS) -> Puzzle:
    """The sentences to hide and the question of a family's ``index``-th item.

    Raises ``ArgumentError`` for an unknown family and fewer than 20 different words.
    """
    if family not in _FAMILIES:
        raise unknown_name("family", family, FAMILIES)
    if len(set(words)) < _LEAST_WORDS:
        raise ArgumentError(f"the word list has {len(set(words))} different words; at least {_LEAST_WORDS} are needed")
    return _FAMILIES[family](index, rng, words)


def _single(index: int, rng: random.Random, words: Sequence[str]) -> Puzzle:
    return needles(KINDS[index % len(KINDS)], rng, facts=1)


def _multi_key(index: int, rng: random.Random, words: Sequence[str]) -> Puzzle:
    return needles(KINDS[index % len(KINDS)], rng)


def _multi_value(index: int, rng: random.Random, words: Sequence[str]) -> Puzzle:
    """Three numbers of one name among two of others."""
    name, *others = rng.sample(words, 3)
    numbers = _numbers(rng, 5)
    hidden = [_fact(name, number) for number in numbers[:3]]
    hidden += [_fact(*other) for other in zip(others, numbers[3:], strict=True)]
    rng.shuffle(hidden)
    own = _in_order(hidden, numbers[:3])
    return Puzzle(
        hidden=hidden,
        question=f"What are all the special magic numbers for {name}? The special magic numbers for {name} are:",
        answer=", ".join(own),
        asked=hidden.index(_fact(name, own[0])),
        verbatim=False,
    )


def _multi_query(index: int, rng: random.Random, words: Sequence[str]) -> Puzzle:
    """The numbers of two names among four."""
    names, numbers = rng.sample(words, 4), _numbers(rng, 4)
    first, second = sorted(rng.sample(range(4), 2))
    asked = f"{names[first]} and {names[second]}"
    return Puzzle(
        hidden=[_fact(*fact) for fact in zip(names, numbers, strict=True)],
        question=f"What are the special magic numbers for {asked}? The special magic numbers for {asked} are:",
        answer=f"{numbers[first]}, {numbers[second]}",
        asked=first,
        verbatim=False,
    )


def _variable_tracking(index: int, rng: random.Random, words: Sequence[str]) -> Puzzle:
    """Variables that were assigned one value through each other, beside as many of another value."""
    names = [word.upper() for word in rng.sample(words, 2 * _CHAIN)]
    numbers = _numbers(rng, 2)
    chains = []
    for number, chain in zip(numbers, (names[:_CHAIN], names[_CHAIN:]), strict=True):
        sources = [number, *(f"VAR {name}" for name in chain)]
        chains.append([f"VAR {name} = {source}." for name, source in zip(chain, sources, strict=False)])
    turns = [0] * _CHAIN + [1] * _CHAIN
    rng.shuffle(turns)
    hidden = [chains[turn].pop(0) for turn in turns]
    return Puzzle(
        hidden=hidden,
        question=f"Which variables have the value {numbers[0]}? In their order, they are:",
        answer=", ".join(names[:_CHAIN]),
        asked=turns.index(0),
        verbatim=False,
    )


def _common_words(index: int, rng: random.Random, words: Sequence[str]) -> Puzzle:
    """Words noted 7, 5 and 3 times among eight that are noted once."""
    chosen = rng.sample(words, len(_REPEATS) + 8)
    noted = [word for word, count in zip(chosen, _REPEATS, strict=False) for _ in range(count)]
    noted += chosen[len(_REPEATS) :]
    rng.shuffle(noted)
    return Puzzle(
        hidden=[f"The noted word is {word}." for word in noted],
        question="Which three words are noted most often? Most often first, they are:",
        answer=", ".join(chosen[: len(_REPEATS)]),
        asked=noted.index(chosen[0]),
        verbatim=False,
    )


_FAMILIES: dict[str, Callable[[int, random.Random, Sequence[str]], Puzzle]] = {
    "single": _single,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "multi-query": _multi_query,
    "variable-tracking": _variable_tracking,
    "common-words": _common_words,
}
FAMILIES = tuple(_FAMILIES)


def _fact(name: str, number: str) -> str:
    return f"The special magic number for {name} is: {number}."


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(10000, 100000), count)]


def _in_order(hidden: Sequence[str], numbers: Sequence[str]) -> list[str]:
    """The numbers in the order in which the sentences have them."""
    return [number for sentence in hidden for number in numbers if number in sentence]
