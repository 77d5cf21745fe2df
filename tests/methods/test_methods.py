"""What all methods share, the methods of a few lines, and the bytes each one reads."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from helpers import CPU, Layer, noise, random_encoder, random_layer
from loki_attention.core.budget import Budget
from loki_attention.errors import ArgumentError
from loki_attention.kernels.rows import Rows
from loki_attention.methods import METHOD_NAMES, SPARSE_METHODS, Answer, Method, Step, method_class
from loki_attention.methods.double_sparsity import DoubleSparsity
from loki_attention.methods.exact_topk import ExactTopK
from loki_attention.methods.h2o import H2O
from loki_attention.methods.loki import Loki
from loki_attention.methods.paper_loki import PaperLoki
from loki_attention.methods.pca_attn import PcaAttention
from loki_attention.methods.quest import Quest
from loki_attention.methods.random_tokens import Random
from loki_attention.methods.snapkv import SnapKV
from loki_attention.methods.sparq import SparQ
from loki_attention.methods.streaming import Streaming
from method_steps import LENGTHS, SHAPE, attend, groups, make, per, slots_of, softmax, view_of


@per
def test_streaming_is_the_sinks_and_the_most_recent(per: str) -> None:
    layer = random_layer(SHAPE, LENGTHS, holes=True)
    answer = attend(make(Streaming, per=per), layer)
    sets = 8 if per == "query-head" else 2
    outputs = answer.output[:, :, 0].unflatten(1, (sets, -1)).flatten(0, 1)
    for (query, keys, values, slots), picked, output in zip(
        groups(layer, sets), slots_of(answer), outputs, strict=True
    ):
        k = min(48, len(slots))
        places = [*range(min(4, k)), *range(len(slots) - (k - 4), len(slots))]
        assert picked == slots[places].tolist()
        expected = (SHAPE.scale * query @ keys[places].mT).softmax(-1) @ values[places]
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("candidate", ["pca-pre", "pca-post"])
def test_pca_attention_is_softmax_of_reduced_scores(candidate: str, rank: int) -> None:
    layer, ours = random_layer(SHAPE, LENGTHS, holes=True), random_encoder(SHAPE, f"{rank}@32", candidate)
    answer = attend(make(PcaAttention, encoder=ours), layer)
    assert answer.indices is None
    outputs = answer.output[:, :, 0].unflatten(1, (2, -1)).flatten(0, 1)
    for i, ((query, keys, values, _), output) in enumerate(zip(groups(layer, 2), outputs, strict=True)):
        axes = ours.key_map[i % 2].numpy()
        expected = softmax(SHAPE.scale * (query.numpy() @ axes) @ (keys.numpy() @ axes).T) @ values.numpy()
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)


def all_methods() -> list[Any]:
    """One of each, with what it needs."""
    pca = random_encoder(SHAPE, "16@32", "pca-post")
    return [
        make(Loki, encoder=random_encoder(SHAPE, "16@4+32@2"), tail="linear"),
        make(ExactTopK, tail="mean"),
        make(Streaming),
        make(PaperLoki, encoder=pca),
        make(Random),
        make(SparQ),
        make(Quest),
        make(PcaAttention, encoder=pca),
    ]


@pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.name)
def test_batch_order_does_not_matter(method: Method) -> None:
    layer, order = random_layer(SHAPE, LENGTHS, holes=True), torch.tensor([2, 0, 1])
    plain, turned = attend(method, layer), attend(method, Layer(*(tensor[order] for tensor in layer)))
    torch.testing.assert_close(turned.output, plain.output[order], rtol=0, atol=1e-12)
    if plain.indices is not None and turned.indices is not None:
        assert torch.equal(turned.indices, plain.indices[order])


@pytest.mark.parametrize("method", all_methods()[:-1], ids=lambda method: method.name)
def test_a_budget_of_all_tokens_is_dense_attention(method: Method) -> None:
    layer = random_layer(SHAPE, LENGTHS)
    keys, values = (tensor.repeat_interleave(4, 1) for tensor in layer[1:3])
    expected = torch.nn.functional.scaled_dot_product_attention(
        layer.query, keys, values, attn_mask=layer.valid[:, None, None], scale=SHAPE.scale
    )
    full = dataclasses.replace(method, budget=Budget(tokens=300, sinks=4, recent=16))
    torch.testing.assert_close(attend(full, layer).output, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.name)
def test_many_rows_equal_each_row_alone(method: Method) -> None:
    layer, query = random_layer(SHAPE, (300, 250), holes=True), noise(2, 8, 3, 64, seed=4)
    rows = Rows.of(layer.valid, torch.tensor([[60, 192, 300], [40, 130, 250]]))
    view = view_of(layer, method)

    def part(start: int, stop: int) -> Answer:
        some, q = rows.chunk(start, stop), query[:, :, start:stop]
        return method.attend(Step(q, view, some, method.budgets(some), SHAPE.scale, method.encode(q, SHAPE.scale)))

    together = part(0, 3)
    for t in range(3):
        torch.testing.assert_close(together.output[:, :, t : t + 1], part(t, t + 1).output, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        # 1000 tokens, K = 125, rows of 128 bytes (D = 64 in 16 bits), G = 2; 16@4+32@2 is 16 bytes a token.
        (Loki, {"planes": "16@4+32@2"}, 1000 * 16 + 2 * 128 * 125),
        (Loki, {"planes": "16@4+32@2", "tail": "mean"}, 1000 * 16 + 2 * 128 * 125 + 4 * 64),
        (Loki, {"planes": "16@4+32@2", "tail": "linear"}, 1000 * 16 + 2 * 128 * 125 + 4 * (64 + 16 + 16 * 64)),
        (Loki, {"planes": "64@4", "per": "query-head"}, 1000 * 32 + 2 * 2 * 128 * 125),
        (ExactTopK, {}, 128 * (1000 + 125)),
        (ExactTopK, {"per": "query-head"}, 128 * (1000 + 2 * 125)),
        (ExactTopK, {"tail": "mean"}, 128 * (1000 + 125) + 4 * 64),
        (ExactTopK, {"tail": "linear", "planes": "8@4"}, 128 * (1000 + 125) + 4 * (64 + 8 + 8 * 64)),
        (Streaming, {}, 2 * 128 * 125),
        (PaperLoki, {"planes": "16@32"}, 1000 * 64 + 2 * 2 * 128 * 125),
        (PaperLoki, {"planes": "16@32", "tail": "mean"}, 1000 * 64 + 2 * 2 * 128 * 125 + 4 * 64),
        (PcaAttention, {"planes": "16@32"}, 1000 * (64 + 128)),
        (Random, {}, 2 * 128 * 125),
        (Random, {"tail": "mean"}, 2 * 128 * 125 + 4 * 64),
        (SnapKV, {}, 2 * 128 * 125),
        # A sum of attention for each of the K tokens; r = 16 of 64 components and v-bar; 63 pages of two bounds.
        (H2O, {}, 2 * 128 * 125 + 4 * 125),
        (H2O, {"per": "query-head"}, 2 * (2 * 128 * 125 + 4 * 125)),
        (SparQ, {}, 1000 * 32 + 4 * 64 + 2 * 128 * 125),
        (SparQ, {"tail": "mean"}, 1000 * 32 + 4 * 64 + 2 * 128 * 125),
        (SparQ, {"per": "query-head"}, 2 * (1000 * 32 + 2 * 128 * 125) + 4 * 64),
        (Quest, {}, 63 * 2 * 128 + 2 * 128 * 125),
        (DoubleSparsity, {"planes": "16@4"}, 1000 * 8 + 2 * 128 * 125),
    ],
)
def test_read_bytes(kind: type[Method], changes: dict[str, Any], expected: int) -> None:
    fields = {name: value for name, value in changes.items() if name != "planes"}
    if "planes" in changes:
        fields["encoder"] = random_encoder(SHAPE, changes["planes"])
    read = make(kind, **fields).read_bytes(torch.tensor([1000, 1000]), torch.tensor([125, 125]), 2, 128)
    assert read.tolist() == [expected, expected]


def test_sixteen_bit_cache_reads_a_sixteenth_beside_the_selection() -> None:
    """The default planes of D = 64 in a bf16 cache: 6.25 % of K and V."""
    method = make(Loki, encoder=random_encoder(SHAPE, "16@4+32@2"))
    none = torch.tensor([0])
    assert float(method.read_bytes(torch.tensor([1000]), none, 4, 128)) == 0.0625 * 1000 * 2 * 128


def test_names() -> None:
    assert (
        *("dense", "exact-topk", "loki", "streaming", "pca-attn", "paper-loki"),
        *("random", "h2o", "snapkv", "sparq", "quest", "double-sparsity"),
    ) == METHOD_NAMES
    assert method_class("dense") is None
    assert all(method_class(name) is kind and kind.name == name for name, kind in SPARSE_METHODS.items())


@pytest.mark.parametrize(
    ("near", "name"),
    [("h20", "h2o"), ("snap-kv", "snapkv"), ("double_sparsity", "double-sparsity"), ("spark", "sparq")],
)
def test_the_nearest_name_is_offered(near: str, name: str) -> None:
    with pytest.raises(ArgumentError, match=f"did you mean '{name}'"):
        method_class(near)


def test_what_is_simulated_says_so() -> None:
    simulated = {name for name, kind in SPARSE_METHODS.items() if kind.why_simulated("none")}
    assert simulated == {"h2o", "snapkv", "sparq", "quest"}
    exact_mass = {name for name, kind in SPARSE_METHODS.items() if "exact" in (kind.why_simulated("mean") or "")}
    with_mean = {name for name, kind in SPARSE_METHODS.items() if "mean" in kind.tails}
    assert exact_mass & with_mean == with_mean - {"exact-topk", "loki"}


@per
def test_a_baselines_mean_tail_has_the_exact_mass(per: str) -> None:
    layer = random_layer(SHAPE, LENGTHS, holes=True)
    answer = attend(make(Streaming, tail="mean", per=per), layer)
    sets = 8 if per == "query-head" else 2
    outputs = answer.output[:, :, 0].unflatten(1, (sets, -1)).flatten(0, 1)
    for part, picked, output in zip(groups(layer, sets), slots_of(answer), outputs, strict=True):
        query, keys, values, slots = (tensor.numpy() for tensor in part)
        weights = softmax(SHAPE.scale * query @ keys.T)
        chosen, covered = np.isin(slots, picked), 64 * max(0, len(slots) // 64 - 1)
        if not covered:
            weights = softmax(SHAPE.scale * query @ keys[chosen].T)
            expected = weights @ values[chosen]
        else:
            rest = weights[:, ~chosen].sum(1, keepdims=True)
            expected = weights[:, chosen] @ values[chosen] + rest * values[:covered].mean(0)
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["locki", "", None, 3])
def test_unknown_names_are_refused(name: object) -> None:
    with pytest.raises(ArgumentError, match=r"unknown method .* known: dense, exact-topk, loki, streaming"):
        method_class(name)


def test_what_each_method_takes() -> None:
    needs_basis = {name for name, kind in SPARSE_METHODS.items() if kind.needs_basis}
    assert needs_basis == {"loki", "pca-attn", "paper-loki", "double-sparsity"}
    linear = {name for name, kind in SPARSE_METHODS.items() if kind.tails == ("none", "mean", "linear")}
    assert linear == {"exact-topk", "loki"}
    assert SPARSE_METHODS["pca-attn"].tails == ("none",)
    assert all(
        kind.tails == ("none", "mean") for name, kind in SPARSE_METHODS.items() if name not in {*linear, "pca-attn"}
    )
    principal = {name for name, kind in SPARSE_METHODS.items() if kind.principal_components}
    assert principal == {"pca-attn", "paper-loki"}
    assert SPARSE_METHODS["paper-loki"].default_dense_layers == ()


def test_on_moves_the_encoder_to_the_models_precision() -> None:
    method = make(Loki, encoder=random_encoder(SHAPE, "16@4+32@2"))
    moved = method.on(CPU, torch.bfloat16)
    assert moved.encoder.mean.dtype == torch.float32
    assert dataclasses.replace(moved, encoder=None) == dataclasses.replace(method, encoder=None)
    plain = make(Streaming)
    assert plain.on(CPU, torch.bfloat16) is plain


def test_budgets_count_each_sequence_alone() -> None:
    layer = random_layer(SHAPE, LENGTHS)
    method = make(Streaming, budget=Budget(fraction=1 / 4, minimum=40, sinks=4, recent=16))
    assert method.budgets(layer.rows).tolist() == [[75], [53], [30]]
