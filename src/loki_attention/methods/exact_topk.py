"""Exact top-k: the bound. Reads every key, so it is never fast; it tells the loss of sparsity from that of selection."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loki_attention.core.tail import TAILS
from loki_attention.kernels import torch_backend
from loki_attention.methods.base import Chosen, SelectionMethod, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactTopK(SelectionMethod):
    """Attend the K tokens of the highest exact scores, combined over the group by the same rule as ``loki``'s."""

    name: ClassVar[str] = "exact-topk"
    tails: ClassVar[tuple[str, ...]] = TAILS
    knows_mass: ClassVar[bool] = True

    def choose(self, step: Step) -> Chosen:
        """The K highest scores less their mean over the visible tokens; L and the tail's mass are exact."""
        visible = step.rows.visible
        exact = torch_backend.score_exact(step.query, step.layer.keys, step.scale, step.sets(self.per), step.softmax)
        exact = torch.where(visible[:, None, None], exact, 0.0)
        mean = exact.sum(-1) / step.rows.tokens[:, None, None]
        scores = exact - mean[..., None]
        log_weight = torch.where(visible, 0.0, -torch.inf).to(scores.dtype)
        mass = None if scores.shape[2] == 1 else torch_backend.weighted_log_sum(scores, log_weight)
        ranking = torch_backend.combine_group(scores, mass)
        indices = torch_backend.top_k(ranking, step.rows, step.k, self.forced)
        if self.tail == "none":
            return Chosen(indices)
        return Chosen(indices, torch_backend.tail_log_mass(exact, indices, step.rows, step.k, visible))

    def read_bytes(self, tokens: Tensor, k: Tensor, group_size: int, row_bytes: int) -> Tensor:
        """Every key, K values for every set, and the tail's sums."""
        return row_bytes * (tokens.double() + k * self.sets_per_kv_head(group_size)) + self.tail_bytes()
