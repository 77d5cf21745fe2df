"""``sparq`` against Algorithm 1 of its paper in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import random_layer
from loki_attention.core.planes import Planes
from loki_attention.methods.sparq import SparQ
from method_steps import BUDGET, LENGTHS, SHAPE, attend, groups, make, per, slots_of, softmax


def numpy_sparq(q: np.ndarray, keys: np.ndarray, values: np.ndarray, r: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 for the G queries of a set: chosen places and outputs (G, D)."""
    n = len(keys)
    i1 = np.argsort(-np.abs(q).sum(0))[:r]
    tau = np.sqrt(q.shape[1] * np.abs(q[:, i1]).sum(1) / np.abs(q).sum(1))
    s_hat = softmax(q[:, i1] @ keys[:, i1].T / tau[:, None])
    m = (np.arange(n) >= n - BUDGET.recent) | (np.arange(n) < BUDGET.sinks)
    i2 = np.sort(np.argsort(-np.where(m, np.inf, s_hat.sum(0)), kind="stable")[:k])
    alpha = s_hat[:, i2].sum(1, keepdims=True)
    s = softmax(q @ keys[i2].T / np.sqrt(q.shape[1]))
    return i2, alpha * (s @ values[i2]) + (1 - alpha) * values.mean(0)


@per
@pytest.mark.parametrize("planes", ["16@16", "4@16"])
def test_sparq_is_algorithm_1(planes: str, per: str) -> None:
    layer = random_layer(SHAPE, LENGTHS, holes=True)
    method = make(SparQ, planes=Planes.parse(planes), per=per)
    answer = attend(method, layer)
    sets = 8 if per == "query-head" else 2
    outputs = answer.output[:, :, 0].unflatten(1, (sets, -1)).flatten(0, 1)
    for part, picked, output in zip(groups(layer, sets), slots_of(answer), outputs, strict=True):
        query, keys, values, slots = (tensor.numpy() for tensor in part)
        chosen, expected = numpy_sparq(query, keys, values, method.components, BUDGET.of(len(slots)))
        assert picked == slots[chosen].tolist()
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-9)


def test_all_components_and_a_mean_tail_are_exact_top_mass() -> None:
    """With r = D the approximate softmax is the exact one, so that alpha is the mass kept and both answers agree."""
    layer = random_layer(SHAPE, (300,))
    covered = layer._replace(values=layer.values.mean(2, keepdim=True).expand_as(layer.values))
    ours, tailed = (attend(make(SparQ, planes=Planes.parse("64@16"), tail=tail), covered) for tail in ("none", "mean"))
    assert slots_of(ours) == slots_of(tailed)
    torch.testing.assert_close(ours.output, tailed.output, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.kept, tailed.kept, rtol=0, atol=1e-9)


def test_sparq_ignores_what_padding_holds() -> None:
    layer = random_layer(SHAPE, LENGTHS, holes=True)
    hidden: Tensor = ~layer.valid[:, None, :, None]
    poisoned = layer._replace(
        keys=layer.keys.masked_fill(hidden, torch.nan), values=layer.values.masked_fill(hidden, torch.nan)
    )
    plain, other = (attend(make(SparQ), tensors) for tensors in (layer, poisoned))
    assert slots_of(plain) == slots_of(other)
    torch.testing.assert_close(other.output, plain.output, rtol=0, atol=0)
