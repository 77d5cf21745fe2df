"""Attention over chosen slots: dense at full budget, as exact as torch, and blind to what is not chosen."""

import math

import pytest
import torch
from torch import Tensor

from backend_steps import (
    CASES,
    Case,
    backend_step,
    cases,
)
from helpers import Layer, Shape, noise, random_layer
from loki_attention.kernels import torch_backend as backend


def everything(layer: Layer, sets: int) -> Tensor:
    """Every valid slot of every sequence."""
    tokens = layer.rows.tokens
    ranking = torch.zeros(len(tokens), sets, 1, layer.valid.shape[1], dtype=torch.int16)
    return backend.top_k(ranking, layer.rows, tokens, backend.Forced(4, 16))


def torch_attention(layer: Layer, scale: float) -> Tensor:
    """PyTorch's own attention over the valid slots, in the layer's dtype."""
    grouped = (tensor.repeat_interleave(layer.query.shape[1] // layer.keys.shape[1], 1) for tensor in layer[1:3])
    mask = layer.valid[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(layer.query, *grouped, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("shape", [Shape(2, 1, 64), Shape(1, 4, 80), Shape(1, 7, 96), Shape(2, 2, 128)], ids=str)
@pytest.mark.parametrize("slots", [1, 33, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_full_budget_is_dense_attention(shape: Shape, slots: int, dtype: torch.dtype) -> None:
    """To 1e-10 in float64, elsewhere within twice torch's own error in that dtype (of the batch, in mean square)."""
    lengths = tuple(max(1, slots - i * slots // 8) for i in range(8))
    layer = random_layer(shape, lengths, dtype=dtype, holes=True)
    exact = torch_attention(Layer(*(tensor.double() for tensor in layer[:3]), layer.valid), shape.scale)
    for sets in (shape.kv_heads, shape.kv_heads * shape.group):
        ours = backend.attend(layer.query, layer.keys, layer.values, everything(layer, sets), shape.scale).output
        assert ours.dtype == dtype
        error = ours.double() - exact
        if dtype == torch.float64:
            assert float(error.abs().max()) < 1e-10
        else:
            assert float(error.norm()) <= 2 * own_error(layer, exact, shape.scale)


def own_error(layer: Layer, exact: Tensor, scale: float) -> float:
    """The norm of torch's own error in the layer's dtype."""
    return float((torch_attention(layer, scale).double() - exact).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASES[3]._replace(tail="none"), CASES[4]._replace(tail="none")], ids=str)
def test_sparse_attention_is_as_exact_as_torch_on_the_same_tokens(case: Case, dtype: torch.dtype) -> None:
    layer = random_layer(case.shape, (case.slots,) * 6, dtype=dtype)
    indices = backend_step(case, layer, case.encoder(dtype)).indices
    ours = backend.attend(layer.query, layer.keys, layer.values, indices, case.shape.scale).output.double()
    for kv in range(case.shape.kv_heads):
        heads = slice(kv * case.shape.group, (kv + 1) * case.shape.group)
        chosen = ~backend.unselected(indices[:, kv : kv + 1], case.slots)[:, 0, 0]
        part = Layer(layer.query[:, heads], layer.keys[:, kv : kv + 1], layer.values[:, kv : kv + 1], chosen)
        exact = torch_attention(Layer(*(tensor.double() for tensor in part[:3]), chosen), case.shape.scale)
        assert float((ours[:, heads] - exact).norm()) <= 2 * own_error(part, exact, case.shape.scale)


def test_full_budget_has_no_tail() -> None:
    """A log-mass of -inf: whatever the value, nothing changes."""
    layer = random_layer(Shape(2, 4, 64), (300, 200))
    indices = everything(layer, 2)
    nothing = torch.full((2, 8, 1), -math.inf, dtype=torch.float64)
    with_tail = backend.attend(
        layer.query, layer.keys, layer.values, indices, 0.1, nothing, noise(2, 8, 1, 64, seed=0)
    ).output
    assert torch.equal(with_tail, backend.attend(layer.query, layer.keys, layer.values, indices, 0.1).output)


@cases
def test_what_is_not_selected_is_not_read(case: Case) -> None:
    """Padding and unselected rows of K and V are NaN by the time attention runs; nothing changes."""
    layer, ours = case.layer(), case.encoder()
    step = backend_step(case, layer, ours)
    tail_part = () if case.tail == "none" else (step.log_mass, torch.ones_like(layer.query))
    plain = backend.attend(layer.query, layer.keys, layer.values, step.indices, case.shape.scale, *tail_part).output
    unread = backend.unselected(step.indices, case.slots)[:, :, 0].unflatten(1, (case.shape.kv_heads, -1)).all(2)
    keys, values = (tensor.masked_fill(unread[..., None], torch.nan) for tensor in (layer.keys, layer.values))
    assert unread.any() == (case.slots > 1)
    poisoned = backend.attend(layer.query, keys, values, step.indices, case.shape.scale, *tail_part).output
    assert torch.equal(poisoned, plain)
    assert plain.isfinite().all()


def test_views_of_a_larger_cache_are_enough() -> None:
    case = CASES[8]
    layer, ours = case.layer(), case.encoder()
    buffers = [torch.full((3, 2, case.slots + 50, 64), torch.nan, dtype=torch.float64) for _ in range(2)]
    for buffer, tensor in zip(buffers, layer[1:3], strict=True):
        buffer[:, :, : case.slots] = tensor
    view = layer._replace(keys=buffers[0][:, :, : case.slots], values=buffers[1][:, :, : case.slots])
    assert not view.keys.is_contiguous()
    plain, strided = backend_step(case, layer, ours), backend_step(case, view, ours)
    assert torch.equal(strided.indices, plain.indices)
    torch.testing.assert_close(strided.output, plain.output, rtol=0, atol=1e-12)
