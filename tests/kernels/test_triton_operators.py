"""The Triton kernels as operators: the launcher's own results, opcheck and graphs on a GPU, memory set aside for graphs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import Shape
from kernel_cases import FRACTION, Case
from loki_attention.core.encoder import ENCODER_TENSORS
from loki_attention.kernels.rows import Spans
from loki_attention.kernels.triton import launch, operators
from loki_attention.kernels.triton import workspace as spaces
from triton_cases import AGREEMENT, DEVICE, Prepared, prepared

CASE = Case("16@4", Shape(1, 1, 64), (200,), "linear", FRACTION)
on_a_gpu = pytest.mark.skipif(
    DEVICE.type != "cuda", reason="needs a GPU: elsewhere the operator is the native kernels'"
)


def arguments(ready: Prepared) -> tuple[Any, ...]:
    """The flat arguments of the step, tensors that it writes copied."""
    tensors = [getattr(ready.encoder.source, name) for name in ENCODER_TENSORS]
    assert isinstance(ready.visible, Spans)
    budget = ready.case.budget
    forced = (ready.case.shape.scale, budget.sinks, budget.recent, ready.case.tail)
    sums = [tensor.clone() for tensor in ready.sums]
    return tensors, CASE.planes, *ready.layer[:3], ready.packed.clone(), *ready.visible, ready.k, *forced, *sums


def test_the_newest_tokens_step_is_the_launchers() -> None:
    """Called as a function: without a GPU the dispatcher has the native kernels for its tensors."""
    ready = prepared(CASE)
    flat = arguments(ready)
    output, kept = operators.decode_newest(*flat)
    expected = ready.step(newest=True)
    torch.testing.assert_close(output.cpu(), expected.output, rtol=AGREEMENT, atol=AGREEMENT)
    torch.testing.assert_close(kept.cpu(), expected.kept, rtol=1e-4, atol=AGREEMENT)
    without = list(flat)
    without[12] = "none"
    assert operators.decode_newest(*without)[1].shape == (*output.shape[:2], 0)


@on_a_gpu
def test_opcheck_of_the_newest_tokens_step() -> None:
    torch.library.opcheck(torch.ops.loki_attention.decode_newest.default, arguments(prepared(CASE)))


@on_a_gpu
def test_a_compiled_step_is_one_graph_and_equals_the_launcher() -> None:
    ready = prepared(CASE)

    def step(query: Tensor, *rest: Any) -> Tensor:
        tensors, planes, _, *others = rest
        return torch.ops.loki_attention.decode_newest(tensors, planes, query * 1.0, *others)[0] + 0.0

    compiled = torch.compile(step, fullgraph=True)
    found = compiled(ready.layer.query, *arguments(ready))
    torch.testing.assert_close(found.cpu(), ready.step(newest=True).output, rtol=AGREEMENT, atol=AGREEMENT)


def test_steps_of_graphs_work_in_memory_that_was_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stream they run on, they allocate none; memory that grew leaves what a captured graph knows alone."""
    monkeypatch.setattr(spaces, "_held", {})
    monkeypatch.setattr(spaces, "_reserved", {})
    ready = prepared(CASE)
    query, keys, values = ready.layer[:3]
    launch.reserve_for(ready.encoder, query, keys, values)
    (first,) = spaces._reserved[keys.device]
    operators.decode_newest(*arguments(ready))
    operators.dense_decode(*ready.layer[:3], *ready.visible, None, None, CASE.shape.scale)
    assert not spaces._held
    launch.reserve_for(ready.encoder, query, keys, values)
    assert spaces._reserved[keys.device] == [first]
    longer = [torch.cat([tensor] * 40, 2) for tensor in (keys, values)]
    launch.reserve_for(ready.encoder, query, *longer)
    assert spaces._reserved[keys.device][0] is first and len(spaces._reserved[keys.device]) == 2
    ready.step()
    assert len(spaces._held) == 1, "eager steps have memory of their own"


def test_the_operators_on_cuda_tensors_are_the_launchers() -> None:
    """Called as functions: without a GPU the dispatcher has no tensors for them."""
    ready = prepared(CASE)
    tensors, planes, *layer = arguments(ready)[:5]
    spans = (*ready.visible, None, None)
    budget = (ready.k, 30, CASE.shape.scale, CASE.budget.sinks, CASE.budget.recent, CASE.tail, list(ready.sums))
    output, indices, kept = operators.decode_step(tensors, planes, *layer, ready.packed, *spans, *budget)
    expected = ready.step()
    assert expected.indices is not None and expected.kept is not None
    width = expected.indices.shape[-1]
    torch.testing.assert_close(output.cpu(), expected.output, rtol=AGREEMENT, atol=AGREEMENT)
    torch.testing.assert_close(kept.cpu(), expected.kept, rtol=1e-4, atol=AGREEMENT)
    assert torch.equal(indices[..., :width].cpu(), expected.indices)
    assert (indices[..., width:] == -1).all()
    packed = torch.zeros_like(ready.packed)
    operators.encode_keys(tensors, planes, layer[1], packed, 0, 200)
    assert torch.equal(packed[:, :, :192], ready.packed[:, :, :192])
    assert operators.dense_decode(*layer, *spans, CASE.shape.scale).isfinite().all()
