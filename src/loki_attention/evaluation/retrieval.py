"""Does the model still find a fact thousands of tokens back? Exact match of needle answers by teacher forcing."""

from collections.abc import Sequence
from typing import Any

import torch

from loki_attention.evaluation.continuation import DensePrompt
from loki_attention.evaluation.needles import Question
from loki_attention.evaluation.variant import Variant

DENSE = "dense"


def answer(model: Any, question: Question, variants: Sequence[Variant]) -> dict[str, bool]:
    """Whether every answer token is the most likely one, by variant name and under ``dense``.

    The prompt is computed densely once; the rows that predict the answer are sparse (rule ``continuation``).
    """
    rows = torch.cat([question.prompt[-1:], question.answer[:-1]])[None]
    expected = question.answer.to(model.device)
    with torch.inference_mode():
        prompt = DensePrompt(model, question.prompt[None, :-1])
        logits = {DENSE: prompt.logits(rows, None)[0]}
        logits |= {variant.name: prompt.logits(rows, variant)[0] for variant in variants}
    return {name: bool((row.argmax(-1) == expected).all()) for name, row in logits.items()}
