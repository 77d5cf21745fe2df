"""Whole decode steps of an attached model on the Triton kernels: captured, compiled into CUDA graphs, run by ``generate``.

What needs no graph is run under Triton's interpreter too.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from loki_attention import attach
from loki_attention.integrations.huggingface.loading import shorten
from models import tiny_basis, tiny_model
from static_caches import BUDGET, compiling, padded_ids, ran, static_cache, whole_mask
from triton_cases import DEVICE
from triton_rounding import assert_same_logits, assert_same_tokens

PROMPT, STEPS, PADDING = 150, 120, 20
on_a_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
SETTINGS: dict[str, Any] = {"budget": BUDGET, "tail": "linear", "backend": "triton"}
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def _compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with compiling(monkeypatch):
        yield


def model_on_device(family: str = "llama") -> PreTrainedModel:
    return tiny_model(family, dtype=torch.float32).to(DEVICE)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert_same_logits(ours, theirs)
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["linear", "none"])
def test_steps_are_those_of_a_cache_that_grows(tail: str) -> None:
    """Both on the same kernels, over a length at which a block joins the tail's sums."""
    model = model_on_device()
    settings = {"padding": PADDING, "prompt": 190, "steps": 3, "tail": tail, "backend": "triton"}
    static, growing = (
        ran(model, static_cache(model), **settings),
        ran(model, DynamicCache(config=model.config), **settings),
    )
    assert_same(static.logits, growing.logits)
    for mine, other in zip(static.report.layers, growing.report.layers, strict=True):
        assert (mine.sparse_steps, mine.tokens_read) == (other.sparse_steps, other.tokens_read)
    assert static.report.sparse_steps == 2 * 3


def eager_logits(model: PreTrainedModel) -> Tensor:
    """The logits of every step, (steps, B, V)."""
    return ran(model, static_cache(model), prompt=PROMPT, steps=STEPS, padding=PADDING, backend="triton").logits[1:]


def filled(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> StaticCache:
    cache = static_cache(model)
    model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], past_key_values=cache)
    return cache


@on_a_gpu
@torch.inference_mode()
def test_a_captured_step_of_a_model_is_replayed_as_its_cache_fills() -> None:
    """One graph over 120 steps, in which blocks join the tail's sums; it counts what it does, and allocates nothing."""
    model, (ids, mask) = model_on_device(), padded_ids(PROMPT + STEPS, PADDING, device="cuda")
    expected = eager_logits(model)
    token, seen = ids[:, :1].clone(), whole_mask(mask[:, : PROMPT + 1]).clone()
    with attach(model, tiny_basis(), **SETTINGS) as handle:
        cache = filled(model, ids, mask)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                model(token, attention_mask=seen, past_key_values=cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, attention_mask=seen, past_key_values=cache).logits
        for attempt in range(2):
            shorten(cache, PROMPT)
            before, found = handle.report().sparse_steps if attempt else 0, []
            for i in range(PROMPT, PROMPT + STEPS):
                token.copy_(ids[:, i : i + 1])
                seen.copy_(whole_mask(mask[:, : i + 1]))
                allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
                graph.replay()
                assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
                found.append(logits[:, -1].cpu())
            assert_same(torch.stack(found), expected)
        report = handle.report()
        assert report.sparse_steps - before == 2 * STEPS
        assert report.memory.used == PROMPT + STEPS


@on_a_gpu
@torch.inference_mode()
def test_a_compiled_step_of_a_model_with_reduced_overhead() -> None:
    model, (ids, mask) = model_on_device(), padded_ids(PROMPT + STEPS, PADDING, device="cuda")
    expected, found = eager_logits(model), []
    counters.clear()
    run = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with attach(model, tiny_basis(), **SETTINGS) as handle:
        cache = filled(model, ids, mask)
        for i in range(PROMPT, PROMPT + STEPS):
            torch.compiler.cudagraph_mark_step_begin()
            stance = "fail_on_recompile" if i > PROMPT else "default"
            with torch.compiler.set_stance(stance):
                seen = whole_mask(mask[:, : i + 1])
                found.append(run(ids[:, i : i + 1], attention_mask=seen, past_key_values=cache).logits[:, -1].cpu())
        assert handle.report().sparse_steps == 2 * STEPS
    assert_same(torch.stack(found), expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["inductor"]["cudagraph_skips"]


@on_a_gpu
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (2, PADDING)])
def test_generate_with_a_static_cache(family: str, batch: int, padding: int) -> None:
    """``generate`` compiles by itself here; a second call compiles nothing."""
    model, (ids, mask) = model_on_device(family), padded_ids(PROMPT, padding, batch, device="cuda")
    settings = {**GREEDY, "attention_mask": mask, "max_new_tokens": 80}
    with attach(model, tiny_basis(family), **SETTINGS) as handle:
        expected = model.generate(ids, **settings)
        counters.clear()
        for _ in range(2):
            assert_same_tokens(model.generate(ids, cache_implementation="static", **settings), expected)
        assert handle.report().sparse_steps == 3 * 79 * 2
    assert counters["stats"]["unique_graphs"] <= (2 if family == "gemma2" else 1)
    assert not counters["inductor"]["cudagraph_skips"]


@on_a_gpu
def test_a_placed_model_generates_with_a_static_cache(tmp_path: Any) -> None:
    """As one of accelerate's ``device_map``, whose layers all find their lengths on their own device."""
    plain = model_on_device()
    plain.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map={"": 0}).eval()
    ids, mask = padded_ids(PROMPT, PADDING, device="cuda")
    settings = {**GREEDY, "attention_mask": mask, "max_new_tokens": 20}
    found = []
    for model in (plain, placed):
        with attach(model, tiny_basis(), **SETTINGS):
            found.append(model.generate(ids, cache_implementation="static", **settings))
    assert_same_tokens(*found)
