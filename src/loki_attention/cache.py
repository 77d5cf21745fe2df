"""One layer's preallocated K/V, its low-rank twins and the tail's sums. Plain torch; knows no model and no method.

K and V stay as the model wrote them. Twins and sums follow from them and are brought up to date when a sparse step
asks, so that any cache operation only has to keep them consistent with the rows that are left.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from loki_attention.core.encoder import Encoder
from loki_attention.core.shapes import Keys, PackedKeys, Values
from loki_attention.core.tail import TailSums, covered_tokens
from loki_attention.errors import ArgumentError
from loki_attention.kernels import native
from loki_attention.kernels.native import NativeEncoder
from loki_attention.kernels.rows import Rows
from loki_attention.kernels.torch_backend import leading_dims
from loki_attention.kernels.triton.encoder import TritonEncoder

KeyEncoder = Encoder | NativeEncoder | TritonEncoder


@dataclass(slots=True)
class Twins:
    """The packed low-rank keys of the first ``encoded`` slots, by one encoder."""

    encoder: KeyEncoder
    packed: Tensor  # (B, Hkv, capacity, bytes) uint8
    encoded: int = 0


@dataclass(slots=True)
class Tail:
    """The tail's sums over each sequence's first ``covered`` valid tokens, and the slot ranks they were taken by.

    ``covered`` is what ``sums.tokens`` says, as the rows of the last forward had it: layers share the tensor.
    """

    encoder: KeyEncoder | None
    sums: TailSums  # tokens (B, 1), values (B, Hkv, D), encoded (B, Hkv, R1), products (B, Hkv, R1, D)
    rank: Int[Tensor, "b s"]
    covered: Int[Tensor, " b"]


@dataclass(slots=True)
class Watched:
    """What a method that has to see every row noted of those so far; every tensor has one entry a sequence.

    The rows of the first ``rows`` slots went by, all of them noted if ``complete``. ``notes`` speak of the first
    ``covered`` slots. ``prompt_tokens`` (B,) is how many tokens each sequence's last prompt row saw.
    """

    owner: str = ""
    rows: int = 0
    complete: bool = True
    covered: int = 0
    prompt_tokens: Int[Tensor, " b"] | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)

    def copy_for(self, owner: str) -> "Watched":
        """The same notes as those of ``owner``, to go on from; these stay as they are."""
        return replace(self, owner=owner, notes=dict(self.notes))

    def follow(self, owner: str, first: int, slots: int) -> None:
        """The rows of slots ``first`` to ``slots`` - 1 come next, for ``owner``; what was noted before may not fit."""
        if first == 0 or owner != self.owner or first != self.rows:
            self._forget()
            self.owner, self.complete = owner, first == 0
        self.rows = slots

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` slots; notes of others cannot be taken back, so then all are forgotten."""
        if tokens < self.covered:
            self._forget()
            self.complete = False
        self.rows = min(self.rows, tokens)

    def select_batch(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by ``pick`` of it."""
        self.notes = {name: pick(tensor) for name, tensor in self.notes.items()}
        if self.prompt_tokens is not None:
            self.prompt_tokens = pick(self.prompt_tokens)

    def _forget(self) -> None:
        self.covered, self.prompt_tokens, self.notes = 0, None, {}


class LayerCache:
    """Keys and values of one layer in buffers that grow by a quarter, with what is derived from them beside.

    ``length`` slots are in use. ``keys`` and ``values`` are views (B, Hkv, length, D) of the buffers.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.wanted_capacity = capacity
        self.length = 0
        self.twins: Twins | None = None
        self.tail: Tail | None = None
        self.watched = Watched()
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def keys(self) -> Keys | None:
        """The cached keys, or None before the first append."""
        return None if self._keys is None else self._keys[:, :, : self.length]

    @property
    def values(self) -> Values | None:
        """The cached values, or None before the first append."""
        return None if self._values is None else self._values[:, :, : self.length]

    @property
    def capacity(self) -> int:
        """Slots that fit without growing."""
        return 0 if self._keys is None else self._keys.shape[2]

    @property
    def bytes(self) -> dict[str, int]:
        """Resident bytes of the K/V buffers, the twins, and the tail's sums with what a method noted."""
        buffers = [t for t in (self._keys, self._values) if t is not None]
        sums = [*([] if self.tail is None else self.tail.sums), *self.watched.notes.values()]
        twins = [] if self.twins is None else [self.twins.packed]
        parts = {"cache": buffers, "twins": twins, "sums": sums}
        return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in parts.items()}

    def append(self, keys: Keys, values: Values) -> None:
        """Write new tokens behind the last slot; grows the buffers where they are full.

        Raises ``ArgumentError`` for tokens of another batch or another model than those held.
        """
        new = self.length + keys.shape[2]
        if self._keys is None or self._values is None:
            room = max(new, self.wanted_capacity)
            self._keys, self._values = (_buffer_like(tensor, room) for tensor in (keys, values))
        elif keys.shape[:2] != self._keys.shape[:2] or keys.shape[3] != self._keys.shape[3]:
            held, given = ((b, h, d) for b, h, _, d in (self._keys.shape, keys.shape))
            raise ArgumentError(
                f"the cache was filled for (sequences, key heads, dims) = {held}, the model now gives {given}; pass a cache "
                "of this model and this batch"
            )
        elif new > self.capacity:
            room = max(new, self.wanted_capacity, self.length + self.length // 4)
            # One buffer at a time, so that growing never holds both twice.
            self._keys = _grown(self._keys, self.length, room)
            self._values = _grown(self._values, self.length, room)
        self._keys[:, :, self.length : new] = keys
        self._values[:, :, self.length : new] = values
        self.length = new

    def encode(self, encoder: KeyEncoder) -> PackedKeys:
        """Bring the twins up to date and return those of all cached tokens; another encoder starts afresh.

        Tiled twins come with the whole buffer, whose tiles are not cut.
        """
        assert self._keys is not None and self.keys is not None
        if self.twins is None or self.twins.encoder.digest != encoder.digest:
            self.twins = Twins(encoder, encoder.buffer(len(self._keys), self.capacity))
        twins = self.twins
        if (held := twins.packed.shape[2]) < self.length:
            grown = encoder.buffer(len(self._keys), self.capacity)
            grown[:, :, :held] = twins.packed
            twins.packed = grown
        if twins.encoded < self.length:
            encoder.write(self.keys, twins.packed, twins.encoded, self.length)
            twins.encoded = self.length
        return twins.packed if encoder.tiled else twins.packed[:, :, : self.length]

    def absorb(self, encoder: KeyEncoder | None, rows: Rows) -> TailSums:
        """Bring the tail's sums to the blocks that ``rows`` (one a sequence) cover, reading only what changed."""
        assert self.keys is not None and self.values is not None
        if self.tail is None or _digest(self.tail.encoder) != _digest(encoder) or not rows.continues(self.tail.rank):
            self.tail = Tail(encoder, no_sums(self.keys, encoder), rows.rank, torch.zeros_like(rows.tokens[:, 0]))
        self.tail.rank = rows.rank
        if not rows.covers(self.tail.covered):
            self._cover(rows.covered)
        self.tail.covered = rows.covered
        return self.tail.sums

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` slots; what the sums hold of the others is subtracted before they go."""
        tokens = min(tokens, self.length)
        if self.tail is not None:
            left = (self.tail.rank[:, :tokens] >= 0).sum(-1)
            target = torch.minimum(covered_tokens(left), self.tail.covered)
            self._cover(target)
            self.tail.covered = target
            self.tail.rank = self.tail.rank[:, :tokens]
        if self.twins is not None:
            self.twins.encoded = min(self.twins.encoded, tokens)
        self.watched.crop(tokens)
        self.length = tokens

    def select_batch(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Replace every per-sequence tensor by ``pick`` of it (beams, repeats, a subset of the batch)."""
        if self._keys is None or self._values is None:
            return
        self._keys, self._values = pick(self._keys), pick(self._values)
        if self.twins is not None and self.twins.packed.numel():
            self.twins.packed = pick(self.twins.packed)
        if self.tail is not None:
            self.tail.sums = TailSums(*(pick(tensor) for tensor in self.tail.sums))
            self.tail.rank, self.tail.covered = pick(self.tail.rank), pick(self.tail.covered)
        self.watched.select_batch(pick)

    def reset(self) -> None:
        """Forget every token and free the buffers."""
        self.length, self.twins, self.tail, self.watched = 0, None, None, Watched()
        self._keys = self._values = None

    def _cover(self, target: Int[Tensor, " b"]) -> None:
        """Add, or where the target is lower subtract, the tokens between what is covered and ``target``."""
        assert self.tail is not None and self._keys is not None and self._values is not None
        rank, covered = self.tail.rank, self.tail.covered
        held, wanted = ((rank >= 0) & (rank < bound[:, None]) for bound in (covered, target))
        change = wanted.int() - held.int()
        touched = change.ne(0).any(0).nonzero()
        if not len(touched):
            return
        span = slice(int(touched[0]), int(touched[-1]) + 1)
        keys, values, change = self._keys[:, :, span], self._values[:, :, span], change[:, span]
        self.tail.sums = changed_sums(self.tail.encoder, keys, values, change, self.tail.sums)


def changed_sums(
    encoder: KeyEncoder | None, keys: Keys, values: Values, sign: Int[Tensor, "b n"], sums: TailSums
) -> TailSums:
    """The sums with tokens of sign 1 added and those of sign -1 taken away; slots of sign 0 are not read.

    The native kernels write ``sums`` themselves.
    """
    if isinstance(encoder, NativeEncoder):
        native.absorb(encoder, keys, values, sign.to(torch.int8), sums)
        return sums
    source = encoder.source if isinstance(encoder, TritonEncoder) else encoder
    added = _signed_sums(keys, values, source, sign)
    return TailSums(*(old + new for old, new in zip(sums, added, strict=True)))


def _digest(encoder: KeyEncoder | None) -> str | None:
    return None if encoder is None else encoder.digest


def _signed_sums(keys: Keys, values: Values, encoder: Encoder | None, sign: Int[Tensor, "b n"]) -> TailSums:
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    encoded = leading_dims(keys, encoder)
    # Slots of weight 0 may hold anything, NaN included.
    weight = sign[:, None, :, None].to(wide.dtype)
    weighted = torch.where(weight != 0, weight * wide, 0.0)
    encoded_weighted = torch.where(weight != 0, weight * encoded, 0.0)
    products = torch.where(weight != 0, encoded, 0.0).mT @ weighted
    return TailSums(sign.sum(-1, keepdim=True).to(wide.dtype), weighted.sum(2), encoded_weighted.sum(2), products)


def no_sums(keys: Keys, encoder: KeyEncoder | None) -> TailSums:
    """Sums over no tokens, for a layer of these keys."""
    batch, heads, _, dim = keys.shape
    rank = 0 if encoder is None else encoder.tail_rank
    dtype = torch.promote_types(keys.dtype, torch.float32)
    shapes = ((batch, 1), (batch, heads, dim), (batch, heads, rank), (batch, heads, rank, dim))
    return TailSums(*(torch.zeros(shape, dtype=dtype, device=keys.device) for shape in shapes))


def _buffer_like(tensor: Tensor, room: int) -> Tensor:
    return tensor.new_empty(*tensor.shape[:2], room, tensor.shape[3])


def _grown(old: Tensor, used: int, room: int) -> Tensor:
    new = _buffer_like(old, room)
    new[:, :, :used] = old[:, :, :used]
    return new
