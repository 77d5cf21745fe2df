"""What an attached model refuses to do over a static cache, and what it says."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from loki_attention import LokiError, attach
from models import random_ids, tiny_basis, tiny_model
from static_caches import BUDGET, padded_ids, skip_without, static_cache, whole_mask

skip_without("native")


def model_of(family: str = "llama") -> PreTrainedModel:
    return tiny_model(family, dtype=torch.float32)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "methods": ({"method": "exact-topk", "backend": "auto"}, "attachment runs on torch .*; pass a DynamicCache"),
    "backend": ({"backend": "torch"}, "run on the native or Triton kernels, .*; pass a DynamicCache"),
    "monitor": ({"monitor_every": 4}, "monitor_every has nothing to go by; pass a DynamicCache"),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.inference_mode()
def test_what_needs_the_host_is_refused(name: str) -> None:
    model, (settings, message) = model_of(), REFUSED[name]
    with attach(model, tiny_basis(), **{"budget": BUDGET, "backend": "native"} | settings):
        with pytest.raises(LokiError, match=message):
            model(random_ids(1, 100), past_key_values=static_cache(model))
        with pytest.raises(LokiError, match=message):
            config = GenerationConfig(max_new_tokens=2, cache_implementation="static")
            model.generate(random_ids(1, 100), generation_config=config)


@pytest.mark.filterwarnings("ignore:every step stayed dense")
@torch.inference_mode()
def test_traces_and_rules_are_refused_between_steps_too() -> None:
    model, ids, cache = model_of(), random_ids(1, 100), static_cache(model_of())
    with attach(model, tiny_basis(), budget=BUDGET, backend="native") as handle:
        model(ids[:, :90], past_key_values=cache)
        with handle.trace(), pytest.raises(LokiError, match=r"trace\(\) has nothing to go by"):
            model(ids[:, 90:91], past_key_values=cache)
        with handle.continuation(10), pytest.raises(LokiError, match=r"continuation\(\) or paper_rows\(\) has nothing"):
            model(ids[:, 90:], past_key_values=cache)
        assert int(cache.get_seq_length()) == 90
        model(ids[:, 90:91], past_key_values=cache)


@pytest.mark.filterwarnings("ignore:every step stayed dense:loki_attention.LokiWarning")
@torch.inference_mode()
def test_masks_with_holes_are_refused() -> None:
    """In a prompt before anything goes on; in a step, whose mask only the device sees, when it is counted."""
    model, (ids, mask) = model_of(), padded_ids(100, 0)
    holes = mask.clone()
    holes[1, 40] = 0
    with attach(model, tiny_basis(), budget=BUDGET, backend="native") as handle:
        for wrong in (holes, mask.flip(1) * holes):
            with pytest.raises(
                LokiError, match=r"hides tokens behind a sequence's first one .* or pass a DynamicCache"
            ):
                model(ids, attention_mask=wrong, past_key_values=static_cache(model))
        right = torch.ones_like(mask)
        right[0, -5:] = 0
        with pytest.raises(LokiError, match="padding on the right"):
            model(ids, attention_mask=right, past_key_values=static_cache(model))
        cache = static_cache(model)
        model(ids[:, :98], past_key_values=cache)
        model(ids[:, 98:99], attention_mask=mask[:, :99], past_key_values=cache)
        assert handle.report().sparse_steps > 0
        model(ids[:, 99:], attention_mask=whole_mask(holes), past_key_values=cache)
        with pytest.raises(LokiError, match="the attention mask of 1 decode steps over a static cache did not show"):
            handle.report()
        assert handle.report().sparse_steps > 0


@torch.inference_mode()
def test_other_caches_are_refused() -> None:
    model = model_of()
    with attach(model, tiny_basis(), method="dense"):
        offloaded = static_cache(model)
        offloaded.offloading = True
        with pytest.raises(LokiError, match="an offloaded StaticCache cannot carry low-rank keys"):
            model(random_ids(1, 10), past_key_values=offloaded)
        mixed = static_cache(model_of("gemma3_text"))
        with pytest.raises(LokiError, match="layer 0 has full attention, the cache keeps it as StaticSliding"):
            model(random_ids(1, 10), past_key_values=mixed)
