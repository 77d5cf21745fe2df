"""Double Sparsity (arXiv:2408.07092): rank tokens by few heavy channels of their keys, kept in few bits.

The channels are chosen offline, per layer and KV head, from the moments in the basis: the largest E[q_i^2] Var(k_i), the
mean square of what a channel adds to differences between scores (the paper takes the mean of |q_i k_i|; a channel's mean
cannot rank). The label cache holds them in 4 bits unless ``planes`` says otherwise. It is ``loki`` with channels for
axes, so that everything else is the same: fixed steps after the mean is subtracted, queries in 8 bits, the library's
rule over the group (the paper has per-token steps, and a set for every query head: ``per="query-head"``). Layer 0 stays
dense as with other methods.

Runs for real, on the native kernels too, but for a tail, whose mass is exact.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from loki_attention.core.basis import KeyBasis
from loki_attention.core.planes import Plane, Planes
from loki_attention.methods.base import Method
from loki_attention.methods.loki import Loki


@dataclass(frozen=True, slots=True, kw_only=True)
class DoubleSparsity(Loki):
    """Rank all tokens by their label cache, attend the best K exactly."""

    name: ClassVar[str] = "double-sparsity"
    tails: ClassVar[tuple[str, ...]] = ("none", "mean")
    knows_mass: ClassVar[bool] = False

    @classmethod
    def basis_for(cls, basis: KeyBasis) -> KeyBasis:
        """The basis whose axes are the channels, the heaviest first."""
        return basis.channels()

    @classmethod
    def default_planes(cls, head_dim: int, calibrated: Planes | None) -> Planes | None:
        """A quarter of the channels in 4 bits."""
        return _four_bit(head_dim // 4)

    @classmethod
    def planes_by_size(cls, head_dim: int) -> tuple[Planes | None, ...]:
        """A half, a quarter and an eighth of the channels in 4 bits."""
        return tuple(dict.fromkeys(_four_bit(head_dim // part) for part in (2, 4, 8)))

    def on(
        self, device: torch.device, dtype: torch.dtype, heads: slice = slice(None), *, backend: str = "torch"
    ) -> Method:
        """This method on ``device``; kernels would estimate a tail's mass."""
        return Loki.on(self, device, dtype, heads, backend=backend if self.tail == "none" else "torch")


def _four_bit(channels: int) -> Planes:
    """About so many channels in 4 bits, in whole words.

    >>> str(_four_bit(20)), str(_four_bit(4))
    ('16@4', '8@4')
    """
    return Planes((Plane(max(8, channels // 8 * 8), 4),))
