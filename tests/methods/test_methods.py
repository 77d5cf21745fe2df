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
from loki_attention.methods.exact_topk import ExactTopK
from loki_attention.methods.loki import Loki
from loki_attention.methods.paper_loki import PaperLoki
from loki_attention.methods.pca_attn import PcaAttention
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
        make(PcaAttention, encoder=pca),
    ]


@pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.name)
def test_batch_order_does_not_matter(method: Method) -> None:
    layer, order = random_layer(SHAPE, LENGTHS, holes=True), torch.tensor([2, 0, 1])
    plain, turned = attend(method, layer), attend(method, Layer(*(tensor[order] for tensor in layer)))
    torch.testing.assert_close(turned.output, plain.output[order], rtol=0, atol=1e-12)
    if plain.indices is not None and turned.indices is not None:
        assert torch.equal(turned.indices, plain.indices[order])


@pytest.mark.parametrize("method", all_methods()[:4], ids=lambda method: method.name)
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
        (PcaAttention, {"planes": "16@32"}, 1000 * (64 + 128)),
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
    assert METHOD_NAMES == ("dense", "exact-topk", "loki", "streaming", "pca-attn", "paper-loki")
    assert method_class("dense") is None
    assert all(method_class(name) is kind and kind.name == name for name, kind in SPARSE_METHODS.items())


@pytest.mark.parametrize("name", ["locki", "", None, 3])
def test_unknown_names_are_refused(name: object) -> None:
    with pytest.raises(ArgumentError, match=r"unknown method .* known: dense, exact-topk, loki, streaming"):
        method_class(name)


def test_what_each_method_takes() -> None:
    assert {name: kind.needs_basis for name, kind in SPARSE_METHODS.items()} == {
        "exact-topk": False,
        "loki": True,
        "streaming": False,
        "pca-attn": True,
        "paper-loki": True,
    }
    with_tails = {name for name, kind in SPARSE_METHODS.items() if kind.tails == ("none", "mean", "linear")}
    assert with_tails == {"exact-topk", "loki"}
    assert all(kind.tails == ("none",) for name, kind in SPARSE_METHODS.items() if name not in with_tails)
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
