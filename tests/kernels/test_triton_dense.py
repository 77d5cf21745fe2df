"""Dense decode by the Triton kernels, and what they refuse."""

import pytest
import torch

from helpers import Shape
from kernel_cases import DTYPES, Case, random_sinks
from loki_attention.errors import ArgumentError
from loki_attention.kernels.rows import Rows, Spans
from loki_attention.kernels.triton import availability
from loki_attention.kernels.triton.workspace import placed, workspace_for
from triton_cases import (
    DEVICE,
    LONG,
    SHORT,
    TUNINGS,
    Needs,
    TritonEncoder,
    Workspace,
    assert_exact,
    launch,
    on_device,
    prepared,
    visible_on_device,
    workspace,
)

CASES = [
    Case("32@4", Shape(1, 4, 64), (100, 33)),
    Case("32@4", Shape(1, 7, 80), (150, 1)),
    Case("32@4", Shape(2, 1, 128), (130,)),
    Case("32@4", Shape(1, 4, 96), (200, 90), holes=True),
    Case("32@4", Shape(1, 2, 256), (70,)),
]
DENSE = [
    pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}", marks=() if i in (0, 1, 3) else pytest.mark.slow)
    for i, case in enumerate(CASES)
    for j, dtype in enumerate(DTYPES)
    if DEVICE.type == "cuda" or i % 3 == j
]


@pytest.mark.parametrize(("case", "dtype"), DENSE)
def test_dense_decode_is_attention_over_every_valid_slot(case: Case, dtype: torch.dtype) -> None:
    layer = case.layer(dtype)
    moved, visible = on_device(layer), visible_on_device(layer, case.holes)
    for cut in TUNINGS.values():
        for soft_cap, sinks in ((None, None), (1.5, random_sinks(case))):
            space = workspace(case, moved)
            ours = launch.dense_decode(
                *moved[:3], visible, case.shape.scale, soft_cap=soft_cap,
                learned_sinks=None if sinks is None else sinks.to(DEVICE), tuning=cut.tuning(moved.keys), workspace=space,
            )  # fmt: skip
            assert_exact(ours.cpu(), layer, case.shape.scale, soft_cap=soft_cap, sinks=sinks)
            assert not space.done.any()


def test_strided_views_of_a_larger_cache_are_read_in_place() -> None:
    case = CASES[0]
    layer = on_device(case.layer())
    room = torch.full((2, 1, 300, 64), torch.nan, device=DEVICE)
    room[:, :, 50:150] = layer.keys
    values = room.transpose(1, 2).clone().transpose(1, 2)
    values[:, :, 50:150] = layer.values
    visible, cut = visible_on_device(case.layer(), False), SHORT.tuning(layer.keys)
    ours = launch.dense_decode(layer.query, room[:, :, 50:150], values[:, :, 50:150], visible, 0.125, tuning=cut)
    theirs = launch.dense_decode(*layer[:3], visible, 0.125, tuning=cut)
    assert torch.equal(ours, theirs)


def test_an_empty_sequence_gives_zeros() -> None:
    layer = on_device(CASES[0].layer())
    visible, cut = Spans(None, torch.tensor([0, 100], device=DEVICE)), LONG.tuning(layer.keys)
    for sinks in (None, torch.full((layer.query.shape[1],), -200.0, device=DEVICE)):
        found = launch.dense_decode(*layer[:3], visible, 0.125, tuning=cut, learned_sinks=sinks)
        assert not found[0].any()
        assert found[1].any()


def test_what_the_kernels_cannot_take_is_refused() -> None:
    ready = prepared(CASES[0])
    query, keys, values = ready.layer[:3]
    wide = keys.double()
    bad = {
        "float32, bfloat16 or float16": lambda: launch.dense_decode(query, wide, values, ready.visible, 1.0),
        "query is torch.float16": lambda: launch.dense_decode(query.half(), keys, values, ready.visible, 1.0),
        "rows whose last dim": lambda: launch.dense_decode(query, keys.mT.contiguous().mT, values, ready.visible, 1.0),
        "3 heads over 2": lambda: launch.dense_decode(
            query[:, :3], keys.repeat(1, 2, 1, 1), values.repeat(1, 2, 1, 1), ready.visible, 1.0
        ),
        "whole tiles of 16": lambda: ready._replace(packed=ready.packed[:, :, :100]).step(),
        "sums over cached": lambda: ready._replace(case=CASES[0]._replace(tail="mean"), sums=None).step(),
        "k is torch.int32": lambda: ready._replace(k=ready.k.int()).step(),
        "without holes": lambda: ready._replace(visible=visible_on_device(CASES[0].layer(), True)).step(newest=True),
        "give at most that": lambda: ready.encoder.write(keys, ready.packed, 0, 1000),
        "workspace is for": lambda: ready.step(
            workspace=Workspace(Needs(rows=1, group=1, dim=1, rank=4, slots=1, chunks=1, splits=1), DEVICE)
        ),
        "R@8|8, 4 or 2 bits": lambda: TritonEncoder(Case("16@32", Shape(2, 4, 64), (1,)).encoder()),
    }
    for message, call in bad.items():
        with pytest.raises(ArgumentError, match=message):
            call()


def test_a_workspace_knows_the_gpu_that_its_tensors_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """``cuda`` is the one that is current; tensors there say ``cuda:1``, and are compared with that."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert placed(torch.device("cuda")) == placed(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert placed(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert placed(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.undo()
    needs = Needs(rows=1, group=1, dim=16, rank=16, slots=16, chunks=1, splits=1)
    space = Workspace(needs, DEVICE)
    assert space.device == space.done.device
    assert workspace_for(needs, space.done.device, space) is workspace_for(needs, DEVICE, space) is space


def test_availability_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    assert availability.problem("cpu" if availability.interpreted() else "cuda") is None
    monkeypatch.setattr(availability, "version", lambda: "3.5.1")
    assert availability.problem() == "triton 3.5.1 is older than 3.6"
    monkeypatch.setattr(availability, "version", lambda: None)
    assert availability.problem() == "triton is not installed"
    monkeypatch.undo()
    for word in ("1", "true", "ON", "Yes", "y", "t", "2", "off", ""):
        monkeypatch.setenv(availability.INTERPRETER_VARIABLE, word)
        assert availability.interpreted() == triton.knobs.runtime.interpret
    monkeypatch.setenv(availability.INTERPRETER_VARIABLE, "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert availability.problem() == "torch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert availability.problem("cpu") == "the model is on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert availability.problem("cuda") == "the GPU has compute capability 7.5, below 8.0"
    assert isinstance(Rows, type)
