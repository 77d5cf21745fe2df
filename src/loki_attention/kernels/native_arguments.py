"""What the native kernels are handed: addresses, sizes and strides of tensors that were checked first.

Every check runs before an address is taken, so that no tensor of a wrong type, shape or layout reaches C++. What depends
on the values of small tensors (spans, budgets, indices) the extension checks itself.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from loki_attention.core.planes import Planes
from loki_attention.errors import ArgumentError
from loki_attention.kernels.rows import Rows, Spans

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TILE = 16
"""Tokens of one block of packed low-rank keys."""
_MOST_SLOTS = 1 << 30
LARGEST_GROUP = 64
LARGEST_HEAD_DIM = 256

Strided = tuple[int, int, int, int]


Visible = Spans | Rows


class Shape(NamedTuple):
    """Sizes of one decode step."""

    batch: int
    kv_heads: int
    group: int
    dim: int
    slots: int

    @property
    def heads(self) -> int:
        """Query heads, H."""
        return self.kv_heads * self.group

    @property
    def rows(self) -> int:
        """Sequences times key heads: what work is counted by."""
        return self.batch * self.kv_heads


def refuse(name: str, got: object, expected: str) -> ArgumentError:
    """The error for a tensor that a kernel cannot take."""
    return ArgumentError(f"{name} is {got}; native kernels take {expected}")


def check_plain(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a dense CPU tensor with memory of its own."""
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise refuse(name, f"on {tensor.device} with layout {tensor.layout}", "dense tensors on the CPU")


def check_type(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` is a CPU tensor of this type and shape."""
    if tensor.dtype != dtype or tensor.shape != shape:
        raise refuse(name, f"{tensor.dtype} of shape {tuple(tensor.shape)}", f"{dtype} of shape {shape} here")
    check_plain(name, tensor)


def dense(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor in contiguous memory, once its type and shape are right."""
    check_type(name, tensor, dtype, shape)
    return tensor.contiguous()


def in_place(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a contiguous tensor that is written."""
    check_type(name, tensor, dtype, shape)
    if not tensor.is_contiguous():
        raise refuse(name, f"strided {tensor.stride()}", "contiguous memory for what they write")
    return tensor.data_ptr()


def strided(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Strided:
    """Address and byte strides of (B, Hkv, S, D) rows, each contiguous."""
    check_type(name, tensor, dtype, shape)
    batch, head, slot, last = tensor.stride()
    if last != 1 and tensor.shape[3] > 1:
        raise refuse(name, f"strided {tensor.stride()}", "rows whose last dim is contiguous")
    size = tensor.element_size()
    return tensor.data_ptr(), batch * size, head * size, slot * size


def shape_of(query: Tensor, keys: Tensor) -> Shape:
    """The sizes of a step of ``query`` (B, H, 1, D) over ``keys`` (B, Hkv, S, D)."""
    if keys.dtype not in ELEMENT_TYPES:
        raise refuse("keys", keys.dtype, "float32, bfloat16 or float16")
    if query.dim() != 4 or keys.dim() != 4:
        raise refuse("query or keys", f"{tuple(query.shape)}, {tuple(keys.shape)}", "(B, H, 1, D) and (B, Hkv, S, D)")
    batch, heads, rows, dim = query.shape
    kv_heads, slots = keys.shape[1], keys.shape[2]
    if rows != 1:
        raise refuse("query", f"{rows} rows a sequence", "one")
    if not batch or not kv_heads or heads % kv_heads or not 0 < heads // kv_heads <= LARGEST_GROUP:
        raise refuse(
            "query", f"{heads} heads over {kv_heads} key heads", f"1 to {LARGEST_GROUP} query heads a key head"
        )
    if not 0 < dim <= LARGEST_HEAD_DIM or slots > _MOST_SLOTS:
        raise refuse(
            "keys", f"of head dim {dim} and {slots} slots", f"head dims up to 256 and slots up to {_MOST_SLOTS}"
        )
    return Shape(batch, kv_heads, heads // kv_heads, dim, slots)


def packed_strides(packed: Tensor, shape: tuple[int, int, int], planes: Planes) -> tuple[int, int, int]:
    """Address and byte strides of packed low-rank keys with room for ``shape`` = (B, Hkv, S)."""
    batch, heads, slots = shape
    width = planes.bytes_per_token
    if packed.dim() != 4 or packed.shape[2] % TILE or packed.shape[2] < slots:
        raise refuse("packed", tuple(packed.shape), f"whole tiles of {TILE} slots, at least {slots} slots")
    check_type("packed", packed, torch.uint8, (batch, heads, packed.shape[2], width))
    if packed.shape[2] and packed.stride()[2:] != (width, 1):
        raise refuse("packed", f"strided {packed.stride()}", "tiles that follow each other")
    return packed.data_ptr(), packed.stride(0), packed.stride(1)


class Seen(NamedTuple):
    """The valid slots as the extension takes them, and the tensors that the addresses point into."""

    addresses: tuple[int, int, int, int, int]
    held: tuple[Tensor, ...]


def seen(visible: Visible, shape: Shape) -> Seen:
    """The valid slots of a step."""
    per_sequence = (shape.batch,)
    if isinstance(visible, Rows):
        tokens = visible.tokens
        if tokens.dim() != 2 or tokens.shape[1] != 1:
            raise refuse("tokens", tuple(tokens.shape), "the counts of one row a sequence, (B, 1)")
        rank = dense("rank", visible.rank.long(), torch.int64, (shape.batch, shape.slots))
        tokens = dense("tokens", tokens[:, 0].long(), torch.int64, per_sequence)
        return Seen((shape.slots, 0, 0, rank.data_ptr(), tokens.data_ptr()), (rank, tokens))
    stop = dense("stop", visible.stop, torch.int64, per_sequence)
    if visible.start is None:
        return Seen((shape.slots, 0, stop.data_ptr(), 0, 0), (stop,))
    start = dense("start", visible.start, torch.int64, per_sequence)
    return Seen((shape.slots, start.data_ptr(), stop.data_ptr(), 0, 0), (start, stop))
