"""The loss of sparse rows against dense, and the sharing of one dense prompt."""

import math

import pytest
import torch

from loki_attention import Budget, LokiWarning
from loki_attention.evaluation.continuation import compare_window, loss_of
from loki_attention.evaluation.kept_mass import kept_mass
from loki_attention.evaluation.variant import Variant
from loki_attention.integrations.huggingface.dense_prompt import DensePrompt
from loki_attention.integrations.huggingface.observe import observe
from models import BUDGET, random_ids, tiny_basis, tiny_model

LOKI = Variant(name="loki", method="loki", basis=tiny_basis(), budget=BUDGET)
STREAMING = Variant(name="streaming", method="streaming", budget=BUDGET)


def test_loss_of_equals_torchs_own() -> None:
    logits, dense = torch.randn(700, 11), torch.randn(700, 11)
    targets = torch.randint(11, (700,))
    loss = loss_of(logits, dense, targets)
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert loss.kl == pytest.approx(float(expected), rel=1e-5)
    assert loss.perplexity == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets).exp()), rel=1e-5)
    assert loss.dense_perplexity == pytest.approx(
        math.exp(float(torch.nn.functional.cross_entropy(dense, targets))), rel=1e-5
    )
    assert loss.agreed == int((logits.argmax(-1) == dense.argmax(-1)).sum())
    assert (loss + loss).kl == pytest.approx(loss.kl)
    assert loss.perplexity_change == pytest.approx(loss.perplexity / loss.dense_perplexity - 1)


def test_variants_share_a_prompt_and_do_not_disturb_each_other() -> None:
    model, window = tiny_model(), random_ids(1, 180)
    together = compare_window(model, window, [LOKI, STREAMING])
    again = compare_window(model, window, [STREAMING, LOKI])
    assert together == again
    assert together["loki"].tokens == 180 - 90 - 1
    assert together["loki"].kl > 0
    assert 0 < together["loki"].read < together["loki"].dense_read
    with torch.inference_mode(), STREAMING.attach(model) as handle, handle.continuation(90):
        logits = model(window).logits[0, 90:-1]
    with torch.inference_mode():
        dense = model(window).logits[0, 90:-1]
    alone = loss_of(logits, dense, window[0, 91:])
    assert together["streaming"].kl == pytest.approx(alone.kl, rel=1e-6)


def test_a_budget_for_everything_loses_nothing() -> None:
    whole = Variant(name="whole", method="streaming", budget=Budget(tokens=1000))
    with pytest.warns(LokiWarning, match="budget covers all tokens"):
        loss = compare_window(tiny_model(), random_ids(1, 120), [whole])["whole"]
    assert loss.kl == pytest.approx(0, abs=1e-12)
    assert loss.agreement == 1


def test_the_cache_is_left_as_it_was() -> None:
    model, ids = tiny_model(), random_ids(1, 130)
    with torch.inference_mode():
        prompt = DensePrompt(model, ids[:, :100])
        before = prompt.cache.layers[1].keys.clone()
        prompt.logits(ids[:, 100:], LOKI)
        assert prompt.cache.get_seq_length() == 100
        assert torch.equal(prompt.cache.layers[1].keys, before)


def test_kept_mass_is_that_of_the_selected_slots() -> None:
    """One layer, by hand: softmax over exact scores, summed over the slots that the attached model traced."""
    model, basis, window = tiny_model(), tiny_basis(), random_ids(1, 120)
    encoders = {"mine": {i: basis.encoder(i) for i in basis.layers}}
    mass = kept_mass(model, [window], encoders, BUDGET)
    seen = {}
    with torch.inference_mode(), observe(model, lambda o: seen.update({o.layer: o})):
        model(window, use_cache=False)
    layer = seen[1]
    with torch.inference_mode():
        with LOKI.attach(model) as handle, handle.continuation(60), handle.trace() as trace:
            model(window)
    expected = torch.zeros(2, dtype=torch.float64)
    for row in range(60, 120):
        for head in range(4):
            scores = layer.scale * layer.keys[0, head // 2, : row + 1] @ layer.query[0, head, row]
            chosen = trace[0][1][0, head // 2, row]
            expected[head // 2] += scores.softmax(-1)[chosen[chosen >= 0]].sum() / 2 / 60
    torch.testing.assert_close(mass[1]["mine"], expected)
    assert (mass[1]["exact-topk"] <= 1 + 1e-12).all()


def test_streaming_and_exact_name_their_settings() -> None:
    assert LOKI.config["planes"] == "8@4"
    assert STREAMING.config["candidate"] is None
    assert STREAMING.config["tokens"] == BUDGET.tokens
