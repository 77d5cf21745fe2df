"""Decode steps for the Triton kernels: on the GPU where there is one, else under Triton's interpreter."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from helpers import Layer
from kernel_cases import Case, assert_as_exact_as_torch, sums_of, visible_of
from loki_attention.core.tail import TailSums
from loki_attention.kernels.native import NativeStep
from loki_attention.kernels.native_arguments import Visible
from loki_attention.kernels.rows import Rows, Spans
from loki_attention.kernels.triton import availability

if availability.problem() is not None:
    pytest.skip(f"the Triton kernels cannot run: {availability.problem()}", allow_module_level=True)

from loki_attention.kernels.triton import launch
from loki_attention.kernels.triton.encoder import TritonEncoder
from loki_attention.kernels.triton.stages import tuning_of
from loki_attention.kernels.triton.tuning import Tuning
from loki_attention.kernels.triton.workspace import Needs, Workspace

DEVICE = torch.device("cpu" if availability.interpreted() else "cuda")
GARBAGE = 0x7F


class Cut(NamedTuple):
    """Which way the kernels are to go; the rest as the tuning table has it, which knows what fits into shared memory."""

    changes: dict[str, int]

    def tuning(self, keys: Tensor) -> Tuning:
        """The table's row for these keys with the changes made."""
        return replace(tuning_of(keys.device, keys.shape[-1], keys.dtype), **self.changes)


SHORT = Cut({"one_program_slots": 32768})
"""One program selects: rows of any length that tests have."""
LONG = Cut(
    {"score_block": 512, "attend_block": 16, "attend_warps": 4, "one_program_slots": 64, "programs_per_processor": 16}
)
"""Rows are scored and selected in chunks, attention is split."""
TUNINGS = {"one-program": SHORT, "chunks": LONG}
cuts = pytest.mark.parametrize("cut", TUNINGS.values(), ids=TUNINGS)

# Products of float32 are three of tensor cores on a GPU, exact to some 1e-6; the interpreter has IEEE float32.
ROUNDING = 1e-6 if DEVICE.type == "cpu" else 1e-5
AGREEMENT = 1e-5 if DEVICE.type == "cpu" else 5e-5
"""Within which float32 outputs of two cuts agree, absolutely and relatively."""


def assert_exact(ours: Tensor, layer: Layer, scale: float, **options: Tensor | float | None) -> None:
    """``assert_as_exact_as_torch`` with the rounding of where kernels run."""
    assert_as_exact_as_torch(ours, layer, scale, ROUNDING, **options)


def on_device(layer: Layer) -> Layer:
    """The layer where the kernels run."""
    return Layer(*(tensor.to(DEVICE) for tensor in layer))


def visible_on_device(layer: Layer, holes: bool) -> Visible:
    """``visible_of`` where the kernels run."""
    found = visible_of(layer, holes)
    kind = Rows if isinstance(found, Rows) else Spans
    parts = (found.rank, found.tokens) if isinstance(found, Rows) else found
    return kind(*(None if tensor is None else tensor.to(DEVICE) for tensor in parts))


class Prepared(NamedTuple):
    """A case's layer on the device, with all that a step takes."""

    case: Case
    layer: Layer
    encoder: TritonEncoder
    packed: Tensor
    visible: Visible
    k: Tensor
    sums: TailSums

    def step(self, cut: Cut = SHORT, **options: object) -> NativeStep:
        """The step, results on the CPU."""
        budget, layer = self.case.budget, self.layer
        wanted = {"wants_indices": True, "wants_mass": True, "wants_kept": True}
        found = launch.decode_step(
            self.encoder, layer.query, layer.keys, layer.values, self.packed, self.visible, self.k, self.case.shape.scale,
            sinks=budget.sinks, recent=budget.recent, tail=self.case.tail, sums=self.sums,
            tuning=cut.tuning(layer.keys), **{**wanted, **options},
        )  # fmt: skip
        return NativeStep(*(None if tensor is None else tensor.cpu() for tensor in found))


def prepared(case: Case, dtype: torch.dtype = torch.float32, layer: Layer | None = None) -> Prepared:
    """A case ready to run, its keys freshly encoded by the kernel."""
    layer = case.layer(dtype) if layer is None else layer
    encoder = TritonEncoder(case.encoder().to(DEVICE, torch.float32))
    sums = TailSums(*(tensor.to(DEVICE) for tensor in sums_of(layer, case.encoder())))
    k, visible, moved = case.k(layer).to(DEVICE), visible_on_device(layer, case.holes), on_device(layer)
    packed = encoder.buffer(len(moved.keys), moved.keys.shape[2]).fill_(GARBAGE)
    encoder.write(moved.keys, packed, 0, moved.keys.shape[2])
    return Prepared(case, moved, encoder, packed, visible, k, sums)


def workspace(case: Case, layer: Layer) -> Workspace:
    """A workspace of ample size whose every buffer holds garbage: NaN in floats, and slots that are none."""
    batch, heads, slots, dim = layer.keys.shape
    needs = Needs(
        rows=batch * heads, group=case.shape.group, dim=dim, rank=case.encoder().planes.rank, slots=max(4096, 2 * slots),
        chunks=64, splits=64,
    )  # fmt: skip
    space = Workspace(needs, DEVICE)
    for buffer in space.buffers():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
        else:
            buffer.view(torch.uint8).fill_(GARBAGE)
    return space
