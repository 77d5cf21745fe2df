"""Quest (arXiv:2406.10774): pages of 16 tokens, ranked by an upper bound of the scores they hold.

A page keeps the smallest and the largest key of every channel; sum_i max(q_i m_i, q_i M_i) bounds the score of each of
its tokens. The best pages are attended whole; here the last one taken is cut, so that K tokens are read exactly, sinks
and recent ones among them. Pages are counted from a sequence's first token. The paper has no GQA: here a page is bounded
for all heads of a group, by the largest of their bounds, and ``per="query-head"`` is the paper's own.

Simulated: the bounds are taken from the keys at every step, where Quest keeps them. Both bounds of every page count as
read. As in the paper the first layers should stay dense (here: layer 0).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loki_attention.kernels import torch_backend
from loki_attention.kernels.rows import Rows
from loki_attention.kernels.torch_backend import GroupScores
from loki_attention.methods.base import Chosen, SelectionMethod, Step

PAGE = 16
"""Tokens of a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(SelectionMethod):
    """Attend the pages of the highest score bounds, K tokens in all."""

    name: ClassVar[str] = "quest"
    tails: ClassVar[tuple[str, ...]] = ("none", "mean")
    simulation: ClassVar[str | None] = "pages' bounds are taken from all keys at every step"

    def choose(self, step: Step) -> Chosen:
        """Tokens rank as their pages do; within the last page taken, the first tokens come first."""
        ranking = page_bounds(step, step.sets(self.per)).amax(2)
        return Chosen(torch_backend.top_k(ranking, step.rows, step.k, self.forced))

    def read_bytes(self, tokens: Tensor, k: Tensor, group_size: int, row_bytes: int) -> Tensor:
        """Two bounds of every page, the last one begun included, K keys and values for every set, the tail's sums."""
        pages = (tokens.double() / PAGE).ceil()
        return 2 * row_bytes * pages + SelectionMethod.read_bytes(self, tokens, k, group_size, row_bytes)


def page_bounds(step: Step, sets: int) -> GroupScores:
    """For every slot the upper bound of its page's scores, scale included, over the tokens that the row sees."""
    rows = step.rows
    count = int(rows.tokens.max())
    padded = -(-count // PAGE) * PAGE
    smallest, largest = _running_bounds(step.layer.keys, rows, count, padded)
    compute = torch.promote_types(step.query.dtype, torch.float32)
    grouped = step.query.to(compute).unflatten(1, (step.layer.keys.shape[1], -1))
    bounds = grouped.clamp(min=0) @ largest[:, :, None].mT + grouped.clamp(max=0) @ smallest[:, :, None].mT
    rank = rows.rank.clamp(min=0)
    # A page that the row sees in part is bounded by what it sees.
    last_seen = torch.minimum((rank // PAGE * PAGE + PAGE - 1)[:, None], (rows.tokens - 1).clamp(min=0)[..., None])
    of_slots = bounds.take_along_dim(last_seen[:, None, None], dim=-1)
    return step.scale * of_slots.flatten(1, 2).unflatten(1, (sets, -1))


def _running_bounds(keys: Tensor, rows: Rows, count: int, padded: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest key of every channel within a page, up to each token: (B, Hkv, padded, D), by token."""
    slots = rows.slots_in_order(count)
    held = torch.arange(count, device=slots.device) < (rows.rank >= 0).sum(-1, keepdim=True)
    in_order = keys.take_along_dim(slots[:, None, :, None], dim=2).to(torch.promote_types(keys.dtype, torch.float32))
    in_order = torch.where(held[:, None, :, None], in_order, 0.0)
    pages = torch.nn.functional.pad(in_order, (0, 0, 0, padded - count)).unflatten(2, (-1, PAGE))
    return pages.cummin(3).values.flatten(2, 3), pages.cummax(3).values.flatten(2, 3)
