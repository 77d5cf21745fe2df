"""The native kernels as ``torch.library`` operators, ``torch.ops.loki_attention``: what compiled graphs can hold.

Importing this module registers them, with or without the extension. Knows flat arguments alone: an encoder is its six
tensors (mean, query map, key map, deviations, steps, kappa) and the name of its planes; visible slots are ``start`` and
``stop``, or ``rank`` and ``tokens`` (``kernels.rows``); lists that are empty stand for nothing. ``native`` checks and
computes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from loki_attention.core.encoder import ENCODER_TENSORS, EncodedQuery, Encoder
from loki_attention.core.planes import Planes
from loki_attention.core.tail import TailSums
from loki_attention.errors import ArgumentError
from loki_attention.kernels import native
from loki_attention.kernels.rows import Rows, Spans


@torch.library.custom_op("loki_attention::encode_keys", mutates_args=("packed",), device_types="cpu")
def encode_keys(encoder: Sequence[Tensor], planes: str, keys: Tensor, packed: Tensor, start: int, stop: int) -> None:
    """Write the low-rank keys of slots ``start`` to ``stop`` - 1 into ``packed`` (:func:`native.encode_keys`)."""
    native.encode_keys(prepared_encoder(encoder, planes), keys, packed, start, stop)


@encode_keys.register_fake
def _(*_: object) -> None:
    pass


_SUMS = ("sum_tokens", "sum_values", "sum_encoded", "sum_products")


@torch.library.custom_op("loki_attention::absorb", mutates_args=_SUMS, device_types="cpu")
def absorb(
    encoder: Sequence[Tensor],
    planes: str,
    keys: Tensor,
    values: Tensor,
    sign: Tensor,
    sum_tokens: Tensor,
    sum_values: Tensor,
    sum_encoded: Tensor,
    sum_products: Tensor,
) -> None:
    """Add tokens to the tail's sums or take them away, in place (:func:`native.absorb`); no encoder: an empty list."""
    sums = TailSums(sum_tokens, sum_values, sum_encoded, sum_products)
    native.absorb(prepared_encoder(encoder, planes) if encoder else None, keys, values, sign, sums)


@absorb.register_fake
def _(*_: object) -> None:
    pass


@torch.library.custom_op("loki_attention::select", mutates_args=(), device_types="cpu")
def select(
    encoder: Sequence[Tensor],
    planes: str,
    codes: Tensor,
    step: Tensor,
    deviation: Tensor,
    offset: Tensor,
    packed: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    rank: Tensor | None,
    tokens: Tensor | None,
    k: Tensor,
    width: int,
    slots: int,
    sinks: int,
    recent: int,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The K best slots per KV head, (B, Hkv, 1, width) padded with -1, and the tail's log-mass (:func:`native.select`).

    ``width`` is at least the largest of ``k``: shapes must not depend on the values of tensors.
    """
    query = EncodedQuery(codes, step, deviation, offset, step.new_empty(*step.shape, 0))
    visible = visible_slots(start, stop, rank, tokens)
    indices, mass = native.select(
        prepared_encoder(encoder, planes), query, packed, visible, k, slots=slots, sinks=sinks, recent=recent, soft_cap=soft_cap
    )  # fmt: skip
    return _widened(indices, width), mass


@select.register_fake
def _(
    encoder: Sequence[Tensor],
    planes: str,
    codes: Tensor,
    step: Tensor,
    deviation: Tensor,
    offset: Tensor,
    packed: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    rank: Tensor | None,
    tokens: Tensor | None,
    k: Tensor,
    width: int | torch.SymInt,
    *_: object,
) -> tuple[Tensor, Tensor]:
    return _no_indices(packed, width), step.new_empty(step.shape)


@torch.library.custom_op("loki_attention::attend", mutates_args=(), device_types="cpu")
def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: float,
    tail_mass: Tensor | None = None,
    tail_values: Tensor | None = None,
    soft_cap: float | None = None,
    learned_sinks: Tensor | None = None,
) -> Tensor:
    """Exact softmax attention over the indexed slots and the tail's virtual token (:func:`native.attend`)."""
    return native.attend(
        query, keys, values, indices, scale, tail_mass=tail_mass, tail_values=tail_values, soft_cap=soft_cap,
        learned_sinks=learned_sinks,
    )  # fmt: skip


@attend.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("loki_attention::dense_decode", mutates_args=(), device_types="cpu")
def dense_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    rank: Tensor | None,
    tokens: Tensor | None,
    scale: float,
    soft_cap: float | None = None,
    learned_sinks: Tensor | None = None,
) -> Tensor:
    """Exact softmax attention over all valid slots (:func:`native.dense_decode`)."""
    visible = visible_slots(start, stop, rank, tokens)
    return native.dense_decode(query, keys, values, visible, scale, soft_cap=soft_cap, learned_sinks=learned_sinks)


@dense_decode.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("loki_attention::decode_step", mutates_args=(), device_types="cpu")
def decode_step(
    encoder: Sequence[Tensor],
    planes: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    packed: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    rank: Tensor | None,
    tokens: Tensor | None,
    k: Tensor,
    width: int,
    scale: float,
    sinks: int,
    recent: int,
    tail: str,
    sums: Sequence[Tensor],
    soft_cap: float | None = None,
    learned_sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, selected slots and the mass kept of one fused step (:func:`native.decode_step`).

    ``sums`` are the tail's four tensors, or empty for tail "none". Slots come as :func:`select` has them; with a
    ``width`` of 0 they are not written, which is the faster.
    """
    held, visible = tail_sums(sums), visible_slots(start, stop, rank, tokens)
    found = native.decode_step(
        prepared_encoder(encoder, planes), query, keys, values, packed, visible, k, scale, sinks=sinks, recent=recent, tail=tail,
        sums=held, soft_cap=soft_cap, learned_sinks=learned_sinks, wants_indices=width > 0, wants_kept=True,
    )  # fmt: skip
    assert found.kept is not None
    indices = _no_indices(packed, 0) if found.indices is None else _widened(found.indices, width)
    return found.output, indices, found.kept


@decode_step.register_fake
def _(
    encoder: Sequence[Tensor],
    planes: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    packed: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    rank: Tensor | None,
    tokens: Tensor | None,
    k: Tensor,
    width: int | torch.SymInt,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = query.new_empty(query.shape[:3], dtype=torch.float32)
    return query.new_empty(query.shape), _no_indices(packed, width), kept


class _Prepared(NamedTuple):
    """An encoder and what it was made from; it keeps no tensor alive."""

    planes: str
    tensors: tuple[TensorWeakRef, ...]
    versions: tuple[int, ...]
    encoder: native.NativeEncoder

    def is_of(self, tensors: Sequence[Tensor], versions: tuple[int, ...], planes: str) -> bool:
        same = all(ref() is tensor for ref, tensor in zip(self.tensors, tensors, strict=True))
        return same and (self.versions, self.planes) == (versions, planes)


_prepared_by_key_map = WeakTensorKeyDictionary()


def prepared_encoder(tensors: Sequence[Tensor], planes: str) -> native.NativeEncoder:
    """The encoder of these tensors, made once for as long as they live and are not written to."""
    if len(tensors) != len(ENCODER_TENSORS) or tensors[0].dim() != 2:
        got = [tuple(tensor.shape) for tensor in tensors]
        raise ArgumentError(f"encoder is {got}; give {', '.join(ENCODER_TENSORS)}, the first of shape (Hkv, D)")
    # Inference tensors count no versions; nobody writes to an encoder there.
    versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
    known: _Prepared | None = _prepared_by_key_map.get(tensors[2])
    if known is not None and known.is_of(tensors, versions, planes):
        return known.encoder
    encoder = native.NativeEncoder(Encoder("operator", Planes.parse(planes), *tensors))
    references = tuple(TensorWeakRef(tensor) for tensor in tensors)
    _prepared_by_key_map[tensors[2]] = _Prepared(planes, references, versions, encoder)
    return encoder


def tail_sums(sums: Sequence[Tensor]) -> TailSums | None:
    """The tail's sums that an operator was given, None for none; raises ``ArgumentError`` for another number of tensors."""
    if len(sums) not in (0, len(TailSums._fields)):
        raise ArgumentError(f"sums are {len(sums)} tensors; give {', '.join(TailSums._fields)}, or none")
    return TailSums(*sums) if sums else None


def visible_slots(
    start: Tensor | None, stop: Tensor | None, rank: Tensor | None, tokens: Tensor | None
) -> native.Visible:
    """The valid slots that an operator was given; raises ``ArgumentError`` unless it is one of the two forms."""
    if rank is not None and tokens is not None and start is None and stop is None:
        return Rows(rank, tokens)
    if stop is None or rank is not None or tokens is not None:
        raise ArgumentError(
            "visible slots are stop, with or without start, or else rank and tokens; give one of the two"
        )
    return Spans(start, stop)


def _widened(indices: Tensor, width: int) -> Tensor:
    missing = width - indices.shape[-1]
    if missing < 0:
        raise ArgumentError(f"width is {width} but k is up to {indices.shape[-1]}; give at least that")
    return torch.nn.functional.pad(indices, (0, missing), value=-1)


def _no_indices(packed: Tensor, width: int | torch.SymInt) -> Tensor:
    return packed.new_empty(packed.shape[0], packed.shape[1], 1, width, dtype=torch.int32)
