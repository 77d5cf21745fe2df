"""SparQ (arXiv:2312.04985, algorithm 1): few components of every key, those where the query is largest.

A step reads the r components of all keys in which |q| is largest, takes an approximate softmax at the temperature that
makes up for the rest, attends the best K tokens exactly, and gives the mass that these lack to v-bar, the mean of all
values. The window of the paper is the budget's ``recent``; sinks stay too. Under GQA, as in the paper, |q| and the
approximate softmax are summed over the group before each choice; ``per="query-head"`` chooses for each head alone.
``planes="R@16"`` asks for r = R components; they are read as the cache holds them. Where a tail is asked for, its exact
mass replaces the estimated one, and v-bar is the tail's mean.

Simulated: v-bar is taken from all values at every step, where SparQ keeps a running mean; and the components are read
from keys that lie token by token, where SparQ needs a second, transposed copy.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from loki_attention.core.planes import Planes
from loki_attention.core.shapes import Keys, Queries
from loki_attention.kernels import torch_backend
from loki_attention.kernels.torch_backend import GroupScores
from loki_attention.methods.base import Answer, Chosen, SelectionMethod, Step, sixteen_bit_planes


class _Ranked(NamedTuple):
    """The slots chosen and the approximate softmax that chose them."""

    indices: Tensor
    share: GroupScores


@dataclass(frozen=True, slots=True, kw_only=True)
class SparQ(SelectionMethod):
    """Rank tokens by the query's r largest components, attend K, fill up with the mean value."""

    name: ClassVar[str] = "sparq"
    tails: ClassVar[tuple[str, ...]] = ("none", "mean")
    simulation: ClassVar[str | None] = "the mean value is taken from all values at every step"

    @classmethod
    def default_planes(cls, head_dim: int, calibrated: Planes | None) -> Planes | None:
        """A quarter of the components, as the paper has it (32 of 128)."""
        return sixteen_bit_planes(head_dim)[0]

    @classmethod
    def problem_with_planes(cls, planes: Planes) -> str | None:
        """Components are those of the cached keys."""
        if planes.bits[0] != 16:
            return f"reads components of the keys themselves; got planes '{planes}', give R@16 for R components"
        return None

    @classmethod
    def planes_by_size(cls, head_dim: int) -> tuple[Planes | None, ...]:
        """A quarter, an eighth and a sixteenth of the components."""
        return sixteen_bit_planes(head_dim)

    @property
    def components(self) -> int:
        """r: how many components of every key are read."""
        planes = self.planes or sixteen_bit_planes(self.head_dim)[0]
        return planes.rank

    def choose(self, step: Step) -> Chosen:
        """The K tokens of the largest approximate softmax."""
        return Chosen(self._rank(step).indices)

    def attend(self, step: Step) -> Answer:
        """alpha softmax(q K^T) V over the chosen tokens + (1 - alpha) v-bar; alpha is their approximate mass."""
        if self.tail != "none":
            return SelectionMethod.attend(self, step)
        indices, share = self._rank(step)
        tensors = (step.query, step.layer.keys, step.layer.values, indices)
        exact, _ = torch_backend.attend(*tensors, step.scale, softmax=step.softmax)
        chosen = ~torch_backend.unselected(indices, share.shape[-1])
        alpha = (share * chosen[:, :, None]).sum(-1).flatten(1, 2)
        rest = _mean_value(step.layer.values, step.rows.visible, step.query.shape[1])
        mixed = alpha[..., None] * exact + (1 - alpha[..., None]) * rest
        return Answer(mixed.to(step.query.dtype), indices, alpha)

    def read_bytes(self, tokens: Tensor, k: Tensor, group_size: int, row_bytes: int) -> Tensor:
        """r components of every key and K keys and values for every set, and the mean value in float32."""
        sets = self.sets_per_kv_head(group_size)
        components = tokens.double() * sets * row_bytes * self.components / self.head_dim
        mean_value = 4.0 * self.head_dim if self.tail == "none" else 0.0
        return components + mean_value + SelectionMethod.read_bytes(self, tokens, k, group_size, row_bytes)

    def _rank(self, step: Step) -> _Ranked:
        share = approximate_share(step, step.sets(self.per), self.components)
        return _Ranked(torch_backend.top_k(share.sum(2), step.rows, step.k, self.forced), share)


def approximate_share(step: Step, sets: int, components: int) -> GroupScores:
    """softmax(q[i] K[:, i]^T / tau) over the tokens a row sees, i the components of the set's largest sum of |q|.

    tau = (sqrt(D) in the paper, 1 / scale here) times sqrt(|q[i]|_1 / |q|_1).
    """
    keys, compute = step.layer.keys, torch.promote_types(step.query.dtype, torch.float32)
    query = step.query.to(compute).unflatten(1, (sets, -1))
    size = query.abs()
    largest = size.sum(2).topk(components, dim=-1).indices[:, :, None]
    coverage = size.take_along_dim(largest, dim=-1).sum(-1) / size.sum(-1).clamp(min=torch.finfo(compute).tiny)
    kept = torch.zeros_like(query).scatter(-1, largest.expand(*query.shape[:-1], -1), 1.0)
    per_head = (query * kept).flatten(1, 2)
    scores = torch_backend.score_exact(per_head, keys, step.scale, sets)
    scores = scores / coverage.clamp(min=torch.finfo(compute).tiny).sqrt()[..., None]
    hidden = ~step.rows.visible[:, None, None]
    return step.softmax.cap(scores).masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()


def _mean_value(values: Keys, visible: Tensor, heads: int) -> Queries:
    """v-bar: the mean of the values a row sees, for every query head."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    wide = torch.where(visible.any(1)[:, None, :, None], wide, 0.0)
    weight = visible.to(wide.dtype) / visible.sum(-1, keepdim=True).clamp(min=1)
    return (weight[:, None] @ wide).repeat_interleave(heads // values.shape[1], dim=1)
