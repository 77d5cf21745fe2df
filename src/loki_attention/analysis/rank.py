"""How many dims the keys of each head need: rank at a variance level, and spectra, from a basis's moments.

Knows the moments that calibration kept; measures nothing and draws nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from loki_attention.core.basis import KeyBasis
from loki_attention.core.candidates import build, explained_variance, rank_at
from loki_attention.core.moments import LayerMoments
from loki_attention.errors import ArgumentError


class HeadRank(NamedTuple):
    """The rank of one KV head's keys before (``pre``) and after (``post``) RoPE."""

    layer: int
    kv_head: int
    pre: int
    post: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTable:
    """The rank of every head's keys at a level of explained variance; at most ``head_dim``."""

    variance: float
    head_dim: int
    heads: tuple[HeadRank, ...]

    @property
    def layers(self) -> dict[int, tuple[HeadRank, ...]]:
        """The heads by layer, ascending."""
        indices = sorted({head.layer for head in self.heads})
        return {i: tuple(head for head in self.heads if head.layer == i) for i in indices}

    @property
    def mean_pre(self) -> float:
        """Mean rank over layers and heads before RoPE."""
        return sum(head.pre for head in self.heads) / len(self.heads)

    @property
    def mean_post(self) -> float:
        """Mean rank over layers and heads after RoPE."""
        return sum(head.post for head in self.heads) / len(self.heads)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        means = {"mean_pre": self.mean_pre, "mean_post": self.mean_post}
        return asdict(self) | {"heads": [head._asdict() for head in self.heads]} | means


class Spectrum(NamedTuple):
    """Variance explained by the leading r dims, r = 1..D, of one layer; each the mean over its KV heads, ascending to 1.

    ``pre`` and ``post``: of the keys, in their principal axes. ``score``: of q . k, in the balanced basis, whose
    leading r dims leave the fraction 1 - score[r - 1] of its mean square (the s^2 of ``docs/concepts.md``).
    """

    pre: Float[Tensor, " d"]
    post: Float[Tensor, " d"]
    score: Float[Tensor, " d"]


def rank_table(basis: KeyBasis, variance: float = 0.9) -> RankTable:
    """Rank_l@v of every head (Loki, equation 2): the fewest principal axes that explain ``variance`` of its keys.

    Covariances are centred. Raises ``ArgumentError`` for a variance outside (0, 1] and a basis without moments.
    """
    if not 0 < variance <= 1:
        raise ArgumentError(f"variance must be above 0 and at most 1, such as 0.9; got {variance!r}")
    heads = []
    for layer, moments in sorted(_moments_of(basis).items()):
        pre = rank_at(variance, moments.pre_keys.covariance).tolist()
        post = rank_at(variance, moments.post_keys.covariance).tolist()
        heads += [HeadRank(layer, i, *ranks) for i, ranks in enumerate(zip(pre, post, strict=True))]
    return RankTable(variance=variance, head_dim=basis.spec.head_dim, heads=tuple(heads))


def spectra(basis: KeyBasis) -> dict[int, Spectrum]:
    """The explained variance curves of every layer; raises ``ArgumentError`` for a basis without moments."""
    return {layer: _spectrum(moments) for layer, moments in sorted(_moments_of(basis).items())}


def _spectrum(moments: LayerMoments) -> Spectrum:
    spread = build("balanced", moments).key_moment.diagonal(dim1=-2, dim2=-1).double().clamp(min=0)
    power = (spread**2).sort(-1, descending=True).values
    shares = (
        explained_variance(moments.pre_keys.covariance),
        explained_variance(moments.post_keys.covariance),
        power / power.sum(-1, keepdim=True),
    )
    return Spectrum(*(share.mean(0).cumsum(-1) for share in shares))


def _moments_of(basis: KeyBasis) -> Mapping[int, LayerMoments]:
    if basis.moments is None:
        raise ArgumentError(
            "this basis has no moments beside it, and ranks and spectra need them; keep moments.safetensors in the "
            "basis folder, or calibrate again"
        )
    return basis.moments
