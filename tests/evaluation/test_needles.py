import pytest
import torch

from loki_attention.data import haystack_text
from loki_attention.errors import ArgumentError
from loki_attention.evaluation.needles import KINDS, needle_questions

OPENINGS = {
    "magic number": ("What is the special magic number for", "The special magic number for"),
    "secret words": ("What are the secret words of", "The secret words of"),
    "pass key": ("What is the pass key for", "The pass key for"),
}


@pytest.fixture(scope="module")
def prose():
    return haystack_text().read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [300, 1024])
def test_questions_have_the_asked_length_and_answer_a_fact(reference_tokenizer, prose, kind, length):
    ask, opening = OPENINGS[kind]
    for question in needle_questions(reference_tokenizer, prose, kind=kind, length=length, count=20):
        assert len(question.prompt) + len(question.answer) == length
        assert question.prompt.dtype == question.answer.dtype == torch.int64
        prompt, answer = reference_tokenizer.decode(question.prompt), reference_tokenizer.decode(question.answer)
        body, _, tail = prompt.rpartition(f" {ask} ")
        asked = tail[tail.index(opening) :]
        assert body.count(f" {opening} ") == 4
        assert body.count(asked + answer + ".") == 1
        assert question.kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_has_the_tokens_of_its_fact(reference_tokenizer, prose, kind):
    for question in needle_questions(reference_tokenizer, prose, kind=kind, length=512, count=20):
        place = round(question.depth * len(question.prompt))
        assert torch.equal(question.prompt[place : place + len(question.answer)], question.answer)
        whole = reference_tokenizer.decode(torch.cat([question.prompt, question.answer]))
        again = reference_tokenizer(whole[10:], add_special_tokens=False)["input_ids"]
        assert again[-len(question.answer) :] == question.answer.tolist()
        if kind != "secret words":
            assert len(question.answer) == 6


def test_depths_prose_and_answers_vary(reference_tokenizer, prose):
    questions = needle_questions(reference_tokenizer, prose, kind="magic number", length=512, count=40)
    depths = [question.depth for question in questions]
    assert min(depths) < 0.2
    assert max(depths) > 0.7
    assert len({tuple(question.prompt[:50].tolist()) for question in questions}) == 40
    assert len({tuple(question.answer.tolist()) for question in questions}) == 40


def test_the_seed_decides_and_the_count_does_not(reference_tokenizer, prose):
    def ask(**changes):
        options = {"kind": "pass key", "length": 400, "count": 4, "seed": 0, **changes}
        return [question.prompt.tolist() for question in needle_questions(reference_tokenizer, prose, **options)]

    assert ask() == ask(count=8)[:4]
    assert all(a != b for a, b in zip(ask(), ask(seed=1), strict=True))


def test_facts_stand_between_sentences(reference_tokenizer, prose):
    for question in needle_questions(reference_tokenizer, prose, kind="magic number", length=700, count=10):
        prompt = reference_tokenizer.decode(question.prompt)
        for before in prompt.split(" The special magic number")[:-1]:
            assert before[-1] in ".!?"


def test_the_bundled_model_answers(reference_model, reference_tokenizer, prose):
    right = []
    for kind in KINDS:
        for question in needle_questions(reference_tokenizer, prose, kind=kind, length=512, count=8):
            ids = torch.cat([question.prompt, question.answer])[None]
            with torch.inference_mode():
                logits = reference_model(ids, logits_to_keep=len(question.answer) + 1).logits
            right.append(torch.equal(logits[0, :-1].argmax(-1), question.answer))
    assert sum(right) >= 22


def test_misuse_is_refused(reference_tokenizer, prose):
    def ask(**changes):
        options = {"prose": prose, "kind": "pass key", "length": 512, "count": 1, **changes}
        needle_questions(reference_tokenizer, options.pop("prose"), **options)

    with pytest.raises(ArgumentError, match="did you mean 'magic number'"):
        ask(kind="magic numbers")
    with pytest.raises(ArgumentError, match="at least 1 question"):
        ask(count=0)
    with pytest.raises(ArgumentError, match=r"leaves \d+ for prose .* greater length"):
        ask(length=100)
    with pytest.raises(ArgumentError, match=r"the prose has \d+ tokens; questions of 512 tokens need \d+"):
        ask(prose=prose[:300])


def test_a_tokenizer_that_joins_the_answer_to_its_full_stop_is_refused(prose):
    vocabulary: dict[str, int] = {}

    def words(text, *, add_special_tokens, verbose):
        return {"input_ids": [vocabulary.setdefault(word, len(vocabulary)) for word in text.split()]}

    with pytest.raises(ArgumentError, match="differently in its fact"):
        needle_questions(words, prose, kind="magic number", length=512, count=1)
