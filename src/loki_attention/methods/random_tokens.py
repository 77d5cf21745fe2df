"""Random selection: the broken method that an evaluation must be able to tell from a working one. No paper.

Reads nothing to choose. Sinks and recent tokens stay, as the budget says; the rest are drawn anew at every step, from a
fixed seed, by a hash of the token's and the row's place in their own sequence: neither the batch nor padding changes the
draw. Every layer draws the same places. One draw a KV head, or a query head with ``per="query-head"``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loki_attention.kernels import torch_backend
from loki_attention.methods.base import Chosen, SelectionMethod, Step

_SEED = 0x10C1
_BITS = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Random(SelectionMethod):
    """Attend the sinks, the recent tokens and others at random, K in all."""

    name: ClassVar[str] = "random"
    tails: ClassVar[tuple[str, ...]] = ("none", "mean")

    def choose(self, step: Step) -> Chosen:
        """Every visible token is equally likely, whatever the query."""
        rows = step.rows
        sets = torch.arange(step.sets(self.per), device=rows.rank.device)
        seen = _hash(rows.tokens[:, None] + _hash(sets[:, None] + _SEED))
        drawn = _hash(rows.rank[:, None, None] + seen[..., None])
        return Chosen(torch_backend.top_k(drawn.double(), rows, step.k, self.forced))


def _hash(numbers: Tensor) -> Tensor:
    """32 well mixed bits for each of some int64 numbers (the finaliser of MurmurHash3)."""
    mixed = numbers & _BITS
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & _BITS
    return mixed ^ (mixed >> 16)
