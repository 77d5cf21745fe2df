"""Generated answers agree with teacher forcing, and what they read is counted per step and layer."""

import pytest

from loki_attention import Budget
from loki_attention.data import haystack_text
from loki_attention.errors import ArgumentError
from loki_attention.evaluation.answering import generate_answers
from loki_attention.evaluation.answers import Answer, score
from loki_attention.evaluation.needles import needle_questions
from loki_attention.evaluation.retrieval import answer
from loki_attention.evaluation.variant import Variant

BUDGET = Budget(fraction=1 / 8, minimum=48, sinks=4, recent=16)
VARIANTS = [Variant(name=name, method=name, budget=BUDGET) for name in ("dense", "exact-topk", "streaming")]


@pytest.fixture(scope="module")
def questions(reference_tokenizer):
    prose = haystack_text().read_text(encoding="utf-8")
    kinds = ("magic number", "secret words")
    return [
        one for kind in kinds for one in needle_questions(reference_tokenizer, prose, kind=kind, length=512, count=2)
    ]


def test_generation_is_right_where_teacher_forcing_is(reference_model, reference_tokenizer, questions):
    for question in questions:
        said = generate_answers(reference_model, reference_tokenizer, question, VARIANTS)
        forced = answer(reference_model, question, VARIANTS)
        assert {one.variant: one.right for one in said} == {one.name: forced[one.name] for one in VARIANTS}
        right = reference_tokenizer.decode(question.answer).strip()
        assert [one.right for one in said] == [one.text == right for one in said]
        assert said[0].right


def test_variants_do_not_disturb_each_other(reference_model, reference_tokenizer, questions):
    together = generate_answers(reference_model, reference_tokenizer, questions[0], VARIANTS)
    for variant, one in zip(VARIANTS, together, strict=True):
        assert generate_answers(reference_model, reference_tokenizer, questions[0], [variant]) == [one]


def test_reads_are_means_a_step_and_layer(reference_model, reference_tokenizer, questions):
    question = questions[0]
    dense, exact, streaming = generate_answers(reference_model, reference_tokenizer, question, VARIANTS)
    lengths = [len(question.prompt) + step for step in range(len(question.answer))]
    cached = sum(lengths) / len(lengths)
    read = sum(BUDGET.of(length) for length in lengths) / len(lengths)
    row_bytes = 2 * 64 * 4  # two KV heads of 64 dims in float32
    assert (dense.tokens_read, dense.bytes_dense) == (0, 0)
    assert (streaming.tokens_cached, streaming.tokens_read) == (pytest.approx(cached), pytest.approx(read))
    assert streaming.bytes_dense == pytest.approx(2 * row_bytes * cached)
    assert streaming.bytes_read == pytest.approx(2 * row_bytes * read)
    assert exact.bytes_read == pytest.approx(row_bytes * (cached + read))


def test_a_score_fills_in_what_dense_reads():
    sparse = Answer(
        variant="loki", text="1", right=True, tokens_read=8.0, tokens_cached=64.0, bytes_read=9.0, bytes_dense=90.0
    )
    plain = Answer(variant="dense", text="1", right=False)
    ours, dense = score([sparse, sparse], dense=sparse), score([plain, plain], dense=sparse)
    assert (ours.right, ours.asked, ours.read_fraction) == (2, 2, 0.1)
    assert (dense.right, dense.tokens_read, dense.bytes_read, dense.read_fraction) == (0, 64.0, 90.0, 1.0)
    assert ours.to_dict()["read_fraction"] == 0.1
    with pytest.raises(ArgumentError, match="at least one"):
        score([], dense=sparse)
