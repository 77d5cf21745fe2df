"""Perplexity of any text, and how far the next-token distribution is from dense attention's on the same tokens."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import exp, log
from typing import Any

from loki_attention.errors import ArgumentError
from loki_attention.evaluation.continuation import Loss, compare_window
from loki_attention.evaluation.reading import DecodeStep
from loki_attention.evaluation.task import Score, digest_of, mean_score, transformed
from loki_attention.evaluation.text import text_windows
from loki_attention.evaluation.variant import Variant

_MOST_STEPS = 64


class Perplexity:
    """Windows of a text; in each the tokens behind ``prompt`` are scored, with all of the window before them as context.

    Metrics: ``perplexity`` and ``bits_per_byte`` (of the scored text in UTF-8), ``log_loss`` in nats a token; against
    dense ``kl_from_dense`` (nats a token), ``next_token_agreement`` and ``perplexity_over_dense`` (the ratio less 1).
    Items are windows.
    """

    together = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        text: str,
        *,
        length: int = 2048,
        prompt: int | None = None,
        stride: int | None = None,
        windows: int | None = None,
        seed: int = 0,
        name: str = "perplexity",
    ) -> None:
        prompt = length // 2 if prompt is None else prompt
        if not 1 <= prompt < length - 1:
            raise ArgumentError(
                f"windows of {length} tokens with a prompt of {prompt}; a prompt has at least 1 token and leaves at least "
                "2 to score"
            )
        self._model, self._prompt, self._seed, self.name = model, prompt, seed, name
        self._windows = text_windows(tokenizer, text, length=length, stride=stride, count=windows)
        scored = [window[0, prompt + 1 :].tolist() for window in self._windows]
        self._bytes = [max(1, len(tokenizer.decode(ids).encode())) for ids in scored]
        self.items = len(self._windows)
        every = max(1, (length - 1 - prompt) // _MOST_STEPS)
        self.steps: Sequence[DecodeStep] = [DecodeStep(prompt, tokens) for tokens in range(prompt + 1, length, every)]
        self.digest = digest_of(prompt, *(window.numpy().tobytes() for window in self._windows))

    def measure(self, index: int, variants: Sequence[Variant]) -> dict[str, list[float | int]]:
        """The sums of a window's :class:`Loss`, less the bytes, by variant."""
        losses = compare_window(self._model, self._windows[index], variants, prompt=self._prompt)
        return {name: list(loss[:5]) for name, loss in losses.items()}

    def scores(self, outcomes: Sequence[Any], dense: Sequence[Any]) -> list[Score]:
        """Means over windows, which all have as many tokens."""
        windows = [Loss(*outcome) for outcome in outcomes]
        mean = partial(mean_score, seed=self._seed)
        nats = mean("log_loss", [loss.log_loss / loss.tokens for loss in windows], "nats a token")
        bits = [loss.log_loss / log(2) / size for loss, size in zip(windows, self._bytes, strict=True)]
        change = mean("log_ratio", [(loss.log_loss - loss.dense_log_loss) / loss.tokens for loss in windows], "nats")
        dense_nats = sum(loss.dense_log_loss / loss.tokens for loss in windows) / len(windows)
        return [
            nats,
            transformed(nats, "perplexity", "", exp),
            mean("bits_per_byte", bits, "bits a byte"),
            mean("kl_from_dense", [loss.kl for loss in windows], "nats a token"),
            mean("next_token_agreement", [loss.agreement for loss in windows], "fraction"),
            replace(
                transformed(change, "perplexity_over_dense", "fraction", lambda ratio: exp(ratio) - 1),
                config={"dense_perplexity": exp(dense_nats)},
            ),
        ]
