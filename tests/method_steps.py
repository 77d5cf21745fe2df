"""A method's answer for the new row of every sequence of a random layer, with and without a cache."""

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from helpers import Layer, Shape, chosen_slots
from loki_attention.cache import LayerCache
from loki_attention.core.budget import Budget
from loki_attention.core.encoder import Encoder
from loki_attention.core.tail import TailSums
from loki_attention.kernels import torch_backend
from loki_attention.kernels.rows import Rows
from loki_attention.methods import Answer, LayerView, Method, Step

SHAPE = Shape(2, 4, 64)
BUDGET = Budget(tokens=48, sinks=4, recent=16)
LENGTHS = (300, 211, 30)
per = pytest.mark.parametrize("per", ["kv-head", "query-head"])


def make(kind: type[Method], **changes: Any) -> Any:
    fields: dict[str, Any] = {"budget": BUDGET, "head_dim": SHAPE.dim}
    return kind(**{**fields, **changes})


def view_of(layer: Layer, method: Method) -> LayerView:
    """The layer without a cache: twins and sums are made on the spot."""

    def twins(encoder: Encoder) -> Tensor:
        return encoder.encode_keys(layer.keys)

    def sums(encoder: Encoder | None, rows: Rows) -> TailSums:
        leading = torch_backend.leading_dims(layer.keys, method.encoder)
        return torch_backend.sums_of_blocks(leading, layer.values, rows)

    return LayerView(layer.keys, layer.values, twins, sums)


def cached_view_of(layer: Layer, method: Method) -> LayerView:
    """The layer in a cache that was filled bit by bit."""
    store, start = LayerCache(), 0
    for stop in (layer.keys.shape[2] // 2, layer.keys.shape[2]):
        store.append(layer.keys[:, :, start:stop], layer.values[:, :, start:stop])
        start = stop
        if method.encoder is not None:
            store.encode(method.encoder)

    def sums(encoder: Encoder | None, rows: Rows) -> TailSums:
        held = store.absorb(encoder, rows)
        return TailSums(held.tokens[:, None], *(tensor.unsqueeze(2) for tensor in held[1:]))

    return LayerView(layer.keys, layer.values, store.encode, sums)


def attend(method: Method, layer: Layer, view: LayerView | None = None, scale: float = SHAPE.scale) -> Answer:
    """The method's answer for the new row of every sequence."""
    rows, encoded = layer.rows, method.encode(layer.query, scale)
    view = view_of(layer, method) if view is None else view
    return method.attend(Step(layer.query, view, rows, method.budgets(rows), scale, encoded))


def slots_of(answer: Answer) -> list[list[int]]:
    """The chosen slots, sequence by sequence and set by set."""
    assert answer.indices is not None
    return chosen_slots(answer.indices)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def groups(layer: Layer, sets: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Query (G, D), keys and values (n, D) and slots (n) of every sequence and set; valid tokens alone."""
    parts = []
    for b, valid in enumerate(layer.valid):
        for i, query in enumerate(layer.query[b, :, 0].unflatten(0, (sets, -1))):
            kv = i * layer.keys.shape[1] // sets
            parts.append((query, layer.keys[b, kv, valid], layer.values[b, kv, valid], valid.nonzero().flatten()))
    return parts
