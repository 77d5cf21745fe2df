"""The Triton kernels as ``torch.library`` operators: those of ``native_operators`` and ``newest`` on CUDA tensors.

Importing this module registers them. Operators are what graphs hold, so they work in memory that was reserved, where that
is large enough (``workspace``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loki_attention.core.encoder import ENCODER_TENSORS, Encoder
from loki_attention.core.planes import Planes
from loki_attention.core.tail import TailSums
from loki_attention.errors import ArgumentError
from loki_attention.kernels import native_operators, newest
from loki_attention.kernels.rows import Spans
from loki_attention.kernels.triton import launch
from loki_attention.kernels.triton.encoder import TritonEncoder


@native_operators.encode_keys.register_kernel("cuda")
def encode_keys(encoder: Sequence[Tensor], planes: str, keys: Tensor, packed: Tensor, start: int, stop: int) -> None:
    """Write the low-rank keys of slots ``start`` to ``stop`` - 1 into ``packed`` (:meth:`TritonEncoder.write`)."""
    _encoder_of(encoder, planes).write(keys, packed, start, stop)


@native_operators.dense_decode.register_kernel("cuda")
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
    """Exact softmax attention over all valid slots (:func:`launch.dense_decode`)."""
    visible = native_operators.visible_slots(start, stop, rank, tokens)
    return launch.dense_decode(
        query, keys, values, visible, scale, soft_cap=soft_cap, learned_sinks=learned_sinks, reserved=True
    )


@native_operators.decode_step.register_kernel("cuda")
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
    """Output, selected slots and the mass kept of one step (:func:`launch.decode_step`); no slots for a width of 0."""
    held = native_operators.tail_sums(sums)
    found = launch.decode_step(
        _encoder_of(encoder, planes), query, keys, values, packed,
        native_operators.visible_slots(start, stop, rank, tokens), k, scale, sinks=sinks, recent=recent, tail=tail,
        sums=held, soft_cap=soft_cap, learned_sinks=learned_sinks, wants_indices=width > 0, width=width,
        wants_kept=True, reserved=True,
    )  # fmt: skip
    assert found.kept is not None
    indices = packed.new_empty(*packed.shape[:2], 1, 0, dtype=torch.int32) if found.indices is None else found.indices
    return found.output, indices, found.kept


@newest.decode_newest.register_kernel("cuda")
def decode_newest(
    encoder: Sequence[Tensor],
    planes: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    packed: Tensor,
    start: Tensor | None,
    stop: Tensor,
    k: Tensor,
    scale: float,
    sinks: int,
    recent: int,
    tail: str,
    sum_tokens: Tensor,
    sum_values: Tensor,
    sum_encoded: Tensor,
    sum_products: Tensor,
    soft_cap: float | None = None,
    learned_sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and mass kept of one step whose newest token joins first (:func:`launch.decode_step`)."""
    sums = TailSums(sum_tokens, sum_values, sum_encoded, sum_products)
    found = launch.decode_step(
        _encoder_of(encoder, planes), query, keys, values, packed, Spans(start, stop), k, scale, sinks=sinks,
        recent=recent, tail=tail, sums=sums, soft_cap=soft_cap, learned_sinks=learned_sinks, newest=True,
        wants_kept=tail != "none", reserved=True,
    )  # fmt: skip
    return found.output, newest.nothing_kept(query) if found.kept is None else found.kept


def _encoder_of(tensors: Sequence[Tensor], planes: str) -> TritonEncoder:
    """The encoder of an operator's tensors. Nothing is copied, so that nothing need be kept."""
    if len(tensors) != len(ENCODER_TENSORS):
        raise ArgumentError(f"encoder is {len(tensors)} tensors; give {', '.join(ENCODER_TENSORS)}")
    return TritonEncoder(Encoder("operator", Planes.parse(planes), *tensors))
