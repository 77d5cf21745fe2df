"""The virtual token that answers for all tokens that are not selected: its log-mass and its value.

The specification for one sequence and KV head. Log-mass comes from the low-rank scores of the sample, the value from
sums over the first ``covered_tokens`` tokens (a linear-attention state of R1 x D numbers).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loki_attention.errors import ArgumentError, unknown_name

TAILS = ("none", "mean", "linear")
BLOCK = 64
"""Tokens that join the sums together; the sums stay one block behind the sequence."""


class TailSums(NamedTuple):
    """Sums over covered tokens of v, of the leading encoded dims e, and of e v^T; leading axes are free."""

    tokens: Tensor  # (...)
    values: Tensor  # (..., D)
    encoded: Tensor  # (..., R1)
    products: Tensor  # (..., R1, D)

    @classmethod
    def of(cls, encoded: Float[Tensor, "n r1"], values: Float[Tensor, "n d"]) -> "TailSums":
        """The sums of ``n`` tokens."""
        tokens = torch.tensor(len(values), dtype=values.dtype)
        return cls(tokens, values.sum(0), encoded.sum(0), encoded.mT @ values)


def check_tail(tail: object) -> None:
    """Raise ``ArgumentError`` for anything but a known tail."""
    if tail not in TAILS:
        raise unknown_name("tail", tail, TAILS)


def tail_rank(head_dim: int, rank: int) -> int:
    """Leading dims that the linear tail regresses on, R1 = min(D / 4, R), of ``rank`` dims of a head's ``head_dim``.

    >>> tail_rank(64, 48), tail_rank(64, 8)
    (16, 8)
    """
    return min(head_dim // 4, rank)


def covered_tokens(valid_tokens: Tensor) -> Tensor:
    """How many leading valid tokens the sums cover: whole blocks of 64, one behind.

    >>> covered_tokens(torch.tensor([63, 127, 128, 200])).tolist()
    [0, 0, 64, 128]
    """
    return (BLOCK * (valid_tokens // BLOCK - 1)).clamp(min=0)


def tail_log_mass(
    scores: Float[Tensor, "g n"],
    offset: Float[Tensor, " g"],
    selected: Bool[Tensor, " n"],
    in_sample: Bool[Tensor, " n"],
    cap: Callable[[Tensor], Tensor] = lambda scores: scores,
) -> Float[Tensor, " g"]:
    """t: the log of the mass of unselected tokens, from those of them in the sample; -inf where there are none.

    ``offset`` is what a score lacks of the true one: scale q . mean + kappa. ``cap`` is the model's soft-cap.
    """
    drawn = in_sample & ~selected
    if not drawn.any():
        return torch.full_like(offset, -torch.inf)
    ratio = (~selected).sum() / drawn.sum()
    return torch.logsumexp(cap(scores[:, drawn] + offset[:, None]), dim=-1) + ratio.to(scores.dtype).log()


def tail_value(
    tail: str,
    sums: TailSums,
    leading: Float[Tensor, "*rows r1"],
    deviation: Float[Tensor, "*rows"],
    scale: float,
) -> Float[Tensor, "*rows d"]:
    """u: the value that answers for the unselected tokens, for any leading axes that the sums broadcast to.

    ``mean``: the mean of V. ``linear``: mean + scale min(1, 1 / sd) e_q Cov(e, v), where exponential weights move the
    mean of jointly Gaussian keys and values, at most one deviation far. Needs at least one token in the sums.
    """
    if tail not in ("mean", "linear"):
        raise ArgumentError(f"tail {tail!r} has no value; use 'mean' or 'linear'")
    tokens = sums.tokens[..., None]
    mean = sums.values / tokens
    if tail == "mean":
        return mean.expand(*leading.shape[:-1], -1)
    covariance = sums.products / tokens[..., None] - (sums.encoded / tokens)[..., :, None] * mean[..., None, :]
    reach = scale / deviation.clamp(min=1)
    return mean + reach[..., None] * (leading[..., None, :] @ covariance).squeeze(-2)
