"""Loki as the paper has it: rotated keys in floats, top-k per query head, nothing forced, every layer sparse."""

from dataclasses import dataclass
from typing import ClassVar

from loki_attention.core.planes import Planes
from loki_attention.kernels import torch_backend
from loki_attention.methods.base import sixteen_bit_planes
from loki_attention.methods.loki import Loki


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperLoki(Loki):
    """Algorithm 1 of arXiv:2406.02542. Rotated keys stand beside the cache; scores equal those of rotating it."""

    name: ClassVar[str] = "paper-loki"
    tails: ClassVar[tuple[str, ...]] = ("none", "mean")
    knows_mass: ClassVar[bool] = False
    default_dense_layers: ClassVar[tuple[int, ...]] = ()
    principal_components: ClassVar[bool] = True

    per: str = "query-head"

    @classmethod
    def planes_by_size(cls, head_dim: int) -> tuple[Planes | None, ...]:
        """A quarter, an eighth and a sixteenth of the dims, in 16 bits as the cache has them."""
        return sixteen_bit_planes(head_dim)

    @property
    def forced(self) -> torch_backend.Forced:
        """Nothing."""
        return torch_backend.Forced(0, 0)
