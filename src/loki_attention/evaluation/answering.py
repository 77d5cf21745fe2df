"""Retrieval questions answered in plain text by ``model.generate``: what a person sees, beside what was read for it.

``evaluation.retrieval`` scores hundreds of questions without generating; this shows a few.
"""

from collections.abc import Sequence
from typing import Any

import torch

from loki_attention.evaluation.answers import Answer
from loki_attention.evaluation.haystack import Question
from loki_attention.evaluation.variant import Variant
from loki_attention.integrations.huggingface.dense_prompt import DensePrompt


def generate_answers(model: Any, tokenizer: Any, question: Question, variants: Sequence[Variant]) -> list[Answer]:
    """The greedy answer of every variant, as many tokens as the right one has; ``right`` where they are the same.

    The prompt but its last token is computed densely once and shared, so that every answer token comes from a decode
    step of the variant, the first included.
    """
    with torch.inference_mode():
        prompt = DensePrompt(model, question.prompt[None, :-1])
        return [_generate(tokenizer, question, prompt, variant) for variant in variants]


def _generate(tokenizer: Any, question: Question, prompt: DensePrompt, variant: Variant) -> Answer:
    last = question.prompt[None, -1:]
    new, report = prompt.generate(last, variant, max_new_tokens=len(question.answer), do_sample=False)
    sparse = [layer for layer in report.layers if layer.sparse_rows]
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
