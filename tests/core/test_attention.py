"""The reference decode step: against a numpy version that shares no code with it, and its symmetries."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import Layer, Shape, noise, random_encoder, random_layer, reference_steps
from loki_attention.core.attention import ReferenceStep, Softmax, attend, decode_step
from loki_attention.core.budget import Budget
from loki_attention.core.encoder import Encoder

BUDGET = Budget(tokens=48, sinks=4, recent=16)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def quantised(ours: Encoder, head: int, keys: np.ndarray) -> np.ndarray:
    """Levels of (n, D) keys; in float planes the values."""
    x, bits = (keys - ours.mean[head].numpy()) @ ours.key_map[head].numpy(), np.array(ours.planes.bits)
    if ours.planes.is_float:
        return x.astype(np.float32).astype(float)
    x = x / ours.steps[head].numpy()
    return np.where(bits == 2, np.clip(np.rint(x + 1.5), 0, 3) - 1.5, np.clip(np.rint(x), -7, 7))


def numpy_step(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    slots: np.ndarray,
    head: int,
    ours: Encoder,
    k: int,
    scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One group (G, D) over the n valid tokens of one KV head: output with the linear tail, slots, log-mass."""
    n, levels, e = len(slots), quantised(ours, head, keys), q @ ours.query_map[head].numpy()
    sd = ours.deviations[head].numpy()
    if ours.planes.is_float:
        s = scale * e @ levels.T
    else:
        folded = e * ours.steps[head].numpy()
        unit = np.abs(folded).max(1, keepdims=True) / 127
        s = scale * unit * (np.rint(folded / unit) @ levels.T)
    forced = (np.arange(n) < BUDGET.sinks) | (np.arange(n) >= n - BUDGET.recent)
    stride = max(1, n // 512)
    sample = (slots // 16 - slots[0] // 16) % stride == n % stride
    drawn = sample & ~forced
    L = np.log(np.exp(s[:, forced]).sum(1) + (~forced).sum() / max(1, drawn.sum()) * np.exp(s[:, drawn]).sum(1))
    deviation = scale * np.sqrt(((e * sd) ** 2).sum(1))
    c = (s - 0.75 * L[:, None]).max(0) + 0.75 * L.min() if len(q) > 1 else s[0]
    if not ours.planes.is_float:
        c = np.clip(np.rint(2048 * c / deviation.max()), -32768, 32767)
    chosen = np.sort(np.lexsort((np.arange(n), -np.where(forced, np.inf, c)))[:k])
    rest = np.setdiff1d(np.arange(n), chosen)
    m = rest[sample[rest]]
    offset = scale * q @ ours.mean[head].numpy() + scale**2 * float(ours.kappa[head])
    with np.errstate(divide="ignore"):
        t = np.log(len(rest) / max(1, len(m)) * np.exp(s[:, m] + offset[:, None]).sum(1))
    exact = scale * q @ keys[chosen].T
    cover, r1 = 64 * max(0, n // 64 - 1), min(q.shape[1] // 4, ours.planes.rank)
    if not cover:
        return softmax(exact) @ values[chosen], slots[chosen], t
    x = ((keys - ours.mean[head].numpy()) @ ours.key_map[head].numpy())[:cover, :r1]
    v = values[:cover]
    X = (x - x.mean(0)).T @ (v - v.mean(0)) / cover
    u = v.mean(0) + scale * np.minimum(1, 1 / deviation)[:, None] * e[:, :r1] @ X
    weights = softmax(np.concatenate([exact, t[:, None]], 1))
    return weights[:, :-1] @ values[chosen] + weights[:, -1:] * u, slots[chosen], t


@pytest.mark.parametrize(
    ("shape", "planes", "slots", "length", "holes"),
    [
        (Shape(2, 4, 64), "16@4+32@2", 300, 300, False),
        (Shape(2, 4, 64), "16@4+32@2", 300, 211, True),
        (Shape(2, 1, 64), "64@4", 300, 250, False),
        (Shape(1, 7, 80), "16@32", 257, 257, False),
        (Shape(1, 4, 96), "32@4", 1500, 1400, True),
        (Shape(1, 2, 64), "16@2", 2100, 2100, False),
        (Shape(1, 4, 64), "16@4+32@2", 100, 60, False),
        (Shape(1, 4, 64), "16@4+32@2", 100, 30, False),
    ],
)
def test_decode_step_equals_numpy(shape: Shape, planes: str, slots: int, length: int, holes: bool) -> None:
    ours, layer = random_encoder(shape, planes), random_layer(shape, (length,), slots, holes=holes)
    (step,) = reference_steps(layer, ours, BUDGET, shape.scale, "linear")
    places = layer.valid[0].nonzero().flatten().numpy()
    for head in range(shape.kv_heads):
        rows = slice(head * shape.group, (head + 1) * shape.group)
        q, k, v = (
            tensor.numpy() for tensor in (layer.query[0, rows, 0], *(t[0, head][layer.valid[0]] for t in layer[1:3]))
        )
        output, picked, mass = numpy_step(q, k, v, places, head, ours, min(48, length), shape.scale)
        assert step.indices[head].tolist() == picked.tolist()
        np.testing.assert_allclose(step.log_mass[rows], mass, rtol=1e-6)
        np.testing.assert_allclose(step.output[rows], output, rtol=1e-6, atol=1e-7)


def dense(layer: Layer, scale: float) -> Tensor:
    grouped = (tensor.repeat_interleave(layer.query.shape[1] // layer.keys.shape[1], 1) for tensor in layer[1:3])
    mask = layer.valid[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(layer.query, *grouped, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("tail", ["none", "mean", "linear"])
@pytest.mark.parametrize("group", [1, 4])
def test_full_budget_is_dense_attention(group: int, tail: str) -> None:
    shape = Shape(2, group, 64)
    layer, ours = random_layer(shape, (200, 131), 220), random_encoder(shape, "16@4+32@2")
    steps = reference_steps(layer, ours, Budget(tokens=200), 0.2, tail)
    for step, expected in zip(steps, dense(layer, 0.2), strict=True):
        torch.testing.assert_close(step.output, expected[:, 0], rtol=0, atol=1e-12)
        assert (step.log_mass == -torch.inf).all()


def test_attend_is_softmax_attention() -> None:
    query, keys, values = noise(3, 8, seed=0), noise(20, 8, seed=1), noise(20, 5, seed=2)
    expected = softmax(0.3 * query.numpy() @ keys.numpy().T) @ values.numpy()
    np.testing.assert_allclose(attend(query, keys, values[:, :5].repeat(1, 2)[:, :8], 0.3)[:, :5], expected)


def test_a_soft_cap_bounds_the_scores() -> None:
    query, keys, values = noise(3, 8, seed=0), noise(20, 8, seed=1), noise(20, 8, seed=2)
    expected = softmax(2 * np.tanh(0.9 * query.numpy() @ keys.numpy().T / 2)) @ values.numpy()
    np.testing.assert_allclose(attend(query, keys, values, 0.9, softmax=Softmax(softcap=2.0)), expected)


def test_a_sink_logit_takes_mass_and_gives_no_value() -> None:
    query, keys, values = noise(3, 8, seed=0), noise(20, 8, seed=1), noise(20, 8, seed=2)
    logits, mass, u = noise(3, seed=3), noise(3, seed=4), noise(3, 8, seed=5)
    scores = np.exp(0.9 * query.numpy() @ keys.numpy().T)
    denominator = scores.sum(1) + np.exp(logits.numpy())
    plain = attend(query, keys, values, 0.9, softmax=Softmax(sink_logits=logits))
    np.testing.assert_allclose(plain, scores @ values.numpy() / denominator[:, None])
    tail = np.exp(mass.numpy())[:, None]
    expected = (scores @ values.numpy() + tail * u.numpy()) / (denominator[:, None] + tail)
    np.testing.assert_allclose(attend(query, keys, values, 0.9, mass, u, Softmax(sink_logits=logits)), expected)


def test_attend_with_a_tail_is_one_more_token() -> None:
    """A key that scores t with value u, appended, gives the same."""
    query, keys, values, u = (noise(*shape, seed=i) for i, shape in enumerate([(1, 8), (20, 8), (20, 8), (1, 8)]))
    mass = torch.tensor([1.3], dtype=torch.float64)
    extra = query * (mass / (0.3 * query.square().sum()))
    expected = attend(query, torch.cat([keys, extra]), torch.cat([values, u]), 0.3)
    torch.testing.assert_close(attend(query, keys, values, 0.3, mass, u), expected)


def test_a_tail_without_mass_changes_nothing() -> None:
    query, keys, values = noise(3, 8, seed=0), noise(20, 8, seed=1), noise(20, 8, seed=2)
    nothing = torch.full((3,), -math.inf, dtype=torch.float64)
    torch.testing.assert_close(
        attend(query, keys, values, 0.3, nothing, noise(3, 8, seed=3)), attend(query, keys, values, 0.3)
    )


def test_exact_mass_and_mean_of_the_rest_give_back_dense_attention() -> None:
    """With t the true log-mass of the rest and u its true weighted mean, nothing is lost."""
    query, keys, values = noise(1, 8, seed=0), noise(60, 8, seed=1), noise(60, 8, seed=2)
    scores = (0.3 * query @ keys.mT)[:, 10:]
    rest = scores.softmax(-1) @ values[10:]
    sparse = attend(query, keys[:10], values[:10], 0.3, scores.logsumexp(-1), rest)
    torch.testing.assert_close(sparse, attend(query, keys, values, 0.3))


def one(layer: Layer, ours: Encoder, shape: Shape, tail: str = "linear") -> ReferenceStep:
    return decode_step(
        layer.query[0, :, 0], layer.keys[0], layer.values[0], layer.valid[0], ours, BUDGET, shape.scale, tail
    )


@pytest.mark.parametrize("shift", [1, 16, 37])
def test_left_padding_shifts_indices_and_changes_nothing_else(shift: int) -> None:
    shape = Shape(2, 4, 64)
    layer, ours = random_layer(shape, (300,)), random_encoder(shape, "16@4+32@2")
    padding = torch.full((1, 2, shift, 64), torch.nan, dtype=torch.float64)
    padded = layer._replace(
        keys=torch.cat([padding, layer.keys], 2),
        values=torch.cat([padding, layer.values], 2),
        valid=torch.cat([torch.zeros(1, shift, dtype=torch.bool), layer.valid], 1),
    )
    plain, shifted = one(layer, ours, shape), one(padded, ours, shape)
    assert torch.equal(shifted.indices, plain.indices + shift)
    torch.testing.assert_close(shifted.output, plain.output, rtol=0, atol=1e-12)
    torch.testing.assert_close(shifted.log_mass, plain.log_mass, rtol=0, atol=1e-12)


def test_permuting_kv_heads_permutes_the_answer() -> None:
    shape = Shape(2, 4, 64)
    layer, ours = random_layer(shape, (300,)), random_encoder(shape, "16@4+32@2")
    names = ("mean", "query_map", "key_map", "deviations", "steps", "kappa")
    swapped = Encoder(ours.digest, ours.planes, *(getattr(ours, name).flip(0) for name in names))
    turned = Layer(
        layer.query.unflatten(1, (2, 4)).flip(1).flatten(1, 2), layer.keys.flip(1), layer.values.flip(1), layer.valid
    )
    plain, other = one(layer, ours, shape), one(turned, swapped, shape)
    assert torch.equal(other.indices.flip(0), plain.indices)
    torch.testing.assert_close(
        other.output.unflatten(0, (2, 4)).flip(0).flatten(0, 1), plain.output, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("tail", ["mean", "linear"])
def test_the_tail_comes_nearer_to_dense_attention(tail: str) -> None:
    shape = Shape(2, 4, 64)
    layer, ours = random_layer(shape, (600,)), random_encoder(shape, "16@4+32@2")
    expected = dense(layer, shape.scale)[0, :, 0]
    without, with_tail = (one(layer, ours, shape, kind).output for kind in ("none", tail))
    assert (with_tail - expected).norm() < 0.7 * (without - expected).norm()
