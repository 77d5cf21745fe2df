"""StreamingLLM (arXiv:2309.17453): the sinks and the most recent tokens, whatever the query."""

from dataclasses import dataclass
from typing import ClassVar

from loki_attention.kernels import torch_backend
from loki_attention.methods.base import Chosen, SelectionMethod, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming(SelectionMethod):
    """Attend the sinks and the K - sinks most recent tokens."""

    name: ClassVar[str] = "streaming"
    tails: ClassVar[tuple[str, ...]] = ("none", "mean")

    def choose(self, step: Step) -> Chosen:
        """The newest tokens rank highest."""
        newest = step.rows.rank[:, None, None].expand(-1, step.sets(self.per), step.rows.tokens.shape[1], -1)
        return Chosen(torch_backend.top_k(newest.double(), step.rows, step.k, self.forced))
