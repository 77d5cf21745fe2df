"""Native low-rank keys: the encoder as the kernels take it, the layout of packed keys, and the tail's sums."""

from functools import partial

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from loki_attention.core.encoder import EncodedQuery, Encoder
from loki_attention.core.planes import Planes
from loki_attention.core.shapes import Keys, Queries, Values
from loki_attention.core.tail import TailSums
from loki_attention.errors import ArgumentError, check_tokens
from loki_attention.kernels import native_arguments as arguments
from loki_attention.kernels.native_arguments import ELEMENT_TYPES, TILE
from loki_attention.kernels.native_extension import call, extension, operations, thread_count


class NativeEncoder:
    """One layer's encoder as the kernels take it: its tensors copied, once, with rows padded to whole vectors.

    Raises ``ArgumentError`` for float planes and float64 encoders, which the torch backend serves.
    """

    tiled = True

    def __init__(self, encoder: Encoder) -> None:
        self.planes, self.digest = encoder.planes, f"{encoder.digest}-tiles"
        if encoder.planes.is_float or encoder.mean.dtype != torch.float32:
            raise ArgumentError(
                f"planes '{encoder.planes}' of a {encoder.mean.dtype} encoder have no native kernel; use 8, 4 or 2 bits "
                "and float32, or backend 'torch'"
            )
        self.heads, self.dim = encoder.mean.shape
        self.rank, self.tail_rank = encoder.planes.rank, encoder.tail_rank
        heads, dim, rank = self.heads, self.dim, self.rank
        if dim > 256:
            raise ArgumentError(f"the head dim is {dim}; native kernels take up to 256; use backend 'torch'")
        shapes = {
            "mean": (heads, dim),
            "query_map": (heads, dim, rank),
            "key_map": (heads, dim, rank),
            "deviations": (heads, rank),
            "steps": (heads, rank),
            "kappa": (heads,),
        }
        held = [arguments.dense(name, getattr(encoder, name), torch.float32, shape) for name, shape in shapes.items()]
        words = {bits: dims * bits // 32 for dims, bits in encoder.planes.planes}
        sizes = (heads, dim, rank, self.tail_rank, words.get(8, 0), words.get(4, 0), words.get(2, 0))
        self.handle = extension().Encoder(sizes, tuple(tensor.data_ptr() for tensor in held))

    def buffer(self, batch: int, slots: int) -> UInt8[Tensor, "b kv capacity bytes"]:
        """Room for the packed keys of ``slots`` slots, rounded up to whole tiles; not initialised.

        Tiles of 16 tokens follow each other, each ``16 * bytes_per_token`` bytes: cropping is a lower count, and
        indexing the first dim picks sequences. Copy whole tiles to grow it.
        """
        capacity = -(-slots // TILE) * TILE
        return torch.empty(batch, self.heads, capacity, self.planes.bytes_per_token, dtype=torch.uint8, device="cpu")

    def write(self, keys: Keys, packed: UInt8[Tensor, "b kv capacity bytes"], start: int, stop: int) -> None:
        """Write the low-rank keys of slots ``start`` to ``stop`` - 1 of ``keys`` into ``packed``, in place."""
        encode_keys(self, keys, packed, start, stop)

    def __deepcopy__(self, memo: object) -> "NativeEncoder":
        """Itself: nothing of it ever changes, and a copied cache may share it."""
        return self


def to_tiles(packed: UInt8[Tensor, "*batch s bytes"], planes: Planes) -> UInt8[Tensor, "*batch capacity bytes"]:
    """The bytes of ``Planes.pack`` as the kernels keep them: 8- and 4-bit codes offset to be positive, words of 4 bytes
    of 16 tokens side by side. Slots beyond the last are 0."""
    offset = {8: 0x80, 4: 0x88, 2: 0}
    mask = torch.cat([torch.full((dims * bits // 8,), offset[bits], dtype=torch.uint8) for dims, bits in planes.planes])
    slots, width = packed.shape[-2:]
    padded = torch.nn.functional.pad(packed ^ mask, (0, 0, 0, -slots % TILE))
    tiles = padded.unflatten(-2, (-1, TILE)).unflatten(-1, (-1, 4))
    return tiles.transpose(-3, -2).reshape(*padded.shape[:-1], width)


def encode_keys(
    encoder: NativeEncoder,
    keys: Keys,
    packed: UInt8[Tensor, "b kv capacity bytes"],
    start: int,
    stop: int,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> None:
    """Write the low-rank keys of slots ``start`` to ``stop`` - 1 of ``keys`` into ``packed``, in place.

    ``packed`` comes from :meth:`NativeEncoder.buffer`; a partly filled tile is filled further, other slots keep theirs.
    """
    check_tokens("start", start, least=0)
    check_tokens("stop", stop, least=start)
    batch, slots = keys.shape[0], keys.shape[2]
    if stop > slots:
        raise ArgumentError(f"stop is {stop} but there are {slots} keys; give at most that")
    source = arguments.strided("keys", keys, _element_type(keys), (batch, encoder.heads, slots, encoder.dim))
    target = arguments.packed_strides(packed, (batch, encoder.heads, stop), encoder.planes)
    call(
        operations(isa).encode_keys, thread_count(threads), encoder.handle, batch, source, ELEMENT_TYPES[keys.dtype], target,
        start, stop,
    )  # fmt: skip


def encode_query(
    encoder: NativeEncoder, query: Queries, scale: float, *, isa: str | None = None, threads: int | None = None
) -> EncodedQuery:
    """The encoded query rows (``core.encoder.Encoder.encode_query``): int8 codes, float32 numbers."""
    batch, heads = query.shape[:2]
    shape = arguments.shape_of(query, query[:, : encoder.heads])
    check_encoder(encoder, shape)
    arguments.check_plain("query", query)
    # Whatever torch's default dtype and device are, the kernels write these.
    room = partial(torch.empty, device="cpu")
    codes = room(batch, heads, 1, encoder.rank, dtype=torch.int8)
    numbers = room(3, batch, heads, 1, dtype=torch.float32)
    encoded = room(batch, heads, 1, encoder.rank, dtype=torch.float32)
    query = query.contiguous()
    nothing = (0, 0, 0, 0)
    sizes = (*shape[:4], ELEMENT_TYPES[query.dtype], query.data_ptr(), 0, 0)
    attention = extension().Attention(sizes, nothing, nothing, float(scale), 0.0)
    call(
        operations(isa).encode_query, thread_count(threads), encoder.handle, attention, codes.data_ptr(),
        numbers.data_ptr(), encoded.data_ptr(),
    )  # fmt: skip
    step, deviation, offset = numbers
    return EncodedQuery(codes, step, deviation, offset, encoded[..., : encoder.tail_rank])


def absorb(
    encoder: NativeEncoder | None,
    keys: Keys,
    values: Values,
    sign: Int8[Tensor, "b s"],
    sums: TailSums,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> None:
    """Add tokens of sign 1 to the tail's sums and take away those of sign -1, in place; slots of sign 0 are not read.

    ``sums`` are float32 and contiguous: tokens (B, 1), values (B, Hkv, D), encoded (B, Hkv, R1), products
    (B, Hkv, R1, D), with R1 = 0 where there is no encoder.
    """
    batch, heads, slots, dim = keys.shape
    rank = 0 if encoder is None else encoder.tail_rank
    if encoder is not None and (heads, dim) != (encoder.heads, encoder.dim):
        raise arguments.refuse(
            "keys", tuple(keys.shape), f"{encoder.heads} heads of dim {encoder.dim} for this encoder"
        )
    if dim > 256:
        raise ArgumentError(f"the head dim is {dim}; native kernels take up to 256; use backend 'torch'")
    shape, dtype = (batch, heads, slots, dim), _element_type(keys)
    rows = (arguments.strided("keys", keys, dtype, shape), arguments.strided("values", values, dtype, shape))
    sign = arguments.dense("sign", sign, torch.int8, (batch, slots))
    arguments.in_place("sums.tokens", sums.tokens, torch.float32, (batch, 1))
    targets = (
        arguments.in_place("sums.values", sums.values, torch.float32, (batch, heads, dim)),
        arguments.in_place("sums.encoded", sums.encoded, torch.float32, (batch, heads, rank)),
        arguments.in_place("sums.products", sums.products, torch.float32, (batch, heads, rank, dim)),
    )
    call(
        operations(isa).absorb, thread_count(threads), None if encoder is None else encoder.handle,
        (batch, heads, dim, slots), *rows, ELEMENT_TYPES[dtype], sign.data_ptr(), targets,
    )  # fmt: skip
    sums.tokens.add_(sign.sum(-1, keepdim=True))


def check_encoder(encoder: NativeEncoder, shape: arguments.Shape) -> None:
    """Raise where the encoder is of other key heads or another head dim."""
    if (encoder.heads, encoder.dim) != (shape.kv_heads, shape.dim):
        got = f"{shape.kv_heads} heads of dim {shape.dim}"
        raise arguments.refuse("keys", got, f"{encoder.heads} heads of dim {encoder.dim} for this encoder")


def _element_type(keys: Tensor) -> torch.dtype:
    if keys.dtype not in ELEMENT_TYPES:
        raise arguments.refuse("keys", keys.dtype, "float32, bfloat16 or float16")
    return keys.dtype
