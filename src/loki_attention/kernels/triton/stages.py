"""The kernels of one decode step, stage by stage: how each is cut into programs, and what it is handed.

Queues kernels and checks nothing: ``launch`` does. Stages may be queued one by one, for timing.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from loki_attention.core.tail import TAILS, TailSums
from loki_attention.kernels.native_arguments import Shape
from loki_attention.kernels.triton import arguments
from loki_attention.kernels.triton.arguments import Seen
from loki_attention.kernels.triton.attend import attend_kernel
from loki_attention.kernels.triton.encoder import TritonEncoder
from loki_attention.kernels.triton.opening import open_step_kernel
from loki_attention.kernels.triton.score import score_kernel
from loki_attention.kernels.triton.select import compact_kernel, refine_kernel, select_kernel
from loki_attention.kernels.triton.tuning import Tuning, tuning_for
from loki_attention.kernels.triton.workspace import Needs, Workspace, workspace_for

_LEAST_PAD = 16
_SAMPLE_BLOCK, _TAIL_BLOCK = 256, 128
# The interpreter runs programs one after another: two are enough to see that work is shared.
_INTERPRETED_PROCESSORS = 2


class StepInputs:
    """What every kernel of a step reads."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        words: Tensor,
        visible: Seen,
        k: Tensor,
        scale: float,
        sinks: int,
        recent: int,
        sums: TailSums,
    ) -> None:
        self.query, self.keys, self.values, self.words = query, keys, values, words
        self.visible, self.k, self.scale, self.sums = visible, k, scale, sums
        self.forced = (sinks, recent)

    @property
    def spans(self) -> tuple[Tensor, Tensor, Tensor]:
        """First slot, end and count of each sequence."""
        return self.visible.start, self.visible.stop, self.visible.tokens


class StepKernels:
    """The kernels of one step, with how they are cut and where they work."""

    def __init__(
        self,
        encoder: TritonEncoder,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        tuning: Tuning | None,
        workspace: Workspace | None,
        reserved: bool = False,
    ) -> None:
        self.encoder, self.shape = encoder, shape
        self._place = (device, workspace, reserved)
        self.tuning = tuning or tuning_of(device, shape.dim, dtype)
        processors = processors_of(device)
        self.slots = max(self.tuning.score_block, 1 << max(shape.slots - 1, 0).bit_length())
        self.chunk = min(self.tuning.chunk(shape.rows, self.slots, processors), self.slots)
        self.chunks = self.slots // self.chunk
        self.in_one_program = self.tuning.in_one_program(shape.rows, self.slots, processors)
        self.splits = self.tuning.splits(shape.rows, self.slots, processors)
        self.needs = Needs(
            rows=shape.rows, group=shape.group, dim=shape.dim, rank=encoder.rank, slots=self.slots, chunks=self.chunks,
            splits=self.splits,
        )  # fmt: skip

    @cached_property
    def space(self) -> Workspace:
        """Where the step works."""
        return workspace_for(self.needs, *self._place)

    def open(self, inputs: StepInputs, *, append: bool, absorb: bool) -> None:
        """Queue what comes before scoring."""
        encoder, space = self.encoder, self.space
        r1 = encoder.tail_rank
        open_step_kernel[(self.shape.rows,)](
            inputs.query, inputs.keys, inputs.values, inputs.words, *encoder.tensors, *inputs.sums, *inputs.spans,
            inputs.visible.rank, space.codes, space.encoded, space.numbers, space.line, inputs.scale,
            *inputs.query.stride()[:2], *inputs.keys.stride()[:3], *inputs.values.stride()[:3],
            *inputs.words.stride()[:2], inputs.visible.rank.stride(0), *inputs.forced,
            encoder.heads, self.shape.group, encoder.dim, padded(encoder.dim), *plane_sizes(encoder), r1, padded(r1),
            inputs.visible.kind, append, absorb, _SAMPLE_BLOCK, num_warps=self.tuning.open_warps,
        )  # fmt: skip

    def score(self, inputs: StepInputs, *, absorb: bool) -> None:
        """Queue the scores of all tokens."""
        space = self.space
        score_kernel[(self.shape.rows, self.chunks)](
            inputs.words, space.codes, space.line, *inputs.spans, inputs.visible.rank, space.keys, space.histogram,
            inputs.sums.tokens, *inputs.words.stride()[:2], inputs.visible.rank.stride(0), space.keys.stride(0),
            *inputs.forced, self.encoder.heads, self.shape.group, *self.encoder.dims_by_bits, inputs.visible.kind,
            not self.in_one_program, absorb, self.chunk, self.tuning.score_block, num_warps=self.tuning.score_warps,
        )  # fmt: skip

    def select(self, inputs: StepInputs) -> None:
        """Queue the choice of the K highest."""
        space, heads, kind, warps = (
            self.space,
            self.encoder.heads,
            inputs.visible.kind,
            self.tuning.select_warps(self.slots),
        )
        strides = (space.keys.stride(0), space.indices.stride(0))
        if self.in_one_program:
            select_kernel[(self.shape.rows,)](
                space.keys, *inputs.spans, inputs.k, space.indices, space.threshold, *strides, heads, kind, self.slots,
                self.tuning.select_block(self.slots), num_warps=warps,
            )  # fmt: skip
            return
        grid, block = (self.shape.rows, self.chunks), self.tuning.score_block
        refine_kernel[grid](
            space.keys, *inputs.spans, inputs.k, space.histogram, space.refined, space.above, space.bounds, strides[0],
            heads, kind, self.chunk, block, num_warps=self.tuning.score_warps,
        )  # fmt: skip
        compact_kernel[grid](
            space.keys, inputs.visible.stop, space.refined, space.above, space.bounds, space.indices, space.threshold,
            *strides, heads, self.chunk, block, num_warps=self.tuning.score_warps,
        )  # fmt: skip

    def attend(
        self, inputs: StepInputs, output: Tensor, soft_cap: float | None, logits: Tensor | None, tail: str, mass: bool
    ) -> None:
        """Queue attention over what was chosen, and the tail."""
        space, shape, encoder, tuning = self.space, self.shape, self.encoder, self.tuning
        r1 = encoder.tail_rank
        attend_kernel[(shape.rows, self.splits + mass)](
            inputs.query, inputs.keys, inputs.values, space.indices, inputs.k, *inputs.spans, inputs.visible.rank,
            space.numbers if logits is None else logits, inputs.words, space.codes, space.encoded, space.numbers,
            space.keys, space.threshold, *inputs.sums, output, space.mass, space.kept, space.peaks, space.sums, space.done,
            inputs.scale, soft_cap or 1.0, *inputs.query.stride()[:2], *inputs.keys.stride()[:3],
            *inputs.values.stride()[:3], *inputs.words.stride()[:2], inputs.visible.rank.stride(0), space.keys.stride(0),
            space.indices.stride(0), *output.stride()[:2], shape.kv_heads, shape.group, padded_group(shape), shape.dim,
            padded(shape.dim), *encoder.dims_by_bits, r1, padded(r1), inputs.visible.kind, bool(soft_cap),
            logits is not None, TAILS.index(tail), mass, self.splits, tuning.attend_block, _TAIL_BLOCK,
            num_warps=tuning.attend_warps, num_stages=tuning.attend_stages,
        )  # fmt: skip

    def per_head(self, figures: Tensor) -> Tensor:
        """A copy of one figure a query head, (B, H, 1)."""
        shape = self.shape
        return figures.flatten()[: shape.rows * shape.group].clone().view(shape.batch, -1, 1)

    def indices(self, inputs: StepInputs, width: int | None) -> Tensor:
        """The slots chosen, (B, Hkv, 1, width), -1 padded."""
        shape = self.shape
        visible = inputs.visible
        stop = visible.stop if visible.kind == arguments.FROM_ZERO else visible.stop - visible.start
        tokens = visible.tokens if visible.kind == arguments.HOLES else stop
        k = torch.minimum(inputs.k, tokens)
        width = int(k.max()) if width is None else width
        listed = self.space.indices[: shape.rows].view(shape.batch, shape.kv_heads, 1, -1)[..., :width]
        spare = torch.arange(width, device=k.device) >= k[:, None, None, None]
        return listed.masked_fill(spare, -1)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Within the block kernels are queued on ``device``: Triton takes the current one, whatever tensors it is given."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def plane_sizes(encoder: TritonEncoder) -> tuple[int, int, int, int, int, int]:
    """Rank, then dims, padded dims and bits of the first plane, then dims and padded dims of the 2-bit one behind it."""
    two = encoder.dims_of_two
    return encoder.rank, encoder.dims, padded(encoder.dims), encoder.bits, two, padded(two)


def padded(size: int) -> int:
    """The power of two that ``size`` is padded to in registers; at least what a matrix product needs."""
    return max(_LEAST_PAD, triton.next_power_of_2(size))


def padded_group(shape: Shape) -> int:
    """The rows of queries that a matrix product takes for a group."""
    return max(_LEAST_PAD, triton.next_power_of_2(shape.group))


def logits_of(learned_sinks: Tensor | None, shape: Shape, device: torch.device) -> Tensor | None:
    """Learned sinks as kernels take them; raises ``ArgumentError`` unless there is one a query head."""
    if learned_sinks is None:
        return None
    logits = learned_sinks.float().contiguous()
    arguments.check("learned_sinks", logits, torch.float32, (shape.kv_heads * shape.group,), device)
    return logits


@cache
def tuning_of(device: torch.device, dim: int, dtype: torch.dtype) -> Tuning:
    """The row of the tuning table for a device, a head dim and a type of K and V."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return tuning_for(10 * major + minor, padded(dim), dtype.itemsize)


@cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    found: Any = torch.cuda.get_device_properties(device)
    return int(found.multi_processor_count)
