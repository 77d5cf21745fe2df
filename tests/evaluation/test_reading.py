"""Counted bytes are those that an attached model in 16 bits reports."""

import copy

import pytest
import torch

from loki_attention import Budget
from loki_attention.evaluation.reading import DecodeStep, step_bytes
from loki_attention.evaluation.variant import Variant
from loki_attention.methods import METHOD_NAMES, method_class
from models import BUDGET, random_ids, tiny_basis, tiny_model


@pytest.mark.parametrize("name", [name for name in METHOD_NAMES if name != "dense"])
def test_bytes_are_those_the_report_counts(name: str) -> None:
    kind, model = method_class(name), copy.deepcopy(tiny_model()).to(torch.bfloat16)
    assert kind is not None
    variant = Variant(name=name, method=name, budget=BUDGET, basis=tiny_basis() if kind.needs_basis else None)
    with torch.inference_mode(), variant.attach(model) as attached, attached.continuation(100):
        model(random_ids(1, 130))
    layers = [layer for layer in attached.report().layers if layer.sparse_rows]
    steps = len(layers) * 30
    counted = step_bytes(model, variant, [DecodeStep(100, tokens) for tokens in range(101, 131)])
    assert counted.read == pytest.approx(sum(layer.bytes_read for layer in layers) / steps)
    assert counted.dense == pytest.approx(sum(layer.bytes_dense for layer in layers) / steps)


def test_dense_and_whole_budgets_read_everything() -> None:
    whole = Variant(name="whole", method="streaming", budget=Budget(tokens=1000))
    dense = Variant(name="dense", method="dense", budget=None)
    for variant in (whole, dense):
        counted = step_bytes(tiny_model(), variant, [DecodeStep(60, 64), DecodeStep(60, 128)])
        assert (counted.read, counted.fraction) == (2 * 2 * 16 * 2 * 96, 1.0)
