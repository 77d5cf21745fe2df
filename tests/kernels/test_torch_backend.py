"""The torch backend's step, held to ``core``: scores, L, codes, sets, log-mass and output; and its symmetries."""

import pytest
import torch
from torch import Tensor

from backend_steps import CASES, BackendStep, Case, backend_step, cases, integer_cases, tail_values
from helpers import Layer, Shape, chosen_slots, random_encoder, reference_steps
from loki_attention.core import attention, selection, tail
from loki_attention.core.budget import Budget
from loki_attention.core.encoder import Encoder
from loki_attention.kernels import torch_backend as backend


@cases
def test_float64_step_equals_the_reference(case: Case) -> None:
    layer, ours = case.layer(), case.encoder()
    step = backend_step(case, layer, ours)
    assert step.output.dtype == torch.float64
    expected_steps = reference_steps(layer, ours, case.budget, case.shape.scale, case.tail, case.per, case.softmax)
    for b, expected in enumerate(expected_steps):
        assert chosen_slots(step.indices[b]) == expected.indices.tolist()
        torch.testing.assert_close(step.log_mass[b, :, 0], expected.log_mass, rtol=0, atol=1e-6)
        torch.testing.assert_close(step.output[b, :, 0], expected.output, rtol=0, atol=1e-6)


@cases
def test_indices_are_ascending_exactly_k_and_padded(case: Case) -> None:
    layer = case.layer()
    indices = backend_step(case, layer, case.encoder()).indices
    assert indices.shape[1:3] == (case.sets, 1)
    for b, length in enumerate(layer.valid.sum(-1).tolist()):
        k = case.budget.of(length)
        rows = indices[b, :, 0]
        assert (rows[:, k:] == -1).all()
        assert (rows[:, :k].diff(dim=-1) > 0).all()
        assert layer.valid[b][rows[:, :k]].all()
        slots = layer.valid[b].nonzero().flatten()
        forced = slots[selection.forced(length, case.budget.sinks, case.budget.recent)].tolist()
        assert all(set(forced) <= set(row) for row in chosen_slots(rows))


@integer_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_the_same_codes_are_exact(case: Case, dtype: torch.dtype) -> None:
    """Sums of integers and halves times one step a row: equal to the last bit, whatever the order of the sum."""
    layer, ours = case.layer(dtype), case.encoder(dtype)
    step = backend_step(case, layer, ours)
    codes = step.encoded.codes.long().unflatten(1, (case.shape.kv_heads, -1))[:, :, :, 0]
    halves = (2 * ours.planes.unpack(step.packed, torch.float64)).long()
    products = torch.einsum("bkgr,bksr->bkgs", codes, halves).to(dtype) / 2
    expected = products * step.encoded.step.unflatten(1, (case.shape.kv_heads, -1))
    assert step.scores.dtype == dtype
    assert torch.equal(step.scores.flatten(1, 2)[:, :, 0], expected.flatten(1, 2))


def per_set(tensor: Tensor, case: Case, b: int) -> Tensor:
    """(H, ...) of sequence ``b``, by set and head in the set."""
    return tensor[b].unflatten(0, (case.sets, -1))


@cases
def test_float32_step_agrees_given_the_same_codes(case: Case) -> None:
    """L to 1e-5 and t to 1e-3; sets but for tokens within 1/1000 of the threshold; output given the same indices."""
    layer, ours = case.layer(torch.float32), case.encoder(torch.float32)
    step, scale = backend_step(case, layer, ours), case.shape.scale
    for b, valid in enumerate(layer.valid):
        slots = valid.nonzero().flatten()
        count, in_sample = len(slots), selection.sampled(slots)
        is_forced = selection.forced(count, case.budget.sinks, case.budget.recent)
        for i in range(case.sets):
            scores = step.scores[b, i, :, 0, slots].double()
            mass = selection.log_mass(scores, is_forced, in_sample)
            if step.mass is not None:
                torch.testing.assert_close(step.mass[b, i, :, 0].double(), mass, rtol=0, atol=1e-5)
            deviation = per_set(step.encoded.deviation, case, b)[i, :, 0].double()
            combined = (selection.combine(scores, mass) if len(scores) > 1 else scores[0]) / deviation.max()
            assert_same_up_to_the_threshold(combined, is_forced, slots, step.indices[b, i, 0], case.budget.of(count))
            selected = torch.isin(slots, step.indices[b, i, 0])
            offset = per_set(step.encoded.offset, case, b)[i, :, 0].double()
            expected = tail.tail_log_mass(scores, offset, selected, in_sample, case.softmax.cap)
            torch.testing.assert_close(per_set(step.log_mass, case, b)[i, :, 0].double(), expected, rtol=0, atol=1e-3)
        assert step.output[b].isfinite().all()
    assert_output_given_indices(case, layer, ours, step, scale)


def assert_same_up_to_the_threshold(
    combined: Tensor, is_forced: Tensor, slots: Tensor, indices: Tensor, k: int
) -> None:
    """Sets may differ in tokens whose combined score, in deviations, lies within 1/1000 of the K-th."""
    expected = selection.top_k(combined, is_forced, k)
    assert int((indices >= 0).sum()) == k
    ours = torch.searchsorted(slots, indices[:k])
    threshold = combined[expected][~is_forced[expected]]
    differing = set(ours.tolist()) ^ set(expected.tolist())
    assert all(abs(float(combined[i] - threshold.min())) < 1e-3 for i in differing)


def assert_output_given_indices(case: Case, layer: Layer, ours: Encoder, step: BackendStep, scale: float) -> None:
    """The float32 output against ``core.attend`` in float64 on the same indices, log-mass and value."""
    heads_per_set = case.shape.kv_heads * case.shape.group // case.sets
    wide = Layer(*(tensor.double() for tensor in layer[:3]), layer.valid)
    answer = None
    if case.tail != "none":
        sums = backend.sums_of_blocks(backend.leading_dims(wide.keys, case.encoder()), wide.values, layer.rows)
        answer = tail_values(case, sums, case.encoder().encode_query(wide.query, scale), scale)
    for b in range(len(layer.valid)):
        for i, picked in enumerate(chosen_slots(step.indices[b])):
            heads, kv = slice(i * heads_per_set, (i + 1) * heads_per_set), i * case.shape.kv_heads // case.sets
            covered = tail.covered_tokens(layer.valid[b].sum()) > 0
            extra = (step.log_mass[b, heads, 0].double(), answer[b, heads, 0]) if answer is not None and covered else ()
            tensors = (wide.query[b, heads, 0], wide.keys[b, kv, picked], wide.values[b, kv, picked])
            expected = attention.attend(*tensors, scale, *extra, softmax=case.softmax.of_heads(heads))
            torch.testing.assert_close(step.output[b, heads, 0].double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", [CASES[8], CASES[7], CASES[3]], ids=str)
def test_permuting_sequences_permutes_the_answer(case: Case) -> None:
    layer, ours = case.layer(), case.encoder()
    order = torch.tensor([2, 0, 1])
    plain = backend_step(case, layer, ours)
    turned = backend_step(case, Layer(*(tensor[order] for tensor in layer)), ours)
    assert torch.equal(turned.indices, plain.indices[order])
    torch.testing.assert_close(turned.output, plain.output[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(turned.log_mass, plain.log_mass[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", [1, 16, 41])
@pytest.mark.parametrize("case", [CASES[3], CASES[10], CASES[15]], ids=str)
def test_left_padding_shifts_indices_and_changes_nothing_else(case: Case, shift: int) -> None:
    """Below 1024 tokens, where all are sampled."""
    layer, ours = case.layer(), case.encoder()
    padding = torch.full_like(layer.keys[:, :, :shift], 7.0)
    padded = Layer(
        layer.query,
        torch.cat([padding, layer.keys], 2),
        torch.cat([padding, layer.values], 2),
        torch.cat([torch.zeros(3, shift, dtype=torch.bool), layer.valid], 1),
    )
    plain, shifted = backend_step(case, layer, ours), backend_step(case, padded, ours)
    assert torch.equal(shifted.indices, torch.where(plain.indices >= 0, plain.indices + shift, -1))
    torch.testing.assert_close(shifted.output, plain.output, rtol=0, atol=1e-12)
    torch.testing.assert_close(shifted.log_mass, plain.log_mass, rtol=0, atol=1e-12)


@pytest.mark.parametrize("candidate", ["pca-pre", "pca-post", "balanced"])
def test_at_full_rank_in_floats_the_set_is_that_of_exact_top_k(candidate: str) -> None:
    """Per query head, up to score gaps of 1e-6: planes are float32."""
    shape = Shape(2, 4, 64)
    case = Case("64@32", 700, shape, "none", Budget(tokens=64, sinks=0, recent=0), "query-head")
    layer, ours = case.layer(), random_encoder(shape, "64@32", candidate)
    indices = backend_step(case, layer, ours).indices
    exact = backend.score_exact(layer.query, layer.keys, shape.scale, 8)[:, :, 0, 0]
    exact = exact.masked_fill(~layer.valid[:, None], -torch.inf)
    expected = exact.topk(64, dim=-1)
    for b in range(2):
        for h in range(8):
            differing = set(indices[b, h, 0].tolist()) ^ set(expected.indices[b, h].tolist())
            threshold = expected.values[b, h, -1]
            assert all(abs(float(exact[b, h, i] - threshold)) < 1e-6 for i in differing)
