"""The decode kernels in C++: typed wrappers that check every tensor, then call the extension.

Knows tensors and their layout; not where indices or budgets come from. ``core`` specifies every operation; tests hold
the kernels to it on each instruction set. One query row a sequence, float32, bfloat16 or float16, on the CPU.
"""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from loki_attention.core.encoder import EncodedQuery
from loki_attention.core.shapes import Keys, PerHeadRow, Queries, Values
from loki_attention.core.tail import TAILS, TailSums, check_tail
from loki_attention.errors import ArgumentError, check_tokens
from loki_attention.kernels import native_arguments as arguments
from loki_attention.kernels.native_arguments import ELEMENT_TYPES, Visible
from loki_attention.kernels.native_encoder import (
    NativeEncoder,
    absorb,
    check_encoder,
    encode_keys,
    encode_query,
    to_tiles,
)
from loki_attention.kernels.native_extension import (
    ISA_VARIABLE,
    available,
    call,
    cpu_features,
    extension,
    isa,
    operations,
    thread_count,
    usable_isas,
)
from loki_attention.kernels.rows import Spans

__all__ = [
    "ISA_VARIABLE",
    "NativeEncoder",
    "NativeStep",
    "Selected",
    "Spans",
    "Visible",
    "absorb",
    "attend",
    "available",
    "cpu_features",
    "decode_step",
    "dense_decode",
    "encode_keys",
    "encode_query",
    "extension",
    "gather_probe",
    "isa",
    "select",
    "streaming_probe",
    "to_tiles",
    "usable_isas",
]


class Selected(NamedTuple):
    """Slots per KV head, ascending and padded with -1, and the tail's log-mass t per query head."""

    indices: Int[Tensor, "b kv 1 k"]
    log_mass: PerHeadRow


def select(
    encoder: NativeEncoder,
    query: EncodedQuery,
    packed: UInt8[Tensor, "b kv capacity bytes"],
    visible: Visible,
    k: Int[Tensor, " b"],
    *,
    slots: int,
    sinks: int,
    recent: int,
    soft_cap: float | None = None,
    isa: str | None = None,
    threads: int | None = None,
) -> Selected:
    """The K best slots of each sequence and KV head by their low-rank keys, and what the rest weighs together.

    Forced tokens (the first ``sinks``, the last ``recent`` of the valid ones) are in; ties go to the lower slot.
    ``slots`` are those in use. Raises ``ArgumentError`` where ``k`` cannot hold the forced tokens or exceeds the valid.
    """
    batch, heads, _, rank = query.codes.shape
    shape = arguments.Shape(batch, encoder.heads, heads // encoder.heads, encoder.dim, slots)
    if heads % encoder.heads or not 0 < shape.group <= 64:
        raise arguments.refuse("query", f"{heads} heads", f"1 to 64 for each of {encoder.heads} key heads")
    per_row = (batch, heads, 1)
    codes = arguments.dense("query.codes", query.codes, torch.int8, (*per_row, encoder.rank))
    numbers = [
        arguments.dense(f"query.{name}", getattr(query, name), torch.float32, per_row)
        for name in ("step", "deviation", "offset")
    ]
    selection = _Selection(encoder, packed, k, shape, sinks, recent, wants_indices=True, wants_mass=True)
    seen = arguments.seen(visible, shape)
    nothing = (0, 0, 0, 0)
    sizes = (shape.batch, shape.kv_heads, shape.group, shape.dim, 0, 0, 0, 0)
    attention = extension().Attention(sizes, nothing, nothing, 1.0, _soft_cap(soft_cap))
    addresses = (codes.data_ptr(), *(tensor.data_ptr() for tensor in numbers))
    call(
        operations(isa).select,
        thread_count(threads),
        encoder.handle,
        attention,
        seen.addresses,
        selection.numbers,
        addresses,
    )
    assert selection.indices is not None and selection.log_mass is not None and rank == encoder.rank
    return Selected(selection.indices[:, :, None], selection.log_mass)


def attend(
    query: Queries,
    keys: Keys,
    values: Values,
    indices: Int[Tensor, "b kv 1 k"],
    scale: float,
    *,
    tail_mass: PerHeadRow | None = None,
    tail_values: Float[Tensor, "b h 1 d"] | None = None,
    soft_cap: float | None = None,
    learned_sinks: Float[Tensor, " h"] | None = None,
    isa: str | None = None,
    threads: int | None = None,
) -> Queries:
    """Exact softmax attention over the indexed slots (int32 or int64), and over the tail's virtual token if given.

    Only indexed rows are read. ``soft_cap`` c turns a score s into c tanh(s / c); a learned sink joins the
    denominator with no value. Where nothing is attended the output is 0.
    """
    attention = _Attention(query, keys, values, scale, soft_cap, learned_sinks)
    shape = attention.shape
    table, held = _index_table(indices, shape)
    tail: tuple[int, int] = (0, 0)
    parts: list[Tensor] = []
    if tail_mass is not None and tail_values is not None:
        parts.append(arguments.dense("tail_mass", tail_mass, torch.float32, (shape.batch, shape.heads, 1)))
        expected = (shape.batch, shape.heads, 1, shape.dim)
        parts.append(arguments.dense("tail_values", tail_values.float(), torch.float32, expected))
        tail = (parts[0].data_ptr(), parts[1].data_ptr())
    call(operations(isa).attend, thread_count(threads), attention.handle, table, *tail)
    del held
    return attention.output


def dense_decode(
    query: Queries,
    keys: Keys,
    values: Values,
    visible: Visible,
    scale: float,
    *,
    soft_cap: float | None = None,
    learned_sinks: Float[Tensor, " h"] | None = None,
    isa: str | None = None,
    threads: int | None = None,
) -> Queries:
    """Exact softmax attention over all valid slots, by the same kernels as :func:`attend`."""
    attention = _Attention(query, keys, values, scale, soft_cap, learned_sinks)
    seen = arguments.seen(visible, attention.shape)
    call(operations(isa).dense, thread_count(threads), attention.handle, seen.addresses)
    return attention.output


class NativeStep(NamedTuple):
    """Output of a decode step and, where asked for, the selected slots, the tail's log-mass and the mass kept.

    ``kept`` is the tail's estimate of the attention mass on the selected slots (learned sinks left out), float32, NaN
    where there is no tail.
    """

    output: Queries
    indices: Int[Tensor, "b kv 1 k"] | None
    log_mass: PerHeadRow | None
    kept: PerHeadRow | None


def decode_step(
    encoder: NativeEncoder,
    query: Queries,
    keys: Keys,
    values: Values,
    packed: UInt8[Tensor, "b kv capacity bytes"],
    visible: Visible,
    k: Int[Tensor, " b"],
    scale: float,
    *,
    sinks: int,
    recent: int,
    tail: str = "none",
    sums: TailSums | None = None,
    soft_cap: float | None = None,
    learned_sinks: Float[Tensor, " h"] | None = None,
    wants_indices: bool = False,
    wants_mass: bool = False,
    wants_kept: bool = False,
    isa: str | None = None,
    threads: int | None = None,
) -> NativeStep:
    """One decode step of Loki over a layer: encode the query, select, and attend with the tail (core.attention).

    Everything between the query and its output in one call. ``packed`` must be up to date with ``keys``; ``sums`` are
    the tail's (needed unless ``tail`` is "none"), and a sequence whose sums cover nothing has no tail.
    """
    attention = _Attention(query, keys, values, scale, soft_cap, learned_sinks)
    shape = attention.shape
    check_encoder(encoder, shape)
    selection = _Selection(encoder, packed, k, shape, sinks, recent, wants_indices, wants_mass, wants_kept)
    seen = arguments.seen(visible, shape)
    addresses, held = _sum_addresses(tail, sums, encoder, shape)
    call(
        operations(isa).decode_step, thread_count(threads), encoder.handle, attention.handle, seen.addresses,
        selection.numbers, TAILS.index(tail), addresses,
    )  # fmt: skip
    del held
    indices = selection.indices
    indices = None if indices is None else indices[:, :, None]
    return NativeStep(attention.output, indices, selection.log_mass, selection.kept)


def streaming_probe(
    *tensors: Tensor, ahead_bytes: int = 4096, isa: str | None = None, threads: int | None = None
) -> int:
    """The XOR of all lines of contiguous tensors, each fetched ``ahead_bytes`` before it is read. For benchmarks."""
    result = 0
    for tensor in tensors:
        arguments.check_plain("tensor", tensor)
        if not tensor.is_contiguous():
            raise arguments.refuse("tensor", f"strided {tensor.stride()}", "contiguous memory to stream")
        size = tensor.numel() * tensor.element_size()
        result ^= operations(isa).stream(thread_count(threads), tensor.data_ptr(), size, ahead_bytes)
    return result


def gather_probe(
    query: Queries,
    keys: Keys,
    values: Values,
    indices: Int[Tensor, "b kv 1 k"],
    *,
    ahead_tokens: int = 64,
    isa: str | None = None,
    threads: int | None = None,
) -> int:
    """The XOR of the rows that :func:`attend` would read, in its order, fetched ``ahead_tokens`` before. For benchmarks."""
    attention = _Attention(query, keys, values, 1.0, None, None)
    table, held = _index_table(indices, attention.shape)
    result: int = call(operations(isa).gather, thread_count(threads), attention.handle, table, ahead_tokens)
    del held
    return result


class _Attention:
    """A step's query, K and V, checked; keeps alive what the handle's addresses point into."""

    def __init__(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, soft_cap: float | None, sinks: Tensor | None
    ) -> None:
        self.shape = shape = arguments.shape_of(query, keys)
        dtype = keys.dtype
        self._query = arguments.dense("query", query, dtype, (shape.batch, shape.heads, 1, shape.dim))
        rows = (shape.batch, shape.kv_heads, shape.slots, shape.dim)
        strided = (arguments.strided("keys", keys, dtype, rows), arguments.strided("values", values, dtype, rows))
        self._sinks = None
        if sinks is not None:
            self._sinks = arguments.dense("learned_sinks", sinks.float(), torch.float32, (shape.heads,))
        self.output = torch.empty_like(self._query)
        addresses = (
            self._query.data_ptr(),
            self.output.data_ptr(),
            0 if self._sinks is None else self._sinks.data_ptr(),
        )
        sizes = (*shape[:4], ELEMENT_TYPES[dtype], *addresses)
        self.handle = extension().Attention(sizes, *strided, float(scale), _soft_cap(soft_cap))


class _Selection:
    """What to select and where the answer goes, checked."""

    def __init__(
        self,
        encoder: NativeEncoder,
        packed: Tensor,
        k: Tensor,
        shape: arguments.Shape,
        sinks: int,
        recent: int,
        wants_indices: bool,
        wants_mass: bool,
        wants_kept: bool = False,
    ) -> None:
        check_tokens("sinks", sinks, least=0)
        check_tokens("recent", recent, least=0)
        place = arguments.packed_strides(packed, (shape.batch, shape.kv_heads, shape.slots), encoder.planes)
        self._k = arguments.dense("k", k, torch.int64, (shape.batch,))
        width = max(0, int(self._k.max())) if wants_indices else 0
        width = min(width, shape.slots)
        # Whatever torch's default dtype and device are, the kernels write these.
        room = partial(torch.empty, device="cpu")
        per_head = (shape.batch, shape.heads, 1)
        self.indices = room(shape.batch, shape.kv_heads, width, dtype=torch.int32) if wants_indices else None
        self.log_mass = room(per_head, dtype=torch.float32) if wants_mass else None
        self.kept = room(per_head, dtype=torch.float32) if wants_kept else None
        out = (0 if self.indices is None else self.indices.data_ptr(), width)
        figures = (0 if tensor is None else tensor.data_ptr() for tensor in (self.log_mass, self.kept))
        self.numbers = (*place, self._k.data_ptr(), sinks, recent, *out, *figures)


def _index_table(indices: Tensor, shape: arguments.Shape) -> tuple[tuple[int, int, int, int], Tensor]:
    if indices.dtype not in (torch.int32, torch.int64):
        raise arguments.refuse("indices", indices.dtype, "int32 or int64")
    expected = (shape.batch, shape.kv_heads, 1, indices.shape[-1])
    held = arguments.dense("indices", indices, indices.dtype, expected)
    return (held.data_ptr(), held.element_size(), held.shape[-1], shape.slots), held


def _sum_addresses(
    tail: str, sums: TailSums | None, encoder: NativeEncoder, shape: arguments.Shape
) -> tuple[tuple[int, ...], list[Tensor]]:
    check_tail(tail)
    if tail == "none":
        return (0, 0, 0, 0), []
    if sums is None:
        raise ArgumentError(f"tail {tail!r} needs the tail's sums; give sums= or tail='none'")
    batch, heads, dim = shape.batch, shape.kv_heads, shape.dim
    rank = encoder.tail_rank if tail == "linear" else sums.encoded.shape[-1]
    shapes = ((batch, 1), (batch, heads, dim), (batch, heads, rank), (batch, heads, rank, dim))
    parts = zip(TailSums._fields, sums, shapes, strict=True)
    held = [arguments.dense(f"sums.{name}", tensor, torch.float32, expected) for name, tensor, expected in parts]
    return tuple(tensor.data_ptr() for tensor in held), held


def _soft_cap(value: float | None) -> float:
    if value is None:
        return 0.0
    if not value > 0:
        raise ArgumentError(f"soft_cap is {value}; it must be above 0, or None for none")
    return float(value)
