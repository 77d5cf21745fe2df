"""What the Triton kernels are handed, checked: types, shapes, layout and place of tensors. Looks at no tensor's content."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from loki_attention.core.tail import TailSums
from loki_attention.errors import ArgumentError
from loki_attention.kernels.native_arguments import ELEMENT_TYPES, LARGEST_GROUP, LARGEST_HEAD_DIM, TILE, Shape, Visible
from loki_attention.kernels.rows import Rows

if TYPE_CHECKING:
    from loki_attention.kernels.triton.encoder import TritonEncoder

FROM_ZERO, SPANS, HOLES = 0, 1, 2
_MOST_SLOTS = 1 << 25


def refuse(name: str, got: object, expected: str) -> ArgumentError:
    """The error for a tensor that a kernel cannot take."""
    return ArgumentError(f"{name} is {got}; Triton kernels take {expected}")


def shape_of(query: Tensor, keys: Tensor, values: Tensor) -> Shape:
    """The sizes of a step of ``query`` (B, H, 1, D) over ``keys`` and ``values`` (B, Hkv, S, D)."""
    if keys.dtype not in ELEMENT_TYPES:
        raise refuse("keys", keys.dtype, "float32, bfloat16 or float16")
    if query.dim() != 4 or keys.dim() != 4:
        raise refuse("query or keys", f"{tuple(query.shape)}, {tuple(keys.shape)}", "(B, H, 1, D) and (B, Hkv, S, D)")
    batch, kv_heads, slots, dim = keys.shape
    heads = query.shape[1]
    if not batch or not kv_heads or heads % kv_heads or not 0 < heads // kv_heads <= LARGEST_GROUP:
        raise refuse("query", f"{heads} heads over {kv_heads} key heads", f"1 to {LARGEST_GROUP} heads a key head")
    if not 0 < dim <= LARGEST_HEAD_DIM or slots > _MOST_SLOTS:
        raise refuse("keys", f"of head dim {dim} and {slots} slots", f"head dims up to 256, slots up to {_MOST_SLOTS}")
    check("query", query, keys.dtype, (batch, heads, 1, dim), keys.device)
    check("values", values, keys.dtype, tuple(keys.shape), keys.device)
    for name, tensor in (("query", query), ("keys", keys), ("values", values)):
        check_last(name, tensor)
    return Shape(batch, kv_heads, heads // kv_heads, dim, slots)


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless ``tensor`` is of this type, shape and device."""
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device:
        got = f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        raise refuse(name, got, f"{dtype} of shape {shape} on {device} here")


def check_last(name: str, tensor: Tensor) -> None:
    """Raise unless the last dim is contiguous."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise refuse(name, f"strided {tensor.stride()}", "rows whose last dim is contiguous")


def check_whole(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless ``tensor`` is contiguous, of this type, shape and device."""
    check(name, tensor, dtype, shape, device)
    if not tensor.is_contiguous():
        raise refuse(name, f"strided {tensor.stride()}", "contiguous memory")


def check_keys(encoder: "TritonEncoder", keys: Tensor, packed: Tensor, slots: int) -> None:
    """Raise where keys or packed keys are not the encoder's, or have no room for ``slots``."""
    if keys.dim() != 4 or (keys.shape[1], keys.shape[3]) != (encoder.heads, encoder.dim):
        raise refuse("keys", tuple(keys.shape), f"{encoder.heads} heads of dim {encoder.dim} for this encoder")
    if slots > keys.shape[2]:
        raise ArgumentError(f"{slots} slots are asked for but there are {keys.shape[2]} keys; give at most that")
    check_last("keys", keys)
    width = encoder.planes.bytes_per_token
    if packed.dim() != 4 or packed.shape[2] % TILE or packed.shape[2] < slots:
        raise refuse("packed", tuple(packed.shape), f"whole tiles of {TILE} slots, at least {slots} slots")
    check("packed", packed, torch.uint8, (len(keys), encoder.heads, packed.shape[2], width), keys.device)
    if packed.stride()[2:] != (width, 1) or packed.stride(0) % 4 or packed.stride(1) % 4 or packed.data_ptr() % 16:
        raise refuse("packed", f"strided {packed.stride()}", "tiles that follow each other, in words of 4 bytes")
    if encoder.tensors[0].device != keys.device:
        raise refuse("keys", f"on {keys.device}", f"keys on {encoder.tensors[0].device}, where their encoder is")


def check_sums(sums: TailSums, shape: Shape, rank: int, device: torch.device) -> None:
    """Raise unless the tail's sums are contiguous float32 of this step's shape."""
    per_row = (shape.batch, shape.kv_heads)
    shapes = ((shape.batch, 1), (*per_row, shape.dim), (*per_row, rank), (*per_row, rank, shape.dim))
    for name, tensor, expected in zip(TailSums._fields, sums, shapes, strict=True):
        check_whole(f"sums.{name}", tensor, torch.float32, expected, device)


class Seen(NamedTuple):
    """The valid slots as kernels take them: how they are given, and first, end, count and places (or anything, unused)."""

    kind: int
    start: Tensor
    stop: Tensor
    tokens: Tensor
    rank: Tensor


def seen(visible: Visible, shape: Shape, device: torch.device) -> Seen:
    """The valid slots of a step. Sequences with holes cost a few small operations of torch's."""
    per_sequence = (shape.batch,)
    if isinstance(visible, Rows):
        if visible.tokens.shape != (shape.batch, 1):
            raise refuse("tokens", tuple(visible.tokens.shape), "the counts of one row a sequence, (B, 1)")
        rank, tokens = visible.rank.long().contiguous(), visible.tokens[:, 0].long().contiguous()
        check("rank", rank, torch.int64, (shape.batch, shape.slots), device)
        start = (rank == 0).int().argmax(-1)
        return Seen(HOLES, start, torch.full_like(start, shape.slots), tokens, rank)
    check_whole("stop", visible.stop, torch.int64, per_sequence, device)
    if visible.start is None:
        return Seen(FROM_ZERO, visible.stop, visible.stop, visible.stop, visible.stop)
    check_whole("start", visible.start, torch.int64, per_sequence, device)
    return Seen(SPANS, visible.start, visible.stop, visible.stop, visible.stop)
