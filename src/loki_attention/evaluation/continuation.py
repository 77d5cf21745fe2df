"""Next-token loss of sparse decoding against dense, on held-out windows.

The first half of each window is a dense prompt, computed once and shared by all variants; every row of the second half
then selects for itself, as decode would (rule ``continuation``).
"""

from collections.abc import Iterable, Sequence
from math import exp
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loki_attention.evaluation.variant import DENSE, Variant
from loki_attention.integrations.huggingface.dense_prompt import DensePrompt

_ROWS_AT_ONCE = 512


class Loss(NamedTuple):
    """Sums over ``tokens`` predicted tokens, beside those of dense attention on the same tokens.

    ``read`` and ``dense_read`` are bytes: what the sparse rows read and what dense rows would have.
    """

    tokens: int = 0
    kl_sum: float = 0.0
    agreed: int = 0
    log_loss: float = 0.0
    dense_log_loss: float = 0.0
    read: float = 0.0
    dense_read: float = 0.0

    def __add__(self, other: "Loss") -> "Loss":  # type: ignore[override]
        sums: Iterable[Any] = (a + b for a, b in zip(self, other, strict=True))
        return Loss(*sums)

    @property
    def kl(self) -> float:
        """Mean KL divergence of the next-token distribution from dense attention's, in nats."""
        return self.kl_sum / self.tokens

    @property
    def agreement(self) -> float:
        """Share of tokens whose most likely next token is dense attention's."""
        return self.agreed / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean log loss."""
        return exp(self.log_loss / self.tokens)

    @property
    def dense_perplexity(self) -> float:
        """Perplexity of dense attention on the same tokens."""
        return exp(self.dense_log_loss / self.tokens)

    @property
    def perplexity_change(self) -> float:
        """Perplexity over dense attention's, less 1."""
        return self.perplexity / self.dense_perplexity - 1

    def figures(self) -> dict[str, float]:
        """The figures a manifest or table shows."""
        return {
            "kl": self.kl,
            "agreement": self.agreement,
            "perplexity": self.perplexity,
            "dense_perplexity": self.dense_perplexity,
            "read_fraction": self.read / self.dense_read if self.dense_read else 1.0,
            "tokens": float(self.tokens),
        }


def compare_window(
    model: Any, window: Int[Tensor, "1 s"], variants: Sequence[Variant], *, prompt: int | None = None
) -> dict[str, Loss]:
    """The loss of every variant on one window of at least 4 tokens, by name.

    The first ``prompt`` tokens, half of the window by default, are dense.
    """
    length = window.shape[1] // 2 if prompt is None else prompt
    rows, targets = window[:, length:-1], window[0, length + 1 :].to(model.device)
    with torch.inference_mode():
        shared = DensePrompt(model, window[:, :length])
        dense, _, _ = shared.logits(rows, None)
        losses = {}
        for variant in variants:
            if variant.method == DENSE:
                losses[variant.name] = loss_of(dense, dense, targets)
                continue
            logits, read, dense_read = shared.logits(rows, variant)
            losses[variant.name] = loss_of(logits, dense, targets)._replace(read=read, dense_read=dense_read)
    return losses


def loss_of(logits: Float[Tensor, "t v"], dense: Float[Tensor, "t v"], targets: Int[Tensor, " t"]) -> Loss:
    """Sums of KL from dense, agreement and log losses over the rows; a few hundred rows in float32 at a time."""
    total = Loss()
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        ours, theirs = (x[part].float().log_softmax(-1) for x in (logits, dense))
        wanted = targets[part, None]
        total += Loss(
            tokens=len(wanted),
            kl_sum=float((theirs.exp() * (theirs - ours)).sum()),
            agreed=int((theirs.argmax(-1) == ours.argmax(-1)).sum()),
            log_loss=-float(ours.gather(-1, wanted).sum()),
            dense_log_loss=-float(theirs.gather(-1, wanted).sum()),
        )
    return total
