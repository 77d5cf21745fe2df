"""Other papers' methods on models that add to the softmax, on the native kernels, and in a prompt that comes in chunks."""

import pytest
import torch
from transformers import DynamicCache

from loki_attention import attach
from models import BUDGET, random_ids, tiny_basis, tiny_model

PROMPT, LENGTH = 100, 104


@pytest.mark.parametrize(
    ("family", "method"), [("gemma2", "sparq"), ("gemma2", "quest"), ("gpt_oss", "h2o"), ("gpt_oss", "snapkv")]
)
@torch.inference_mode()
def test_soft_caps_and_learned_sinks(family: str, method: str) -> None:
    model, ids = tiny_model(family), random_ids(2, LENGTH)
    cache = DynamicCache(config=model.config)
    with attach(model, method=method, budget=BUDGET) as handle:
        model(ids[:, :PROMPT], past_key_values=cache)
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(PROMPT, LENGTH)]
        assert handle.report().sparse_steps == 2 * (LENGTH - PROMPT)
        with handle.continuation(PROMPT):
            whole = model(ids).logits[:, PROMPT:]
    torch.testing.assert_close(whole, torch.cat(steps, dim=1), rtol=0, atol=1e-9)


@torch.inference_mode()
def test_double_sparsity_runs_on_the_native_kernels() -> None:
    model, ids = tiny_model(dtype=torch.float32), random_ids(2, LENGTH)
    logits, traces = {}, {}
    for backend in ("native", "torch"):
        cache = DynamicCache()
        with attach(model, tiny_basis(), method="double-sparsity", budget=BUDGET, backend=backend) as handle:
            model(ids[:, :PROMPT], past_key_values=cache)
            with handle.trace() as traces[backend]:
                logits[backend] = model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache).logits
            assert handle.report().backend.name == backend
            assert handle.report().simulated is None
            assert handle.report().planes == "8@4"
    assert torch.equal(traces["native"][0][1], traces["torch"][0][1])
    torch.testing.assert_close(logits["native"], logits["torch"], rtol=0, atol=5e-3)


@torch.inference_mode()
def test_h2o_sees_a_prompt_that_generate_cuts_into_chunks() -> None:
    """The last chunk is one row, and yet of the prompt."""
    model, ids = tiny_model(), random_ids(1, 121)
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with attach(model, method="h2o", budget=BUDGET) as handle:
        whole = model.generate(ids, **settings)
        before = handle.report().sparse_steps
        chunks = model.generate(ids, prefill_chunk_size=60, **settings)
        assert handle.report().sparse_steps == 2 * before > 0
    torch.testing.assert_close(torch.stack(chunks.logits), torch.stack(whole.logits), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["random", "h2o", "snapkv", "sparq", "quest", "double-sparsity"])
@torch.inference_mode()
def test_a_full_budget_is_dense(method: str) -> None:
    """A batch of which the budget covers the shorter sequence alone: it is attended whole, the same as dense."""
    model, ids = tiny_model(), random_ids(2, LENGTH)
    ids[1, : LENGTH - 20] = 0
    mask = (ids != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    last = {"attention_mask": mask, "position_ids": positions[:, -1:]}
    first = {"attention_mask": mask[:, :-1], "position_ids": positions[:, :-1]}
    logits = []
    for budget in (BUDGET, None):
        cache = DynamicCache()
        kind = "dense" if budget is None else method
        with attach(model, tiny_basis(), method=kind, budget=budget) as handle:
            model(ids[:, :-1], past_key_values=cache, **first)
            logits.append(model(ids[:, -1:], past_key_values=cache, **last).logits)
            assert budget is None or handle.report().sparse_steps == 2
    torch.testing.assert_close(logits[0][1], logits[1][1], rtol=0, atol=1e-9)
    assert (logits[0][0] - logits[1][0]).abs().max() > 1e-3
