"""What evaluators stand on, for every method of the registry: continuation is decode, and damage shows."""

import pytest
import torch
from transformers import DynamicCache

from loki_attention import Budget, LokiWarning
from loki_attention.data import haystack_text
from loki_attention.evaluation.continuation import Loss, compare_window
from loki_attention.evaluation.retrieval import Retrieval
from loki_attention.evaluation.text import text_windows
from loki_attention.evaluation.variant import Variant
from loki_attention.integrations.huggingface.dense_prompt import DensePrompt
from loki_attention.methods import METHOD_NAMES, method_class
from models import BUDGET, random_ids, tiny_basis, tiny_model

PROMPT, LENGTH = 100, 112
SPARSE = [name for name in METHOD_NAMES if name != "dense"]


def variant_of(name: str, budget: Budget = BUDGET) -> Variant:
    kind = method_class(name)
    assert kind is not None
    return Variant(name=name, method=name, budget=budget, basis=tiny_basis() if kind.needs_basis else None)


@pytest.mark.parametrize("name", SPARSE)
def test_evaluated_rows_equal_dense_prefill_and_steps(name: str) -> None:
    model, ids, variant = tiny_model(), random_ids(1, LENGTH), variant_of(name)
    with torch.inference_mode():
        whole, read, dense_read = DensePrompt(model, ids[:, :PROMPT]).logits(ids[:, PROMPT:], variant)
        with variant.attach(model) as attached:
            cache = DynamicCache()
            model(ids[:, :PROMPT], past_key_values=cache)
            rows = [model(ids[:, t : t + 1], past_key_values=cache).logits[0] for t in range(PROMPT, LENGTH)]
            report = attached.report()
    torch.testing.assert_close(whole, torch.cat(rows), rtol=0, atol=1e-9)
    assert report.sparse_steps > 0
    assert sum(layer.bytes_read for layer in report.layers) == pytest.approx(read)
    assert sum(layer.bytes_dense for layer in report.layers) == pytest.approx(dense_read)


def test_methods_share_a_prompt_and_leave_it_as_it_was() -> None:
    model, ids = tiny_model(), random_ids(1, LENGTH)
    variants = {name: variant_of(name) for name in SPARSE}
    with torch.inference_mode():
        prompt = DensePrompt(model, ids[:, :PROMPT])
        before = prompt.logits(ids[:, PROMPT:], None)[0]
        first = {name: prompt.logits(ids[:, PROMPT:], variant)[0] for name, variant in variants.items()}
        again = {name: prompt.logits(ids[:, PROMPT:], variants[name])[0] for name in reversed(SPARSE)}
        assert all(torch.equal(again[name], first[name]) for name in SPARSE)
        assert torch.equal(prompt.logits(ids[:, PROMPT:], None)[0], before)


@pytest.mark.parametrize("name", [name for name in SPARSE if name != "pca-attn"])
def test_a_budget_for_everything_loses_nothing(name: str) -> None:
    with pytest.warns(LokiWarning, match="budget covers all tokens"):
        loss = compare_window(tiny_model(), random_ids(1, LENGTH), [variant_of(name, Budget(tokens=1000))])[name]
    assert (loss.kl, loss.agreement) == (pytest.approx(0, abs=1e-12), 1)
    assert loss.log_loss == loss.dense_log_loss


NEEDS_RANDOM = pytest.mark.skipif("random" not in METHOD_NAMES, reason="this registry has no method 'random'")
SIXTEENTH = Budget(fraction=1 / 16, minimum=24, sinks=4, recent=16)
PROSE = haystack_text().read_text(encoding="utf-8")


def broken_and_bound() -> list[Variant]:
    """Random tokens and the best ones, at the same sixteenth."""
    return [Variant(name=name, method=name, budget=SIXTEENTH) for name in ("random", "exact-topk")]


@NEEDS_RANDOM
def test_a_broken_selection_shows_in_kl_and_perplexity(reference_model, reference_tokenizer) -> None:
    windows = text_windows(reference_tokenizer, PROSE, length=1024, count=2)
    total = {"random": Loss(), "exact-topk": Loss()}
    for window in windows:
        for name, loss in compare_window(reference_model, window, broken_and_bound()).items():
            total[name] += loss
    assert total["random"].kl > 4 * total["exact-topk"].kl
    assert total["random"].perplexity_change > 2 * abs(total["exact-topk"].perplexity_change) > 0


@NEEDS_RANDOM
def test_a_broken_selection_shows_in_accuracy(reference_model, reference_tokenizer) -> None:
    """Where dense attention is right and prompts are long enough for a sixteenth to leave something out."""
    task = Retrieval(reference_model, reference_tokenizer, PROSE, family="multi-key", length=640, questions=6, depths=3)
    dense = Variant(name="dense", method="dense", budget=None)
    right = [task.measure(index, [dense, *broken_and_bound()]) for index in range(6)]
    counts = {name: sum(one[name] for one in right) for name in right[0]}
    assert counts["dense"] >= 5
    assert counts["exact-topk"] >= 5
    assert counts["random"] <= 2
