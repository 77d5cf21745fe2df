"""Decode steps by the Triton kernels: typed launchers that check every tensor, then queue kernels and return.

The same contract as ``kernels.native`` (``core`` specifies it): one query row a sequence; float32, bfloat16 or float16.
Nothing waits for the device. With a ``workspace`` and an ``out`` given, and nothing else wanted, a step allocates nothing
and can be captured in a CUDA graph.
"""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from loki_attention.core.shapes import Keys, Queries, Values
from loki_attention.core.tail import TailSums, check_tail
from loki_attention.errors import ArgumentError, check_tokens
from loki_attention.kernels.native import NativeStep
from loki_attention.kernels.native_arguments import Shape, Visible
from loki_attention.kernels.triton import arguments
from loki_attention.kernels.triton.append import encode_keys_kernel
from loki_attention.kernels.triton.dense import dense_kernel
from loki_attention.kernels.triton.encoder import TritonEncoder
from loki_attention.kernels.triton.stages import (
    StepInputs,
    StepKernels,
    logits_of,
    on_device,
    padded,
    padded_group,
    plane_sizes,
    processors_of,
    tuning_of,
)
from loki_attention.kernels.triton.tuning import Tuning
from loki_attention.kernels.triton.workspace import Needs, Workspace, reserve, workspace_for

# From 64 rows on Triton 3.6 takes Blackwell's tensor cores for a product in IEEE arithmetic, in TF32.
_ENCODED_AT_ONCE = 32


def encode_keys(
    encoder: TritonEncoder, keys: Keys, packed: UInt8[Tensor, "b kv capacity bytes"], start: int, stop: int
) -> None:
    """Queue the low-rank keys of slots ``start`` to ``stop`` - 1 (``TritonEncoder.write`` checks)."""
    words, (mean, _, key_map, _, steps, _) = packed.view(torch.int32), encoder.tensors
    grid = (len(keys) * encoder.heads, -(-(stop - start) // _ENCODED_AT_ONCE))
    with on_device(keys.device):
        encode_keys_kernel[grid](
            keys, words, mean, key_map, steps, start, stop, *keys.stride()[:3], *words.stride()[:2],
            encoder.heads, encoder.dim, *plane_sizes(encoder), _ENCODED_AT_ONCE,
        )  # fmt: skip


def decode_step(
    encoder: TritonEncoder,
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
    width: int | None = None,
    newest: bool = False,
    workspace: Workspace | None = None,
    reserved: bool = False,
    out: Queries | None = None,
    tuning: Tuning | None = None,
) -> NativeStep:
    """One decode step of Loki over a layer (``native.decode_step``), queued on the current stream.

    ``k`` (int64, on the device) must hold the forced tokens; more than a sequence has counts as all of them. ``width``:
    how many slots ``indices`` list a row; None: the largest K, and to know it waits for the device. ``newest``:
    the last slot's low-rank key is written first and the tail's sums are brought to the blocks that they cover, in place,
    which needs spans; otherwise both are the caller's to keep up to date. ``reserved``: without a workspace, work in the
    memory that :func:`reserve_for` set aside, where that is large enough.
    """
    shape = arguments.shape_of(query, keys, values)
    arguments.check_keys(encoder, keys, packed, shape.slots)
    check_tokens("sinks", sinks, least=0)
    check_tokens("recent", recent, least=0)
    check_tail(tail)
    device = keys.device
    arguments.check_whole("k", k, torch.int64, (shape.batch,), device)
    visible_slots = arguments.seen(visible, shape, device)
    if newest and visible_slots.kind == arguments.HOLES:
        raise ArgumentError("newest=True needs sequences without holes; give spans, or bring twins and sums up to date")
    if tail != "none":
        if sums is None:
            raise ArgumentError(f"tail {tail!r} needs the sums over cached tokens; give sums, or use tail='none'")
        arguments.check_sums(sums, shape, encoder.tail_rank, device)
    step = StepKernels(encoder, shape, keys.dtype, device, tuning, workspace, reserved)
    state = sums if tail != "none" and sums is not None else TailSums(*[step.space.numbers] * 4)
    inputs = StepInputs(query, keys, values, packed.view(torch.int32), visible_slots, k, scale, sinks, recent, state)
    output, logits = _output(query, out), logits_of(learned_sinks, shape, device)
    mass, absorb = tail != "none" or wants_mass or wants_kept, newest and tail != "none"
    with on_device(device):
        step.open(inputs, append=newest, absorb=absorb)
        step.score(inputs, absorb=absorb)
        step.select(inputs)
        step.attend(inputs, output, soft_cap, logits, tail, mass)
    return NativeStep(
        output,
        step.indices(inputs, width) if wants_indices else None,
        step.per_head(step.space.mass) if wants_mass else None,
        step.per_head(step.space.kept) if wants_kept else None,
    )


def dense_decode(
    query: Queries,
    keys: Keys,
    values: Values,
    visible: Visible,
    scale: float,
    *,
    soft_cap: float | None = None,
    learned_sinks: Float[Tensor, " h"] | None = None,
    workspace: Workspace | None = None,
    reserved: bool = False,
    out: Queries | None = None,
    tuning: Tuning | None = None,
) -> Queries:
    """Exact softmax attention over all valid slots, by the same blocks as :func:`decode_step`."""
    shape, device = arguments.shape_of(query, keys, values), keys.device
    visible_slots = arguments.seen(visible, shape, device)
    chosen = tuning or tuning_of(device, shape.dim, keys.dtype)
    needs = _dense_needs(shape, device, chosen)
    splits, space = needs.splits, workspace_for(needs, device, workspace, reserved)
    output, logits = _output(query, out), logits_of(learned_sinks, shape, device)
    with on_device(device):
        dense_kernel[(shape.rows, splits)](
            query, keys, values, visible_slots.start, visible_slots.stop, visible_slots.tokens, visible_slots.rank,
            space.peaks if logits is None else logits, output, space.peaks, space.sums, space.done, scale,
            soft_cap or 1.0, *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], *output.stride()[:2],
            visible_slots.rank.stride(0), shape.kv_heads, shape.group, padded_group(shape), shape.dim, padded(shape.dim),
            bool(soft_cap), logits is not None, visible_slots.kind, splits, chosen.attend_block,
            num_warps=chosen.attend_warps, num_stages=chosen.dense_stages,
        )  # fmt: skip
    return output


def reserve_for(
    encoder: TritonEncoder | None, query: Tensor, keys: Tensor, values: Tensor, tuning: Tuning | None = None
) -> None:
    """Set memory aside for the operators' steps over a layer, dense ones alone without an encoder."""
    reserve(_needs(encoder, query, keys, values, tuning), keys.device)


def workspace_of(
    encoder: TritonEncoder, query: Tensor, keys: Tensor, values: Tensor, tuning: Tuning | None = None
) -> Workspace:
    """A workspace for steps over a layer, dense ones too, and over fewer of its slots."""
    return Workspace(_needs(encoder, query, keys, values, tuning), keys.device)


def _needs(encoder: TritonEncoder | None, query: Tensor, keys: Tensor, values: Tensor, tuning: Tuning | None) -> Needs:
    shape, device = arguments.shape_of(query, keys, values), keys.device
    needs = _dense_needs(shape, device, tuning or tuning_of(device, shape.dim, keys.dtype))
    if encoder is None:
        return needs
    return needs.joined(StepKernels(encoder, shape, keys.dtype, device, tuning, None).needs)


def _dense_needs(shape: Shape, device: torch.device, tuning: Tuning) -> Needs:
    splits = tuning.splits(shape.rows, shape.slots, processors_of(device))
    return Needs(rows=shape.rows, group=shape.group, dim=shape.dim, rank=0, slots=0, chunks=0, splits=splits)


def _output(query: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    arguments.check_whole("out", out, query.dtype, tuple(query.shape), query.device)
    return out
