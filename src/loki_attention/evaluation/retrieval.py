"""Does the model still find what stands thousands of tokens back? Exact match of answers by teacher forcing."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from loki_attention.errors import ArgumentError, check_tokens
from loki_attention.evaluation.families import puzzle
from loki_attention.evaluation.haystack import Question, ask, sentences_of
from loki_attention.evaluation.needles import NOUNS
from loki_attention.evaluation.reading import DecodeStep
from loki_attention.evaluation.task import Score, accuracy, digest_of
from loki_attention.evaluation.variant import DENSE, Variant
from loki_attention.integrations.huggingface.dense_prompt import DensePrompt

_OF_RECORD = 0.5


def answer(model: Any, question: Question, variants: Sequence[Variant]) -> dict[str, bool]:
    """Whether every answer token is the most likely one, by variant name.

    The prompt is computed densely once; the rows that predict the answer are sparse (rule ``continuation``).
    """
    rows = torch.cat([question.prompt[-1:], question.answer[:-1]])[None]
    expected = question.answer.to(model.device)
    right = {}
    with torch.inference_mode():
        prompt = DensePrompt(model, question.prompt[None, :-1])
        for variant in variants:
            logits, _, _ = prompt.logits(rows, None if variant.method == DENSE else variant)
            right[variant.name] = bool((logits.argmax(-1) == expected).all())
    return right


class Retrieval:
    """Questions of one family (``families``) at one length; metric ``retrieval_accuracy``, items are questions.

    Item i asks for what stands in the ``i % depths``-th part of its prose. Where dense attention is right in less than
    half of the questions, ``of_record`` is 0: such a family says nothing of a method.
    """

    together = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prose: str,
        *,
        family: str,
        length: int,
        questions: int = 100,
        depths: int = 10,
        words: Sequence[str] = NOUNS,
        seed: int = 0,
    ) -> None:
        check_tokens("questions", questions, least=1, unit="questions")
        check_tokens("depths", depths, least=1, unit="parts")
        self._model, self._tokenizer, self._words, self._seed = model, tokenizer, tuple(words), seed
        self._sentences = sentences_of(prose)
        if len(self._sentences) < 2:
            raise ArgumentError("the prose has no two sentences to hide anything between; give running text")
        self._ends = list(range(len(self._sentences)))
        random.Random(f"{seed}/{family}/{length}").shuffle(self._ends)
        self._family, self._length, self._depths = family, length, depths
        self.name, self.items = f"retrieval:{family}:{length}", questions
        first = self.question(0).prompt.tolist()
        self.steps: Sequence[DecodeStep] = [DecodeStep(len(first) - 1, tokens) for tokens in range(len(first), length)]
        self.digest = digest_of(prose, family, length, depths, self._words, seed, questions, first)

    def question(self, index: int) -> Question:
        """The question of item ``index``, whatever the number of items."""
        rng = random.Random(f"{self._seed}/{self._family}/{self._length}/{index}")
        part, turn = index % self._depths, index // self._depths
        end = self._ends[index % len(self._ends)]
        return ask(
            self._tokenizer,
            self._sentences[end:] + self._sentences[:end],
            puzzle(self._family, turn, rng, self._words),
            kind=self._family,
            length=self._length,
            rng=rng,
            depths=(part / self._depths, (part + 1) / self._depths),
        )

    def measure(self, index: int, variants: Sequence[Variant]) -> dict[str, int]:
        """1 where the whole answer is right, by variant."""
        return {name: int(right) for name, right in answer(self._model, self.question(index), variants).items()}

    def scores(self, outcomes: Sequence[int], dense: Sequence[int]) -> list[Score]:
        """Accuracy, and the questions that differ from dense."""
        config: dict[str, Any] = {
            "family": self._family,
            "length": self._length,
            "depths": self._depths,
            "dense_value": sum(dense) / len(dense),
            "of_record": int(sum(dense) >= _OF_RECORD * len(dense)),
            "lost_to_dense": sum(theirs > ours for ours, theirs in zip(outcomes, dense, strict=True)),
            "won_over_dense": sum(ours > theirs for ours, theirs in zip(outcomes, dense, strict=True)),
        }
        return [accuracy("retrieval_accuracy", outcomes, config=config)]
