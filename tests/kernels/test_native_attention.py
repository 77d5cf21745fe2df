"""Native attention, gathered and dense, against torch's: every dtype, odd shapes, views, soft-caps, sinks, the tail."""

import math

import pytest
import torch

from helpers import Layer, Shape, noise, random_layer
from loki_attention.kernels import native, torch_backend
from loki_attention.kernels.native import Spans
from native_cases import (
    CASES,
    Case,
    assert_alike,
    assert_as_exact_as_torch,
    cases,
    dtypes,
    isas,
    poisoned,
    random_sinks,
    slots_read,
    visible_of,
)

SHAPES = [Shape(2, 1, 64), Shape(1, 4, 80), Shape(1, 7, 96), Shape(2, 2, 128), Shape(1, 3, 34), Shape(1, 4, 256)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def everything(layer: Layer) -> torch.Tensor:
    """Every valid slot of every sequence, as indices."""
    ranking = torch.zeros(len(layer.keys), layer.keys.shape[1], 1, layer.valid.shape[1], dtype=torch.int16)
    return torch_backend.top_k(ranking, layer.rows, layer.rows.tokens, torch_backend.Forced(4, 16))


@isas
@shapes
@dtypes
@pytest.mark.parametrize("slots", [1, 33, 257, 1000])
def test_dense_and_full_budget_are_as_exact_as_torch(shape: Shape, slots: int, dtype: torch.dtype, isa: str) -> None:
    lengths = tuple(max(1, slots - i * slots // 2) for i in range(2))
    for holes in (False, True):
        layer = random_layer(shape, lengths, dtype=dtype, holes=holes)
        dense = native.dense_decode(
            layer.query, layer.keys, layer.values, visible_of(layer, holes), shape.scale, isa=isa
        )
        assert_as_exact_as_torch(dense, layer, shape.scale)
        gathered = native.attend(layer.query, layer.keys, layer.values, everything(layer), shape.scale, isa=isa)
        assert torch.equal(gathered, dense)


@isas
@dtypes
@cases
def test_soft_caps_and_sinks(case: Case, isa: str, dtype: torch.dtype) -> None:
    layer = case.layer(dtype)
    options = {"soft_cap": 2.5, "sinks": random_sinks(case)}
    visible = visible_of(layer, case.holes)
    for scale in (case.shape.scale, 4 * case.shape.scale):
        ours = native.dense_decode(
            layer.query, layer.keys, layer.values, visible, scale, soft_cap=2.5, learned_sinks=options["sinks"], isa=isa
        )
        assert_as_exact_as_torch(ours, layer, scale, **options)


@isas
@dtypes
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_the_tail_is_one_more_token(isa: str, dtype: torch.dtype, soft_cap: float | None) -> None:
    case = CASES[5]
    layer, indices = case.layer(dtype), torch.arange(5, 900, 7)[None, None, None].expand(2, 2, 1, -1)
    mass, values = 2 + noise(2, 8, 1, seed=1).float(), noise(2, 8, 1, 128, seed=2).float()
    sinks = random_sinks(case)
    ours = native.attend(
        layer.query, layer.keys, layer.values, indices, case.shape.scale, tail_mass=mass, tail_values=values,
        soft_cap=soft_cap, learned_sinks=sinks, isa=isa,
    )  # fmt: skip
    keys, values_ = (tensor[:, :, indices[0, 0, 0]].double().repeat_interleave(4, 1) for tensor in layer[1:3])
    scores = case.shape.scale * layer.query.double() @ keys.mT
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    joined = torch.cat([scores, mass[..., None].double(), sinks.double()[None, :, None, None].expand(2, -1, 1, 1)], -1)
    weights = joined.softmax(-1)
    exact = weights[..., :-2] @ values_ + weights[..., -2:-1] * values.double()
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert float((ours.double() - exact).norm() / exact.norm()) < tolerance


@isas
def test_a_tail_without_mass_changes_nothing(isa: str) -> None:
    layer = CASES[3].layer()
    heads = layer.query.shape[1]
    nothing, values = torch.full((2, heads, 1), -math.inf), torch.ones(2, heads, 1, 96)
    arguments = (layer.query, layer.keys, layer.values, everything(layer), 0.1)
    with_tail = native.attend(*arguments, tail_mass=nothing, tail_values=values, isa=isa)
    assert torch.equal(with_tail, native.attend(*arguments, isa=isa))


@isas
@dtypes
@shapes
def test_only_indexed_rows_are_read(shape: Shape, dtype: torch.dtype, isa: str) -> None:
    layer = random_layer(shape, (400, 400), dtype=dtype)
    picks = [torch.randperm(400)[:count].sort().values for count in (77, 40)]
    indices = torch.full((2, shape.kv_heads, 1, 77), -1, dtype=torch.int32)
    for b, pick in enumerate(picks):
        indices[b, :, :, : len(pick)] = pick
    arguments = (indices, shape.scale)
    plain = native.attend(layer.query, layer.keys, layer.values, *arguments, isa=isa)
    read = slots_read(indices, 400)
    blind = poisoned(layer, read)
    assert torch.equal(native.attend(blind.query, blind.keys, blind.values, *arguments, isa=isa), plain)
    assert_as_exact_as_torch(plain, layer, shape.scale, seen=read)


@isas
@dtypes
@shapes
def test_views_of_larger_buffers(shape: Shape, dtype: torch.dtype, isa: str) -> None:
    """Neighbouring memory, in every direction, is NaN."""
    layer = random_layer(shape, (130, 130), dtype=dtype)
    kv, dim = shape.kv_heads, shape.dim
    keys, values = (torch.full((4, 150, kv + 1, dim + 3), torch.nan, dtype=dtype) for _ in range(2))
    views = [tensor.transpose(1, 2)[1:3, 1:, 7:137, 2 : 2 + dim] for tensor in (keys, values)]
    for view, tensor in zip(views, layer[1:3], strict=True):
        view.copy_(tensor)
    spans = Spans(None, torch.full((2,), 130))
    plain = native.dense_decode(layer.query, layer.keys, layer.values, spans, shape.scale, isa=isa)
    assert torch.equal(native.dense_decode(layer.query, *views, spans, shape.scale, isa=isa), plain)


@isas
@dtypes
def test_nothing_to_attend_gives_zeros(isa: str, dtype: torch.dtype) -> None:
    query, keys = torch.ones(1, 2, 1, 64, dtype=dtype), torch.full((1, 1, 40, 64), torch.nan, dtype=dtype)
    spans = Spans(torch.tensor([7]), torch.tensor([7]))
    assert not native.dense_decode(query, keys, keys, spans, 1.0, isa=isa).any()
    none = torch.full((1, 1, 1, 3), -1)
    assert not native.attend(query, keys, keys, none, 1.0, isa=isa).any()


@isas
@dtypes
def test_threads_change_nothing_but_rounding(isa: str, dtype: torch.dtype) -> None:
    layer = random_layer(Shape(1, 4, 128), (1000,), dtype=dtype)
    spans = Spans(None, torch.tensor([1000]))
    one, *others = (
        native.dense_decode(layer.query, layer.keys, layer.values, spans, 0.1, isa=isa, threads=threads)
        for threads in (1, 2, 3, 8)
    )
    for other in others:
        assert_alike(other, one)


@isas
def test_probes_read_what_they_say(isa: str) -> None:
    keys, values = torch.randn(1, 2, 64, 64), torch.randn(1, 2, 64, 64)
    assert native.streaming_probe(keys, keys, isa=isa) == 0
    assert native.streaming_probe(keys, values, isa=isa) != 0
    every = torch.arange(64).expand(1, 2, 1, 64)
    gathered = native.gather_probe(torch.ones(1, 2, 1, 64), keys, values, every, isa=isa, threads=1)
    assert gathered == native.streaming_probe(keys, values, isa=isa, threads=2)
