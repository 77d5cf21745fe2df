"""Every family of the table: calibrated, dense at full budget, and exactly the method at a small one."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from loki_attention import Budget, LokiError, LokiWarning, attach
from loki_attention.integrations.huggingface.families import FAMILIES
from loki_attention.integrations.huggingface.observe import observe
from masked_model import masked_by
from models import FAMILY_SETTINGS, VOCABULARY, random_ids, tiny_basis, tiny_model

PROMPT, LENGTH, NEW = 150, 180, 24


def test_every_family_of_the_table_is_tested() -> None:
    assert set(FAMILIES) == set(FAMILY_SETTINGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_equals_dense(family: str) -> None:
    model, ids = tiny_model(family), random_ids(2, 60, seed=1)
    settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    dense = model.generate(ids, **settings)
    assert min(len(set(row[60:].tolist())) for row in dense.sequences) >= 8, "the model repeats itself"
    with (
        pytest.warns(LokiWarning, match="budget covers all tokens"),
        attach(model, tiny_basis(family), budget=Budget(tokens=500)),
    ):
        ours = model.generate(ids, **settings)
    assert torch.equal(ours.sequences, dense.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(dense.logits), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tail", ["none", "linear"])
def test_small_budget_is_the_method(family: str, tail: str) -> None:
    """Continuation equals steps; without a tail both equal the model under a mask of the traced slots."""
    model, ids = tiny_model(family), random_ids(2, LENGTH)
    with torch.inference_mode():
        with attach(model, tiny_basis(family), tail=tail) as handle:
            cache = DynamicCache()
            model(ids[:, :PROMPT], past_key_values=cache)
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(PROMPT, LENGTH)]
            with handle.continuation(PROMPT), handle.trace() as trace:
                whole = model(ids).logits
            assert handle.report().sparse_layers == (1, 2)
        torch.testing.assert_close(whole[:, PROMPT:], torch.cat(steps, dim=1), rtol=0, atol=1e-8)
        if tail == "none":
            redirection = masked_by(model, trace[0])
            try:
                masked = model(ids).logits
            finally:
                redirection.undo()
            torch.testing.assert_close(whole, masked, rtol=0, atol=1e-8)


def test_layers_without_rope_see_the_same_keys_before_and_after() -> None:
    seen = {}
    model = tiny_model("smollm3")
    with torch.inference_mode(), observe(model, lambda one: seen.update({one.layer: one})):
        model(random_ids(1, 20), use_cache=False)
    assert torch.equal(seen[1].pre_keys, seen[1].keys)
    assert not torch.equal(seen[2].pre_keys, seen[2].keys)


def test_a_sliding_window_throughout_is_refused() -> None:
    config = AutoConfig.for_model(
        "mistral",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
    )
    with pytest.raises(LokiError, match="this mistral model has no full-attention layer"):
        attach(AutoModelForCausalLM.from_config(config), method="streaming", budget=Budget(tokens=64))
