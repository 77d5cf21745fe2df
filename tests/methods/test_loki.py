"""``loki`` against the reference step, ``paper-loki`` against Algorithm 1."""

import pytest
import torch

from helpers import Layer, chosen_slots, random_encoder, random_layer, reference_steps
from loki_attention.methods.loki import Loki
from loki_attention.methods.paper_loki import PaperLoki
from method_steps import BUDGET, LENGTHS, SHAPE, attend, cached_view_of, groups, make, per, slots_of, view_of


@per
@pytest.mark.parametrize("tail", ["none", "mean", "linear"])
@pytest.mark.parametrize("planes", ["16@4+32@2", "16@32"])
def test_loki_equals_the_reference(planes: str, tail: str, per: str) -> None:
    layer, ours = random_layer(SHAPE, LENGTHS, holes=True), random_encoder(SHAPE, planes)
    method = make(Loki, encoder=ours, tail=tail, per=per)
    for view in (view_of(layer, method), cached_view_of(layer, method)):
        answer = attend(method, layer, view)
        assert answer.indices is not None
        for b, expected in enumerate(reference_steps(layer, ours, BUDGET, SHAPE.scale, tail, per)):
            assert chosen_slots(answer.indices[b]) == expected.indices.tolist()
            torch.testing.assert_close(answer.output[b, :, 0], expected.output, rtol=0, atol=1e-9)


def test_loki_on_a_sequence_without_covered_blocks_has_no_tail() -> None:
    layer, ours = random_layer(SHAPE, (127, 60)), random_encoder(SHAPE, "16@4+32@2")
    with_tail, without = (attend(make(Loki, encoder=ours, tail=tail), layer).output for tail in ("linear", "none"))
    assert torch.equal(with_tail, without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loki_answers_in_the_models_dtype(dtype: torch.dtype) -> None:
    layer = random_layer(SHAPE, LENGTHS, dtype=dtype)
    wide = Layer(*(tensor.double() for tensor in layer[:3]), layer.valid)
    method = make(Loki, encoder=random_encoder(SHAPE, "16@4+32@2", dtype=dtype), tail="linear")
    exact = make(Loki, encoder=random_encoder(SHAPE, "16@4+32@2"), tail="linear")
    ours, theirs = attend(method, layer).output, attend(exact, wide).output
    assert ours.dtype == dtype
    assert float((ours.double() - theirs).norm() / theirs.norm()) < 4 * torch.finfo(dtype).eps + 1e-2


@pytest.mark.parametrize("candidate", ["pca-pre", "pca-post"])
def test_paper_loki_is_algorithm_1(candidate: str) -> None:
    """Top-k of the first R dims per query head, nothing forced, exact attention over it."""
    layer, ours = random_layer(SHAPE, LENGTHS), random_encoder(SHAPE, "16@32", candidate)
    method = make(PaperLoki, encoder=ours)
    assert (method.per, method.forced) == ("query-head", (0, 0))
    answer = attend(method, layer)
    outputs = answer.output[:, :, 0].flatten(0, 1)
    for i, ((query, keys, values, slots), picked, output) in enumerate(
        zip(groups(layer, 8), slots_of(answer), outputs, strict=True)
    ):
        axes = ours.key_map[(i % 8) // 4]
        scores = (query @ axes @ (keys @ axes).mT)[0]
        chosen = scores.topk(BUDGET.of(len(slots))).indices.sort().values
        assert picked == slots[chosen].tolist()
        expected = (SHAPE.scale * query @ keys[chosen].mT).softmax(-1) @ values[chosen]
        torch.testing.assert_close(output, expected[0], rtol=0, atol=1e-12)
