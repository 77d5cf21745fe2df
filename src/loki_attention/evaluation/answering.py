"""Retrieval questions answered in plain text by ``model.generate``: what a person sees, beside what was read for it.

``evaluation.retrieval`` scores hundreds of questions without generating; this shows a few.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from loki_attention.errors import ArgumentError
from loki_attention.evaluation.continuation import DensePrompt
from loki_attention.evaluation.needles import Question
from loki_attention.evaluation.variant import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question's answer by one variant.

    ``tokens_read`` and ``bytes_read`` are means a decode step and sparse layer, ``tokens_cached`` and ``bytes_dense``
    what dense attention reads there; all four are 0 for a variant that was nowhere sparse.
    """

    variant: str
    text: str
    right: bool
    tokens_read: float = 0.0
    tokens_cached: float = 0.0
    bytes_read: float = 0.0
    bytes_dense: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A variant's answers together; reads are means a decode step and sparse layer, dense ones where it has none."""

    variant: str
    right: int
    asked: int
    tokens_read: float
    bytes_read: float
    bytes_dense: float

    @property
    def read_fraction(self) -> float:
        """Bytes read over dense attention's."""
        return self.bytes_read / self.bytes_dense if self.bytes_dense else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"read_fraction": self.read_fraction}


def generate_answers(model: Any, tokenizer: Any, question: Question, variants: Sequence[Variant]) -> list[Answer]:
    """The greedy answer of every variant, as many tokens as the right one has; ``right`` where they are the same.

    The prompt but its last token is computed densely once and shared, so that every answer token comes from a decode
    step of the variant, the first included.
    """
    with torch.inference_mode():
        prompt = DensePrompt(model, question.prompt[None, :-1])
        return [_generate(tokenizer, question, prompt, variant) for variant in variants]


def score(answers: Sequence[Answer], *, dense: Answer) -> Score:
    """The score of one variant's answers; ``dense`` is any answer of a sparse variant, for what dense reads.

    Raises ``ArgumentError`` without answers.
    """
    if not answers:
        raise ArgumentError("a score needs at least one answer")
    count = len(answers)
    return Score(
        variant=answers[0].variant,
        right=sum(answer.right for answer in answers),
        asked=count,
        tokens_read=sum(answer.tokens_read or dense.tokens_cached for answer in answers) / count,
        bytes_read=sum(answer.bytes_read or dense.bytes_dense for answer in answers) / count,
        bytes_dense=sum(answer.bytes_dense or dense.bytes_dense for answer in answers) / count,
    )


def _generate(tokenizer: Any, question: Question, prompt: DensePrompt, variant: Variant) -> Answer:
    ids = question.prompt[None].to(prompt.model.device)
    try:
        with variant.attach(prompt.model) as attached:
            output = prompt.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=prompt.cache,
                max_new_tokens=len(question.answer),
                do_sample=False,
            )
    finally:
        prompt.cache.crop(prompt.length - prompt.cache.get_seq_length())
    new = output[0, ids.shape[1] :].cpu()
    sparse = [layer for layer in attached.report().layers if layer.sparse_rows]
    rows = max(1, sum(layer.sparse_rows for layer in sparse))
    return Answer(
        variant=variant.name,
        text=tokenizer.decode(new, skip_special_tokens=True).strip(),
        right=new.tolist() == question.answer.tolist(),
        tokens_read=sum(layer.tokens_read for layer in sparse) / rows,
        tokens_cached=sum(layer.tokens_cached for layer in sparse) / rows,
        bytes_read=sum(layer.bytes_read for layer in sparse) / rows,
        bytes_dense=sum(layer.bytes_dense for layer in sparse) / rows,
    )
