"""PCAAttn, the Loki paper's ablation: the low-rank scores are also the final ones. It fails; that is its use."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loki_attention.core.planes import Planes
from loki_attention.core.shapes import Queries
from loki_attention.kernels import torch_backend
from loki_attention.methods.base import Answer, Method, Step, sixteen_bit_planes


@dataclass(frozen=True, slots=True, kw_only=True)
class PcaAttention(Method):
    """Softmax over the scores of the first R principal dims, all values read (arXiv:2406.02542, PCAAttn).

    Selects nothing: the budget only says when a step is short enough to stay dense.
    """

    name: ClassVar[str] = "pca-attn"
    needs_basis: ClassVar[bool] = True
    default_dense_layers: ClassVar[tuple[int, ...]] = ()
    principal_components: ClassVar[bool] = True

    @classmethod
    def planes_by_size(cls, head_dim: int) -> tuple[Planes | None, ...]:
        """A quarter, an eighth and a sixteenth of the dims, in 16 bits as the cache has them."""
        return sixteen_bit_planes(head_dim)

    def attend(self, step: Step) -> Answer:
        """softmax(q'_{:R} K'_{:R}^T) V over every visible token."""
        assert self.encoder is not None and step.encoded is not None
        layer = step.layer
        scores = torch_backend.score_low_rank(
            step.encoded, layer.twins(self.encoder), self.encoder.planes, layer.keys.shape[1]
        )
        hidden = ~step.rows.visible[:, None, None]
        scores = step.softmax.cap(torch_backend.estimates(scores, step.encoded)).masked_fill(hidden, -torch.inf)
        if step.softmax.sink_logits is not None:
            logits = step.softmax.sink_logits.to(scores.dtype).reshape(1, scores.shape[1], -1, 1, 1)
            scores = torch.cat([scores, logits.expand(*scores.shape[:-1], 1)], dim=-1)
        weights = scores.softmax(-1)[..., : hidden.shape[-1]]
        output: Queries = (weights @ layer.values[:, :, None].to(weights.dtype)).flatten(1, 2)
        return Answer(output.to(step.query.dtype), None)

    def read_bytes(self, tokens: Tensor, k: Tensor, group_size: int, row_bytes: int) -> Tensor:
        """Every twin and every value."""
        return tokens.double() * (self.ranking_bytes + row_bytes)
