"""Streaming first and second moments of queries and keys, in float64. Knows nothing of models or files."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(slots=True)
class Moments:
    """Running count, sum and sum of outer products of vectors, per KV head.

    ``count`` vectors per head; ``total`` (Hkv, D) and ``outer`` (Hkv, D, D) in float64.
    """

    count: int
    total: Float[Tensor, "kv d"]
    outer: Float[Tensor, "kv d d"]

    @classmethod
    def empty(cls, kv_heads: int, head_dim: int) -> "Moments":
        """Moments of nothing."""
        zeros = torch.zeros(kv_heads, head_dim, head_dim, dtype=torch.float64)
        return cls(0, zeros[:, 0].clone(), zeros)

    def add(self, vectors: Float[Tensor, "kv n d"]) -> None:
        """Add ``n`` vectors a head, in place; sums are float64 whatever the input's dtype."""
        wide = vectors.detach().to(torch.float64)
        self.count += vectors.shape[1]
        self.total += wide.sum(1).cpu()
        self.outer += (wide.mT @ wide).cpu()

    def merge(self, other: "Moments") -> None:
        """Add another run's moments, in place."""
        self.count += other.count
        self.total += other.total
        self.outer += other.outer

    @property
    def mean(self) -> Float[Tensor, "kv d"]:
        """E[x]."""
        return self.total / self.count

    @property
    def second_moment(self) -> Float[Tensor, "kv d d"]:
        """E[x x^T], not centred."""
        return self.outer / self.count

    @property
    def covariance(self) -> Float[Tensor, "kv d d"]:
        """E[x x^T] - E[x] E[x]^T."""
        return self.second_moment - self.mean[:, :, None] * self.mean[:, None, :]


@dataclass(slots=True)
class LayerMoments:
    """Moments of one layer's keys before and after RoPE and of its queries after RoPE.

    The queries of a group are pooled as they are: their count is G times the keys'.
    """

    pre_keys: Moments
    post_keys: Moments
    queries: Moments

    @classmethod
    def empty(cls, kv_heads: int, head_dim: int) -> "LayerMoments":
        """Moments of nothing."""
        return cls(*(Moments.empty(kv_heads, head_dim) for _ in range(3)))

    def merge(self, other: "LayerMoments") -> None:
        """Add another run's moments, in place."""
        self.pre_keys.merge(other.pre_keys)
        self.post_keys.merge(other.post_keys)
        self.queries.merge(other.queries)

    @property
    def group_size(self) -> int:
        """Query heads that share a key head, G."""
        return self.queries.count // self.post_keys.count

    @property
    def group_query_moment(self) -> Float[Tensor, "kv d d"]:
        """E[sum over the group of q q^T]: C_q of ``docs/concepts.md``."""
        return self.queries.second_moment * self.group_size
