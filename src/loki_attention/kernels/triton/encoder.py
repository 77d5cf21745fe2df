"""An encoder as the Triton kernels take it. Its packed keys lie in the tiles of the native backend."""

import torch
from jaxtyping import UInt8
from torch import Tensor

from loki_attention.core.encoder import ENCODER_TENSORS, Encoder
from loki_attention.core.shapes import Keys, Levels
from loki_attention.errors import ArgumentError, check_tokens
from loki_attention.kernels.native_arguments import ELEMENT_TYPES, TILE
from loki_attention.kernels.triton import arguments

LARGEST_RANK = 192


class TritonEncoder:
    """One layer's encoder on the device that its tensors are on.

    Raises ``ArgumentError`` for float planes, float64 encoders and shapes without kernels; the torch backend serves those.
    """

    tiled = True

    def __init__(self, encoder: Encoder) -> None:
        if encoder.planes.is_float or encoder.mean.dtype != torch.float32:
            raise ArgumentError(
                f"planes '{encoder.planes}' of a {encoder.mean.dtype} encoder have no Triton kernel; use 8, 4 or 2 bits "
                "and float32, or backend 'torch'"
            )
        self.planes, self.digest, self.source = encoder.planes, f"{encoder.digest}-tiles", encoder
        self.heads, self.dim = encoder.mean.shape
        self.rank, self.tail_rank = encoder.planes.rank, encoder.tail_rank
        if self.rank > LARGEST_RANK:
            raise ArgumentError(
                f"planes '{self.planes}' have {self.rank} dims; Triton kernels take up to {LARGEST_RANK}"
            )
        self.tensors = tuple(getattr(encoder, name).contiguous() for name in ENCODER_TENSORS)
        (self.dims, self.bits), *others = encoder.planes.planes
        self.dims_of_two = others[0].dims if others else 0

    @property
    def dims_by_bits(self) -> tuple[int, int, int]:
        """Dims in 8, 4 and 2 bits."""
        held = {bits: dims for dims, bits in self.planes.planes}
        return held.get(8, 0), held.get(4, 0), held.get(2, 0)

    def buffer(self, batch: int, slots: int) -> UInt8[Tensor, "b kv capacity bytes"]:
        """Room for the packed keys of ``slots`` slots, rounded up to whole tiles of 16; not initialised."""
        shape = (batch, self.heads, -(-slots // TILE) * TILE, self.planes.bytes_per_token)
        return torch.empty(shape, dtype=torch.uint8, device=self.tensors[0].device)

    def write(self, keys: Keys, packed: UInt8[Tensor, "b kv capacity bytes"], start: int, stop: int) -> None:
        """Write the low-rank keys of slots ``start`` to ``stop`` - 1 of ``keys`` into ``packed``, in place."""
        from loki_attention.kernels.triton.launch import encode_keys

        check_tokens("start", start, least=0)
        check_tokens("stop", stop, least=start)
        arguments.check_keys(self, keys, packed, stop)
        if keys.dtype not in ELEMENT_TYPES:
            raise arguments.refuse("keys", keys.dtype, "float32, bfloat16 or float16")
        if stop > start:
            encode_keys(self, keys, packed, start, stop)

    def project_keys(self, keys: Keys) -> Levels:
        """(k - mean) A_k, not quantised, as the encoder has it that this one was made from."""
        return self.source.project_keys(keys)

    def __deepcopy__(self, memo: object) -> "TritonEncoder":
        """Itself: nothing of it ever changes, and a copied cache may share it."""
        return self
