"""The settings of methods at equal bytes: never above the target, never needlessly below, none where it cannot be."""

from dataclasses import replace

import pytest
import torch

from loki_attention import attach
from loki_attention.core.budget import Budget
from loki_attention.core.planes import Planes
from loki_attention.errors import ArgumentError
from loki_attention.methods import SPARSE_METHODS
from loki_attention.methods.byte_targets import Point, StepShape, point_at, step_bytes
from models import BUDGET, random_ids, tiny_basis, tiny_model

SHAPE = StepShape(tokens=2048, head_dim=64, group_size=2, budget=Budget(fraction=1 / 8, minimum=36, sinks=4, recent=32))
FAST = ("loki", "streaming", "random", "h2o", "snapkv", "sparq", "double-sparsity")


def share_of(name: str, point: Point, shape: StepShape, tokens: int) -> float:
    """Bytes of a step at ``tokens`` over dense attention's, K/V in 16 bits."""
    kind = SPARSE_METHODS[name]
    per = "query-head" if kind.principal_components else shape.per
    method = kind(budget=point.budget, head_dim=64, tail=shape.tail, per=per, planes=point.planes)
    k = point.budget.of(tokens)
    return float(method.read_bytes(torch.tensor([tokens]), torch.tensor([k]), 2, 128)) / (256 * tokens)


@pytest.mark.parametrize("share", [1 / 4, 1 / 8, 1 / 16])
@pytest.mark.parametrize("name", SPARSE_METHODS)
def test_a_point_reads_its_share_and_one_token_more_would_be_too_much(name: str, share: float) -> None:
    point = point_at(name, share, SHAPE)
    if point is None:
        return
    k = point.budget.of(2048)
    more = replace(point.budget, fraction=None, tokens=k + 1)
    assert point.share == share_of(name, point, SHAPE, 2048) <= share
    assert share_of(name, point._replace(budget=more), SHAPE, 2048) > share
    assert share_of(name, point, SHAPE, 4096) <= share + 2 / 4096


@pytest.mark.parametrize("tokens", [1024, 2048, 4096])
def test_who_can_go_how_low(tokens: int) -> None:
    shape = replace(SHAPE, tokens=tokens)
    reached = {share: {n for n in SPARSE_METHODS if point_at(n, share, shape)} for share in (1 / 4, 1 / 8, 1 / 16)}
    assert reached[1 / 4] == {*FAST, "quest", "paper-loki"}
    assert reached[1 / 8] >= {*FAST, "quest"}
    assert reached[1 / 16] >= {"streaming", "random", "h2o", "snapkv"}
    assert "quest" not in reached[1 / 16], "the bounds of its pages are the budget"
    assert not {"exact-topk", "pca-attn"} & reached[1 / 4]


@pytest.mark.parametrize(
    ("name", "planes"),
    [
        ("loki", ["16@4+32@2", "16@4+32@2", "8@4+16@2", "8@4"]),
        ("sparq", ["16@16", "8@16", "4@16", None]),
        ("double-sparsity", ["32@4", "32@4", "16@4", "8@4"]),
        ("streaming", [None] * 4),
    ],
)
def test_planes_take_at_most_half(name: str, planes: list[str | None]) -> None:
    shape = replace(SHAPE, tokens=8192)
    points = [point_at(name, share, shape) for share in (1 / 4, 1 / 8, 1 / 16, 1 / 32)]
    assert [point and point.planes and str(point.planes) for point in points] == planes


def test_tails_count() -> None:
    plain, linear = (point_at("loki", 1 / 8, replace(SHAPE, tail=tail)) for tail in ("none", "linear"))
    assert linear.share <= 1 / 8
    # 4 (64 + 16 + 16 * 64) bytes of sums are 17.25 rows of keys and values.
    assert plain.budget.of(2048) - linear.budget.of(2048) == 18


@pytest.mark.parametrize("name", SPARSE_METHODS)
@torch.inference_mode()
def test_steps_count_as_an_attached_model_reports_them(name: str) -> None:
    """In 16 bits; steps that the budget of 24 tokens covers are dense."""
    model, prompt, length = tiny_model(dtype=torch.bfloat16), 30, 60
    with attach(model, tiny_basis(), method=name, budget=BUDGET, tail="none") as handle, handle.continuation(prompt):
        model(random_ids(1, length))
    report = handle.report()
    layer = report.layers[1]
    point = Point(BUDGET, None if report.planes is None else Planes.parse(report.planes), 0.0)
    shape = StepShape(tokens=length, head_dim=16, group_size=2, budget=BUDGET)
    tokens = torch.arange(prompt + 1, length + 1)
    read, dense = (step_bytes(method, point, shape, tokens, prompt) for method in (name, "dense"))
    assert layer.sparse_rows == len(tokens)
    assert layer.bytes_read == 2 * float(read.sum())
    assert layer.bytes_dense == 2 * float(dense.sum())
    assert step_bytes(name, point, shape, torch.tensor([10, 24])).tolist() == [640.0, 1536.0]


def test_what_cannot_be_is_refused() -> None:
    assert point_at("dense", 1 / 4, SHAPE) is None
    with pytest.raises(ArgumentError, match="did you mean 'quest'"):
        point_at("qest", 1 / 4, SHAPE)
    with pytest.raises(ArgumentError, match="share must be above 0"):
        point_at("loki", 0.0, SHAPE)
    with pytest.raises(ArgumentError, match="has no tail 'linear'"):
        point_at("quest", 1 / 4, replace(SHAPE, tail="linear"))
