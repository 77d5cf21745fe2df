"""Every family's answer follows from its prompt, as a reader would find it."""

import random
import re
from collections import Counter

import pytest
import torch

from loki_attention.data import haystack_text
from loki_attention.errors import ArgumentError
from loki_attention.evaluation.families import FAMILIES, puzzle
from loki_attention.evaluation.retrieval import Retrieval

FACT = re.compile(r"The special magic number for (\w+) is: (\d+)\.")


@pytest.fixture(scope="module")
def prose() -> str:
    return haystack_text().read_text(encoding="utf-8")


def read(family: str, text: str) -> str:
    """The right answer to the question at the end of ``text``."""
    facts = FACT.findall(text)
    asked = text.rpartition("\n")[2].rpartition("? ")[0]
    if family == "multi-value":
        (name,) = re.findall(r"magic numbers for (\w+)$", asked)
        return ", ".join(number for other, number in facts if other == name)
    if family == "multi-query":
        names = re.findall(r"magic numbers for (\w+) and (\w+)$", asked)[0]
        return ", ".join(dict(facts)[name] for name in names)
    if family == "common-words":
        counts = Counter(re.findall(r"The noted word is (\w+)\.", text))
        return ", ".join(word for word, _ in counts.most_common(3))
    values: dict[str, str] = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
        values[name] = values.get(value, value)
    (wanted,) = re.findall(r"have the value (\d+)$", asked)
    return ", ".join(name for name, value in values.items() if value == wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_follow_from_the_prompt(family, prose, reference_tokenizer):
    task = Retrieval(None, reference_tokenizer, prose, family=family, length=700, questions=6, depths=4)
    assert task.items == 6
    for index in range(6):
        question = task.question(index)
        prompt, answer = (
            reference_tokenizer.decode(question.prompt),
            reference_tokenizer.decode(question.answer).strip(),
        )
        assert len(question.prompt) + len(question.answer) == 700
        if family in ("single", "multi-key"):
            opening = prompt.rpartition("? ")[2]
            assert prompt.count(f"{opening} {answer}.") == 1
            assert prompt.count(opening.split(" for ")[0].split(" of ")[0] + " ") >= (2 if family == "single" else 5)
        else:
            assert answer == read(family, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_items_ask_for_the_parts_of_the_text_in_turn(family, prose, reference_tokenizer):
    task = Retrieval(None, reference_tokenizer, prose, family=family, length=1500, questions=8, depths=4)
    places = [task.question(index).depth for index in range(8)]
    assert places[0] < places[1] < places[2] < places[3]
    assert places[4] < places[5] < places[6] < places[7]


def test_a_family_depends_on_words_and_seed_but_not_on_the_number_of_questions(prose, reference_tokenizer):
    def make(**changes):
        options = {"family": "multi-value", "length": 400, "questions": 4, **changes}
        return Retrieval(None, reference_tokenizer, prose, **options)

    words = [f"word{chr(97 + i)}" for i in range(26)]
    assert torch.equal(make().question(3).prompt, make(questions=9).question(3).prompt)
    assert not torch.equal(make().question(3).prompt, make(seed=1).question(3).prompt)
    assert "word" in reference_tokenizer.decode(make(words=words).question(0).prompt).rpartition("for")[2]
    digests = {task.digest for task in (make(), make(seed=1), make(words=words), make(questions=5), make(length=401))}
    assert len(digests) == 5


def test_misuse_is_refused(prose, reference_tokenizer):
    with pytest.raises(ArgumentError, match="did you mean 'multi-key'"):
        puzzle("multikey", 0, random.Random(0))
    with pytest.raises(ArgumentError, match="3 different words; at least 20"):
        puzzle("multi-value", 0, random.Random(0), ["a", "b", "c", "c"])
    for wrong, message in (({"questions": 0}, "questions must be"), ({"depths": 0}, "depths must be")):
        with pytest.raises(ArgumentError, match=message):
            Retrieval(None, reference_tokenizer, prose, **{"family": "single", "length": 400, **wrong})
    with pytest.raises(ArgumentError, match="no two sentences"):
        Retrieval(None, reference_tokenizer, "no end", family="single", length=400)
