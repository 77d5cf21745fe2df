"""Every family of the table: what is seen of it while calibrating, and rows of one forward as steps."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from loki_attention import Budget, LokiError, attach
from loki_attention.integrations.huggingface.families import FAMILIES
from loki_attention.integrations.huggingface.observe import observe
from models import FAMILY_SETTINGS, VOCABULARY, random_ids, tiny_basis, tiny_model

PROMPT, LENGTH = 150, 170


def test_every_family_of_the_table_is_tested() -> None:
    assert set(FAMILIES) == set(FAMILY_SETTINGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_continuation_equals_steps(family: str) -> None:
    """The matrix holds steps to the specification; rows of one forward are the same steps."""
    model, ids = tiny_model(family), random_ids(2, LENGTH)
    with torch.inference_mode(), attach(model, tiny_basis(family), tail="linear") as handle:
        cache = DynamicCache(config=model.config)
        model(ids[:, :PROMPT], past_key_values=cache)
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(PROMPT, LENGTH)]
        with handle.continuation(PROMPT):
            whole = model(ids).logits[:, PROMPT:]
        assert handle.report().sparse_steps == 2 * (LENGTH - PROMPT) + 2
    eager = model.config._attn_implementation == "eager"
    torch.testing.assert_close(whole, torch.cat(steps, dim=1), rtol=0, atol=1e-5 if eager else 1e-8)


def test_layers_without_rope_see_the_same_keys_before_and_after() -> None:
    seen = {}
    model = tiny_model("smollm3")
    with torch.inference_mode(), observe(model, lambda one: seen.update({one.layer: one})):
        model(random_ids(1, 20), use_cache=False)
    assert torch.equal(seen[1].pre_keys, seen[1].keys)
    assert not torch.equal(seen[2].pre_keys, seen[2].keys)


@pytest.mark.parametrize("family", ["stablelm", "gpt_neox", "phi3"])
def test_partial_rotary_changes_the_rotary_dims_alone(family: str) -> None:
    """Some families hand the RoPE function whole heads, others the rotary slice: both give the whole key before it."""
    seen = {}
    model = tiny_model(family)
    with torch.inference_mode(), observe(model, lambda one: seen.update({one.layer: one})):
        model(random_ids(1, 20), use_cache=False)
    one = seen[1]
    assert one.pre_keys.shape == one.keys.shape
    assert torch.equal(one.pre_keys[..., 8:], one.keys[..., 8:])
    assert torch.equal(one.pre_keys[:, :, 0], one.keys[:, :, 0]), "position 0 is not turned"
    assert not torch.equal(one.pre_keys[:, :, 1:, :8], one.keys[:, :, 1:, :8])


def test_a_layer_without_rope_after_one_that_is_not_ours() -> None:
    """cohere2: sliding layers turn their keys, full-attention ones do not."""
    seen = {}
    model = tiny_model("cohere2")
    with torch.inference_mode(), observe(model, lambda one: seen.update({one.layer: one})):
        model(random_ids(1, 20), use_cache=False)
    assert set(seen) == {1, 2}
    assert all(torch.equal(one.pre_keys, one.keys) for one in seen.values())


def test_keys_before_rope_are_those_of_the_projection() -> None:
    model, seen, projected = tiny_model("llama"), {}, {}
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda _, __, out: projected.update(k=out))
    with torch.inference_mode(), observe(model, lambda one: seen.update({one.layer: one})):
        model(random_ids(1, 20), use_cache=False)
    hook.remove()
    assert torch.equal(seen[1].pre_keys[0].transpose(0, 1).flatten(1), projected["k"][0])


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
