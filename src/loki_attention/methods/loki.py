"""Loki with quantised low-rank keys, one index set per KV head and a virtual token for what is not selected."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loki_attention.core.tail import TAILS
from loki_attention.kernels import torch_backend
from loki_attention.methods.base import Chosen, SelectionMethod, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Loki(SelectionMethod):
    """Rank all tokens by their low-rank twins, attend the best K exactly (Loki, algorithm 1; ``docs/concepts.md``)."""

    name: ClassVar[str] = "loki"
    needs_basis: ClassVar[bool] = True
    tails: ClassVar[tuple[str, ...]] = TAILS

    def choose(self, step: Step) -> Chosen:
        """The K highest codes, sinks and the recent window among them."""
        assert self.encoder is not None and step.encoded is not None
        query, planes = step.encoded, self.encoder.planes
        scores = torch_backend.score_low_rank(query, step.layer.twins(), planes, step.sets(self.per))
        mass = None if scores.shape[2] == 1 else torch_backend.group_log_mass(scores, step.rows, self.forced)
        ranking = torch_backend.combine_group(scores, mass)
        if not planes.is_float:
            ranking = torch_backend.code(ranking, query.deviation)
        indices = torch_backend.top_k(ranking, step.rows, step.k, self.forced)
        if self.tail == "none":
            return Chosen(indices)
        estimates, sample = step.softmax.cap(torch_backend.estimates(scores, query)), step.rows.sampled
        return Chosen(indices, torch_backend.tail_log_mass(estimates, indices, step.rows, step.k, sample))

    def read_bytes(self, tokens: Tensor, k: Tensor, group_size: int, row_bytes: int) -> Tensor:
        """Every twin, K keys and values for every set, and the tail's sums."""
        assert self.encoder is not None
        selected = SelectionMethod.read_bytes(self, tokens, k, group_size, row_bytes)
        return tokens.double() * self.encoder.planes.bytes_per_token + selected
