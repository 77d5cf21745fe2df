"""The newest token's step as a ``torch.library`` operator: what a compiled or captured decode step holds.

Importing this module registers it for the CPU, where the native kernels run it; ``kernels.triton.operators`` adds that of
GPUs. It appends, absorbs, selects and attends with lengths that are tensors, so that one graph serves every step. Arguments
are those of ``native_operators``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loki_attention.core.tail import TailSums, covered_tokens
from loki_attention.kernels import native
from loki_attention.kernels.native_operators import prepared_encoder
from loki_attention.kernels.rows import Spans

_WRITTEN = ("packed", "sum_tokens", "sum_values", "sum_encoded", "sum_products")


@torch.library.custom_op("loki_attention::decode_newest", mutates_args=_WRITTEN, device_types="cpu")
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
    """The output of one step whose newest token, in slot ``stop`` - 1 of ``keys`` and ``values``, joins first.

    Its low-rank key is written into ``packed``, and the sums are brought forward to the blocks that they cover; for tail
    "none" they may be empty. Second comes the mass kept, (B, H, 1) float32, without a last entry for tail "none".
    """
    prepared, sums = prepared_encoder(encoder, planes), None
    _append(prepared, keys, packed, stop)
    if tail != "none":
        sums = TailSums(sum_tokens, sum_values, sum_encoded, sum_products)
        _absorb(prepared, keys, values, Spans(start, stop), sums)
    found = native.decode_step(
        prepared, query, keys, values, packed, Spans(start, stop), k, scale, sinks=sinks, recent=recent, tail=tail,
        sums=sums, soft_cap=soft_cap, learned_sinks=learned_sinks, wants_kept=sums is not None,
    )  # fmt: skip
    return found.output, nothing_kept(query) if found.kept is None else found.kept


@decode_newest.register_fake
def _(
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
    *_: object,
) -> tuple[Tensor, Tensor]:
    kept = query.new_empty(query.shape[:3], dtype=torch.float32)
    return query.new_empty(query.shape), nothing_kept(query) if tail == "none" else kept


def newest_operator() -> Callable[..., tuple[Tensor, Tensor]]:
    """``torch.ops.loki_attention.decode_newest``, which goes by the device of its tensors."""
    operator: Callable[..., tuple[Tensor, Tensor]] = torch.ops.loki_attention.decode_newest
    return operator


def nothing_kept(query: Tensor) -> Tensor:
    """The mass kept where there is no tail: (B, H, 0)."""
    return query.new_empty(*query.shape[:2], 0, dtype=torch.float32)


def _append(encoder: native.NativeEncoder, keys: Tensor, packed: Tensor, stop: Tensor) -> None:
    """Write the low-rank key of each sequence's last slot."""
    ends: list[int] = stop.tolist()
    if len(set(ends)) == 1:
        native.encode_keys(encoder, keys, packed, ends[0] - 1, ends[0])
        return
    for b, end in enumerate(ends):
        native.encode_keys(encoder, keys[b : b + 1], packed[b : b + 1], end - 1, end)


def _absorb(encoder: native.NativeEncoder, keys: Tensor, values: Tensor, visible: Spans, sums: TailSums) -> None:
    """Add the blocks that the sums cover at this length and do not hold yet; nothing in 63 steps of 64."""
    start = torch.zeros_like(visible.stop) if visible.start is None else visible.start
    held = start + sums.tokens[:, 0].long()
    wanted = start + covered_tokens(visible.stop - start)
    missing = wanted > held
    if not bool(missing.any()):
        return
    first, last = int(held[missing].min()), int(wanted[missing].max())
    slots = torch.arange(first, last)
    sign = ((slots >= held[:, None]) & (slots < wanted[:, None])).to(torch.int8)
    native.absorb(encoder, keys[:, :, first:last], values[:, :, first:last], sign, sums)
