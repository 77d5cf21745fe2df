"""From keys and queries to their low-rank codes, for given planes. The one encoder that every backend shares.

Runs in IEEE float32 (float64 for float64 models), never in the model's 16-bit type: a code must not depend on
the backend that asks for it.
"""

import hashlib
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from loki_attention.core.candidates import LayerBasis, principal_axes
from loki_attention.core.planes import DISTORTION, STEP_IN_DEVIATIONS, Planes
from loki_attention.core.shapes import Keys, Levels, PackedKeys, Queries
from loki_attention.core.tail import tail_rank

_WRITTEN_AT_ONCE = 4096


class EncodedQuery(NamedTuple):
    """What a decode step needs to know of a query, in units of the attention score (scale included).

    ``codes`` are int8 (floats for float planes) in query-head order and ``step`` turns a product with key levels
    into the score; ``deviation`` is the standard deviation of that score over tokens, ``offset`` what the score
    lacks of the true one on average: scale q . mean + kappa. ``leading`` are the first ``tail_rank`` dims of q A_q.
    """

    codes: Tensor  # (B, H, T, R)
    step: Float[Tensor, "b h t"]
    deviation: Float[Tensor, "b h t"]
    offset: Float[Tensor, "b h t"]
    leading: Float[Tensor, "b h t r1"]


ENCODER_TENSORS = ("mean", "query_map", "key_map", "deviations", "steps", "kappa")


@dataclass(frozen=True, slots=True)
class Encoder:
    """One layer's encoder for given planes; tensors per KV head, made by :func:`encoder`.

    ``digest`` names what the codes depend on: two encoders with the same digest write the same twins.
    """

    digest: str
    planes: Planes
    mean: Float[Tensor, "kv d"]
    query_map: Float[Tensor, "kv d r"]
    key_map: Float[Tensor, "kv d r"]
    deviations: Float[Tensor, "kv r"]
    steps: Float[Tensor, "kv r"]
    kappa: Float[Tensor, " kv"]

    tiled: ClassVar[bool] = False
    """Whether packed keys lie in tiles of tokens; here each token's bytes are its own."""

    @property
    def tail_rank(self) -> int:
        """Leading dims that the linear tail regresses on, R1."""
        return tail_rank(self.mean.shape[-1], self.planes.rank)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Encoder":
        """This encoder on ``device``, computing in float64 for float64 models and in float32 for all others."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = (self.mean, self.query_map, self.key_map, self.deviations, self.steps, self.kappa)
        moved = (tensor.to(device=device, dtype=compute) for tensor in tensors)
        return Encoder(f"{self.digest}-{compute}", self.planes, *moved)

    def of_heads(self, heads: slice) -> "Encoder":
        """This encoder for some of its KV heads alone; itself where they are all."""
        if heads.indices(len(self.mean)) == (0, len(self.mean), 1):
            return self
        tensors = (self.mean, self.query_map, self.key_map, self.deviations, self.steps, self.kappa)
        return Encoder(f"{self.digest}-{heads.start}:{heads.stop}", self.planes, *(tensor[heads] for tensor in tensors))

    def project_keys(self, keys: Keys) -> Levels:
        """(k - mean) A_k, not quantised: (B, Hkv, S, R) in the encoder's dtype."""
        return (keys.to(self.mean.dtype) - self.mean[:, None]) @ self.key_map

    def encode_keys(self, keys: Keys) -> PackedKeys:
        """The packed low-rank keys, ``planes.bytes_per_token`` bytes a token."""
        return self.planes.pack(self.planes.quantize(self.project_keys(keys), self.steps[:, None]))

    def buffer(self, batch: int, slots: int) -> PackedKeys:
        """Room for the low-rank keys of ``slots`` slots; not initialised."""
        shape = (batch, len(self.mean), slots, self.planes.bytes_per_token)
        return torch.empty(shape, dtype=torch.uint8, device=self.mean.device)

    def write(self, keys: Keys, packed: UInt8[Tensor, "b kv capacity bytes"], start: int, stop: int) -> None:
        """Write the low-rank keys of slots ``start`` to ``stop`` - 1 of ``keys`` into ``packed``, in place."""
        for first in range(start, stop, _WRITTEN_AT_ONCE):
            part = slice(first, min(first + _WRITTEN_AT_ONCE, stop))
            packed[:, :, part] = self.encode_keys(keys[:, :, part])

    def encode_query(self, query: Queries, scale: float) -> EncodedQuery:
        """The encoded query rows.

        The steps of the key dims fold into the query, which is then quantised per row to 8 bits at its maximum.
        """
        batch, heads, rows, _ = query.shape
        grouped = query.to(self.mean.dtype).unflatten(1, (self.mean.shape[0], -1))
        encoded = grouped @ self.query_map[:, None]
        deviation = scale * (encoded * self.deviations[:, None, None]).square().sum(-1).sqrt()
        offset = scale * (grouped @ self.mean[:, None, :, None]).squeeze(-1) + scale**2 * self.kappa[:, None, None]
        codes, step = self._quantize_query(encoded)
        leading = encoded[..., : self.tail_rank]
        per_head = (batch, heads, rows)
        return EncodedQuery(
            codes.reshape(*per_head, -1),
            (scale * step).reshape(per_head),
            deviation.reshape(per_head),
            offset.reshape(per_head),
            leading.reshape(*per_head, -1),
        )

    def _quantize_query(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        if self.planes.is_float:
            return encoded, torch.ones_like(encoded[..., 0])
        folded = encoded * self.steps[:, None, None]
        step = folded.abs().amax(-1) / 127
        codes = torch.where(step[..., None] > 0, folded / step[..., None], 0.0).round().to(torch.int8)
        return codes, step


def encoder(basis: LayerBasis, planes: Planes, group_size: int) -> Encoder:
    """The encoder of a layer for ``planes``; float32.

    For ``pca-pre`` heads the kept dims, and the dropped ones, are each rotated among themselves to the axes of their
    block of A_k^T Cov(k) A_k: scores are unchanged and every deviation below is the dim's own.
    kappa = 1 / (2 G) sum_i (A_q^T C_q A_q)_ii sd_i^2 d_i over all D dims, d_i the distortion of dim i's bits: half the
    variance of what the low-rank scores miss, before the attention scale.
    """
    planes.check_fits(basis.head_dim)
    rank, wide = planes.rank, {name: getattr(basis, name).double() for name in ("query_map", "key_map")}
    key_moment, query_moment = basis.key_moment.double(), basis.query_moment.double()
    turn = _block_axes(key_moment, rank)
    turned = torch.tensor([name == "pca-pre" for name in basis.candidates])[:, None, None]
    turn = torch.where(turned, turn, torch.eye(basis.head_dim, dtype=torch.float64))
    variances = (turn.mT @ key_moment @ turn).diagonal(dim1=-2, dim2=-1).clamp(min=0)
    query_energy = (turn.mT @ query_moment @ turn).diagonal(dim1=-2, dim2=-1)
    bits = planes.bits + (0,) * (basis.head_dim - rank)
    distortion = torch.tensor([DISTORTION[b] for b in bits], dtype=torch.float64)
    kappa = (query_energy * variances * distortion).sum(-1) / (2 * group_size)
    deviations = variances[:, :rank].sqrt()
    width = torch.tensor([STEP_IN_DEVIATIONS.get(b, 1.0) for b in planes.bits], dtype=torch.float64)
    # A dim that never varies on calibration text still needs a step above zero to be divided by.
    steps = (deviations * width).clamp(min=1e-12)
    maps = ((wide[name] @ turn)[..., :rank] for name in ("query_map", "key_map"))
    tensors = [tensor.float() for tensor in (basis.mean, *maps, deviations, steps, kappa)]
    digest = hashlib.sha256(str(planes).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return Encoder(digest.hexdigest(), planes, *tensors)


def _block_axes(symmetric: Tensor, rank: int) -> Tensor:
    blocks = (symmetric[:, :rank, :rank], symmetric[:, rank:, rank:])
    turn = torch.zeros_like(symmetric)
    turn[:, :rank, :rank] = principal_axes(blocks[0])
    if rank < symmetric.shape[-1]:
        turn[:, rank:, rank:] = principal_axes(blocks[1])
    return turn
