"""The planes of a low-rank key: which leading dims are kept, and in how many bits.

Knows the grammar, the quantiser and the packed bytes; not where the encoded values come from.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from loki_attention.errors import ArgumentError

STEP_IN_DEVIATIONS = {8: 4 / 127, 4: 2.5 / 7, 2: 0.996}
"""Width of one quantisation level in standard deviations of the dim, by bits."""
DISTORTION = {0: 1.0, 2: 0.118, 4: 0.013, 8: 9e-5, 16: 0.0, 32: 0.0}
"""Mean squared quantisation error of a unit Gaussian, by bits; 0 bits is a dropped dim."""
_LARGEST_CODE = {8: 127, 4: 7}
_FLOAT_TYPE = {16: torch.bfloat16, 32: torch.float32}
_GRAMMAR = re.compile(r"([1-9]\d*)@(2|4|8|16|32)|([1-9]\d*)@4\+([1-9]\d*)@2")


class Plane(NamedTuple):
    """``dims`` consecutive dims of a low-rank key, ``bits`` each."""

    dims: int
    bits: int


@dataclass(frozen=True, slots=True)
class Planes:
    """The layout of a low-rank key: at most one 4-bit plane followed by one 2-bit plane, or a single plane.

    Grammar: ``R@8``, ``R@4``, ``R@2``, ``R@4+M@2``; ``R@16`` (bfloat16) and ``R@32`` (float32) for research.
    A plane fills whole 4-byte words: its dims are a multiple of 32 / bits.

    >>> planes = Planes.parse("16@4+32@2")
    >>> planes.rank, planes.bytes_per_token, str(planes)
    (48, 16, '16@4+32@2')
    """

    planes: tuple[Plane, ...]

    @classmethod
    def parse(cls, text: str) -> "Planes":
        """The planes that ``text`` names; raises ``ArgumentError`` outside the grammar."""
        match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ArgumentError(
                f"planes {text!r} are outside the grammar; write R@8, R@4, R@2 or R@4+M@2, such as '16@4+32@2' "
                "(R@16 and R@32 keep floats, for research)"
            )
        one_dims, one_bits, four, two = match.groups()
        planes = (Plane(int(one_dims), int(one_bits)),) if one_dims else (Plane(int(four), 4), Plane(int(two), 2))
        for dims, bits in planes:
            if dims % (32 // bits):
                raise ArgumentError(
                    f"planes {text!r}: a {bits}-bit plane fills whole 4-byte words, so its dims must be a multiple "
                    f"of {32 // bits}; got {dims}"
                )
        return cls(planes)

    @classmethod
    def of(cls, value: object) -> "Planes":
        """``value`` where it is planes, the planes it names where it is text; raises ``ArgumentError`` for all else."""
        planes = cls.parse(value) if isinstance(value, str) else value
        if not isinstance(planes, cls):
            raise ArgumentError(f"planes must be a string such as '16@4+32@2' or Planes, got {value!r}")
        return planes

    @classmethod
    def default(cls, head_dim: int) -> "Planes":
        """A quarter of the dims in 4 bits and a half in 2, rounded up to whole words, at most ``head_dim`` in all.

        >>> [str(Planes.default(d)) for d in (16, 40, 64, 80, 128)]
        ['8@4', '16@4+16@2', '16@4+32@2', '24@4+48@2', '32@4+64@2']
        """
        four = -(-head_dim // 4 // 8) * 8 if head_dim >= 8 else 0
        if not four:
            raise ArgumentError(f"a head dim of {head_dim} is too small for low-rank keys; at least 8 is needed")
        two = min(-(-head_dim // 2 // 16) * 16, (head_dim - four) // 16 * 16)
        return cls((Plane(four, 4), Plane(two, 2)) if two else (Plane(four, 4),))

    @property
    def rank(self) -> int:
        """Dims of a low-rank key, R."""
        return sum(plane.dims for plane in self.planes)

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of each of the R dims."""
        return tuple(plane.bits for plane in self.planes for _ in range(plane.dims))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's low-rank key per KV head."""
        return sum(plane.dims * plane.bits for plane in self.planes) // 8

    @property
    def is_float(self) -> bool:
        """Whether the dims are kept as floats (``R@16``, ``R@32``) and queries are not quantised either."""
        return self.planes[0].bits in _FLOAT_TYPE

    def check_fits(self, head_dim: int) -> None:
        """Raise ``ArgumentError`` where the planes have more dims than the head."""
        if self.rank > head_dim:
            raise ArgumentError(
                f"planes '{self}' have {self.rank} dims but the head dim is {head_dim}; give at most {head_dim}"
            )

    def __str__(self) -> str:
        return "+".join(f"{plane.dims}@{plane.bits}" for plane in self.planes)

    def quantize(self, encoded: Float[Tensor, "*batch s r"], steps: Float[Tensor, "*heads 1 r"]) -> Tensor:
        """Levels of encoded keys in units of ``steps``: whole numbers, halves in 2-bit dims; floats pass through.

        8 bits: -127..127, 4 bits: -7..7, 2 bits: -1.5, -.5, .5, 1.5 (the code u in 0..3, less 1.5). Half-way cases
        round to even.

        >>> Planes.parse("16@2").quantize(torch.tensor([[-9.0, -0.1, 0.1, 9.0] * 4]), torch.ones(1, 16))[0, :4]
        tensor([-1.5000, -0.5000,  0.5000,  1.5000])
        """
        if self.is_float:
            return encoded.to(_FLOAT_TYPE[self.planes[0].bits]).to(encoded.dtype)
        scaled = encoded / steps
        parts = []
        for (_, bits), part in zip(self.planes, self._split(scaled), strict=True):
            if bits == 2:
                parts.append((part + 1.5).round().clamp(0, 3) - 1.5)
            else:
                parts.append(part.round().clamp(-_LARGEST_CODE[bits], _LARGEST_CODE[bits]))
        return torch.cat(parts, dim=-1)

    def pack(self, levels: Float[Tensor, "*batch s r"]) -> UInt8[Tensor, "*batch s bytes"]:
        """The bytes of quantised keys: planes one after the other, within a byte the lower dim in the lower bits."""
        parts = []
        for (_, bits), part in zip(self.planes, self._split(levels), strict=True):
            if bits in _FLOAT_TYPE:
                parts.append(part.to(_FLOAT_TYPE[bits]).contiguous().view(torch.uint8))
                continue
            codes = (part + 1.5 if bits == 2 else part).to(torch.int16) & ((1 << bits) - 1)
            per_byte = codes.unflatten(-1, (-1, 8 // bits))
            shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.int16)
            parts.append((per_byte << shifts).sum(-1).to(torch.uint8))
        return torch.cat(parts, dim=-1)

    def unpack(self, packed: UInt8[Tensor, "*batch s bytes"], dtype: torch.dtype = torch.float32) -> Tensor:
        """The levels that :meth:`pack` wrote, as ``dtype``."""
        parts, start = [], 0
        for dims, bits in self.planes:
            part = packed[..., start : start + dims * bits // 8]
            start += dims * bits // 8
            if bits in _FLOAT_TYPE:
                parts.append(part.contiguous().view(_FLOAT_TYPE[bits]).to(dtype))
                continue
            shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
            codes = ((part[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2).to(dtype)
            half = 1 << (bits - 1)
            parts.append(codes - 1.5 if bits == 2 else torch.where(codes >= half, codes - 2 * half, codes))
        return torch.cat(parts, dim=-1)

    def _split(self, tensor: Shaped[Tensor, "*batch r"]) -> tuple[Tensor, ...]:
        return tensor.split([plane.dims for plane in self.planes], dim=-1)
