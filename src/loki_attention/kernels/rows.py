"""Which cache slots each query row sees. Knows masks and counts; nothing of scores."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loki_attention.core.selection import SAMPLED_TOKENS, TILE


class Rows(NamedTuple):
    """The valid slots of a batch and how many of them each row sees.

    Causal rows are nested: a row sees the first ``tokens`` valid slots of its sequence. ``rank`` is a slot's place
    among its sequence's valid slots, -1 for padding and holes.
    """

    rank: Int[Tensor, "b s"]
    tokens: Int[Tensor, "b t"]

    @classmethod
    def of(cls, valid: Bool[Tensor, "b s"], tokens: Int[Tensor, "b t"]) -> "Rows":
        """Rows from the slots that hold tokens and each row's number of visible ones."""
        return cls(torch.where(valid, valid.cumsum(-1) - 1, -1), tokens)

    def chunk(self, start: int, stop: int) -> "Rows":
        """Rows ``start`` to ``stop`` of the forward."""
        return Rows(self.rank, self.tokens[:, start:stop])

    @property
    def visible(self) -> Bool[Tensor, "b t s"]:
        """Which slots each row sees."""
        rank = self.rank[:, None]
        return (rank >= 0) & (rank < self.tokens[..., None])

    def forced(self, sinks: int, recent: int) -> Bool[Tensor, "b t s"]:
        """Each row's sinks and recent window."""
        rank, count = self.rank[:, None], self.tokens[..., None]
        return self.visible & ((rank < sinks) | (rank >= count - recent))

    @property
    def sampled(self) -> Bool[Tensor, "b t s"]:
        """Each row's sample (``core.selection.sampled``)."""
        slots = torch.arange(self.rank.shape[1], device=self.rank.device)
        first = (self.rank == 0).int().argmax(-1, keepdim=True)
        tiles = (slots // TILE - first // TILE)[:, None]
        stride = (self.tokens // SAMPLED_TOKENS).clamp(min=1)[..., None]
        return self.visible & (tiles % stride == self.tokens[..., None] % stride)

    def slots_in_order(self, first: int) -> Int[Tensor, "b n"]:
        """The slots of each sequence's ``first`` first valid tokens; any slot where a sequence has fewer."""
        return torch.where(self.rank < 0, self.rank.shape[1], self.rank).argsort(-1)[:, :first]
