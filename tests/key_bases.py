"""A small ``KeyBasis`` of a model that is none, for saving, loading and fitting again."""

import dataclasses
from typing import Any

import torch

from helpers import FakeModel, Shape, random_basis, random_moments
from loki_attention.core.basis import KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.core.candidates import TENSOR_FIELDS
from loki_attention.core.planes import Planes
from loki_attention.core.spec import ModelSpec

SHAPE = Shape(2, 2, 16)
LAYERS = (0, 1, 2)
RECORD: dict[str, Any] = {
    "length": 2048,
    "figures": {"candidates": {"pca-pre": {"kl": 0.02}, "pca-post": {"kl": 0.01}, "balanced": {"kl": 0.005}}},
}


def make_basis(**changes: Any) -> KeyBasis:
    basis = KeyBasis(
        spec=ModelSpec.of(FakeModel()),
        layers={i: random_basis(SHAPE, "balanced", seed=i) for i in LAYERS},
        planes=Planes.parse("8@4"),
        budget=Budget(fraction=1 / 8, minimum=48, recent=16),
        tail="linear",
        dense_layers=(0,),
        record=RECORD,
        moments={i: random_moments(SHAPE, seed=i) for i in LAYERS},
    )
    return dataclasses.replace(basis, **changes)


def assert_same(ours: KeyBasis, theirs: KeyBasis) -> None:
    for name in ("spec", "planes", "budget", "tail", "dense_layers", "record", "candidate"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert list(ours.layers) == list(theirs.layers)
    for i, layer in ours.layers.items():
        assert layer.candidates == theirs.layers[i].candidates
        assert all(torch.equal(getattr(layer, name), getattr(theirs.layers[i], name)) for name in TENSOR_FIELDS)
