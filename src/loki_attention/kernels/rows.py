"""Which cache slots each query row sees. Knows masks and counts; nothing of scores."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loki_attention.core.selection import SAMPLED_TOKENS, TILE
from loki_attention.core.tail import covered_tokens


class Spans(NamedTuple):
    """The valid slots of every sequence, ``start`` to ``stop`` - 1; int64 (B,). ``start`` None: from slot 0."""

    start: Int[Tensor, " b"] | None
    stop: Int[Tensor, " b"]


@dataclass(frozen=True, eq=False)
class Rows:
    """The valid slots of a batch and how many of them each row sees.

    Causal rows are nested: a row sees the first ``tokens`` valid slots of its sequence. ``rank`` is a slot's place
    among its sequence's valid slots, -1 for padding and holes. The layers of a forward share one: what a comparison
    found for the first of them is kept for the others, since reading it waits for the device.
    """

    rank: Int[Tensor, "b s"]
    tokens: Int[Tensor, "b t"]
    _compared: dict[int, tuple[Tensor, bool]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, valid: Bool[Tensor, "b s"], tokens: Int[Tensor, "b t"]) -> "Rows":
        """Rows from the slots that hold tokens and each row's number of visible ones."""
        return cls(torch.where(valid, valid.cumsum(-1) - 1, -1), tokens)

    @classmethod
    def of_whole_prompts(cls, batch: int, slots: int, count: int, device: torch.device) -> "Rows":
        """The last ``count`` rows over ``slots`` slots that all hold tokens."""
        tokens = torch.arange(slots - count + 1, slots + 1, device=device).expand(batch, -1)
        rows = cls(torch.arange(slots, device=device).expand(batch, -1), tokens)
        rows.__dict__["span"] = Spans(None, torch.full((batch,), slots, device=device))
        return rows

    @cached_property
    def span(self) -> Spans | None:
        """Where each sequence's tokens lie side by side, None where one has holes."""
        valid = self.rank >= 0
        tokens, slots = valid.sum(-1), torch.arange(self.rank.shape[1], device=self.rank.device)
        start = torch.where(valid, slots, len(slots)).amin(-1)
        stop = torch.where(valid, slots + 1, 0).amax(-1)
        return Spans(start, stop) if bool((stop - start == tokens).all()) else None

    @cached_property
    def covered(self) -> Int[Tensor, " b"]:
        """How many tokens the tail's sums hold of each sequence, by its first row."""
        return covered_tokens(self.tokens[:, 0])

    def covers(self, covered: Int[Tensor, " b"]) -> bool:
        """Whether sums over ``covered`` tokens are those that these rows want."""
        return self._known(covered, lambda: torch.equal(covered, self.covered))

    def continues(self, rank: Int[Tensor, "c r"]) -> bool:
        """Whether the slots of an earlier forward's ``rank`` still hold the same tokens of their sequences."""
        batch, slots = rank.shape
        if batch != len(self.rank) or slots > self.rank.shape[1]:
            return False
        return self._known(rank, lambda: torch.equal(rank, self.rank[:, :slots]))

    def _known(self, tensor: Tensor, compare: Callable[[], bool]) -> bool:
        # The tensor is kept beside the answer, so that no other takes its place in memory.
        if id(tensor) not in self._compared:
            self._compared[id(tensor)] = tensor, compare()
        return self._compared[id(tensor)][1]

    def chunk(self, start: int, stop: int) -> "Rows":
        """Rows ``start`` to ``stop`` of the forward."""
        if (start, stop) == (0, self.tokens.shape[1]):
            return self
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
