"""The newest token's step as an operator: what opcheck wants, graphs that compile, the launcher's own results."""

from typing import Any

import torch
from torch import Tensor

from helpers import Shape
from kernel_cases import FRACTION, Case
from loki_attention.kernels.native_operators import ENCODER_TENSORS
from loki_attention.kernels.rows import Spans
from loki_attention.kernels.triton import operators
from triton_cases import DEVICE, Prepared, prepared

CASE = Case("16@4", Shape(1, 1, 64), (200,), "linear", FRACTION)


def arguments(ready: Prepared) -> tuple[Any, ...]:
    """The flat arguments of the step, tensors that it writes copied."""
    tensors = [getattr(ready.encoder.source, name) for name in ENCODER_TENSORS]
    assert isinstance(ready.visible, Spans)
    budget = ready.case.budget
    forced = (ready.case.shape.scale, budget.sinks, budget.recent, ready.case.tail)
    sums = [tensor.clone() for tensor in ready.sums]
    return tensors, CASE.planes, *ready.layer[:3], ready.packed.clone(), *ready.visible, ready.k, *forced, *sums


def test_opcheck_of_the_newest_tokens_step() -> None:
    torch.library.opcheck(torch.ops.loki_attention.decode_newest.default, arguments(prepared(CASE)))


def test_a_compiled_step_is_one_graph_and_equals_the_launcher() -> None:
    ready = prepared(CASE)

    def step(query: Tensor, *rest: Any) -> Tensor:
        tensors, planes, _, *others = rest
        return torch.ops.loki_attention.decode_newest(tensors, planes, query * 1.0, *others) + 0.0

    backend = "aot_eager" if DEVICE.type == "cpu" else "inductor"
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    found = compiled(ready.layer.query, *arguments(ready))
    torch.testing.assert_close(found.cpu(), ready.step(newest=True).output, rtol=1e-5, atol=1e-5)


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
    torch.testing.assert_close(output.cpu(), expected.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept.cpu(), expected.kept, rtol=1e-4, atol=1e-5)
    assert torch.equal(indices[..., :width].cpu(), expected.indices)
    assert (indices[..., width:] == -1).all()
    packed = torch.zeros_like(ready.packed)
    operators.encode_keys(tensors, planes, layer[1], packed, 0, 200)
    assert torch.equal(packed[:, :, :192], ready.packed[:, :, :192])
    assert operators.dense_decode(*layer, *spans, CASE.shape.scale).isfinite().all()
