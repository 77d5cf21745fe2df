"""``double-sparsity``: which channels calibration names, and the selection by their labels in numpy."""

import numpy as np
import pytest
import torch

from helpers import CPU, random_basis, random_layer, random_moments
from loki_attention.core.candidates import channels
from loki_attention.core.encoder import Encoder, encoder
from loki_attention.core.planes import Planes
from loki_attention.methods.double_sparsity import DoubleSparsity
from method_steps import BUDGET, LENGTHS, SHAPE, attend, groups, make, slots_of, softmax


def label_cache(planes: str, candidate: str = "balanced") -> Encoder:
    return encoder(channels(random_basis(SHAPE, candidate)), Planes.parse(planes), SHAPE.group).to(CPU, torch.float64)


@pytest.mark.parametrize("candidate", ["balanced", "pca-pre", "pca-post"])
def test_channels_are_those_of_the_largest_products_whatever_the_basis(candidate: str) -> None:
    moments, found = random_moments(SHAPE), channels(random_basis(SHAPE, candidate))
    keys, queries = moments.post_keys, moments.queries
    variance = keys.covariance.diagonal(dim1=-2, dim2=-1)
    weight = (variance * queries.second_moment.diagonal(dim1=-2, dim2=-1)).numpy()
    order = found.key_map.argmax(1).numpy()
    ranked = np.take_along_axis(weight, order, 1)
    assert (np.diff(ranked, axis=1) <= 1e-4 * ranked[:, :1]).all()
    assert (np.sort(order, 1) == np.arange(SHAPE.dim)).all()
    assert torch.equal(found.query_map, found.key_map)
    in_order = torch.from_numpy(np.take_along_axis(variance.numpy(), order, 1)).float()
    torch.testing.assert_close(found.key_moment.diagonal(dim1=-2, dim2=-1), in_order, rtol=1e-3, atol=1e-4)


def test_selection_is_by_the_label_cache_alone() -> None:
    """Four bits a channel, 2.5 deviations wide, after the mean; one head a set, as the paper has it."""
    layer, labels = random_layer(SHAPE, LENGTHS, holes=True), label_cache("16@4")
    answer = attend(make(DoubleSparsity, encoder=labels, per="query-head"), layer)
    outputs = answer.output[:, :, 0].flatten(0, 1)
    parts = zip(groups(layer, 8), slots_of(answer), outputs, strict=True)
    for i, ((query, keys, values, slots), picked, output) in enumerate(parts):
        head = i % 8 // 4
        heavy = labels.key_map[head].argmax(0).numpy()
        step = 2.5 / 7 * labels.deviations[head].numpy()
        kept = (keys.numpy() - labels.mean[head].numpy())[:, heavy]
        codes = np.clip(np.round(kept / step), -7, 7)
        folded = query.numpy()[0, heavy] * step
        unit = np.abs(folded).max() / 127
        scores = SHAPE.scale * unit * (codes @ np.round(folded / unit))
        deviation = SHAPE.scale * np.sqrt(((query.numpy()[0, heavy] * labels.deviations[head].numpy()) ** 2).sum())
        n, k = len(slots), BUDGET.of(len(slots))
        forced = (np.arange(n) < BUDGET.sinks) | (np.arange(n) >= n - BUDGET.recent)
        ranking = np.clip(np.round(scores * 2048 / deviation), -32768, 32767)
        chosen = np.sort(np.argsort(-np.where(forced, np.inf, ranking), kind="stable")[:k])
        assert picked == slots[chosen].tolist()
        weights = softmax(SHAPE.scale * query.numpy() @ keys.numpy()[chosen].T)
        np.testing.assert_allclose(output, (weights @ values.numpy()[chosen])[0], rtol=0, atol=1e-9)


def test_no_kernels_where_the_tail_is_exact() -> None:
    fields = {"encoder": label_cache("16@4")}
    assert make(DoubleSparsity, tail="none", **fields).on(CPU, torch.float32, backend="native").kernels is not None
    assert make(DoubleSparsity, tail="mean", **fields).on(CPU, torch.float32, backend="native").kernels is None
