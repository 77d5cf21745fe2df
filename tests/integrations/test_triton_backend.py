"""Models on the Triton kernels: decode steps equal the torch backend's, and reports say what ran."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from generate_operations import OPERATIONS
from loki_attention import LokiError, attach
from loki_attention.core.budget import Budget
from loki_attention.kernels.triton.encoder import TritonEncoder
from models import random_ids, tiny_basis, tiny_model
from static_caches import static_cache
from triton_cases import DEVICE
from triton_rounding import assert_same_logits, assert_same_slots, assert_same_tokens

BUDGET = Budget(fraction=1 / 8, minimum=24, sinks=2, recent=8)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("tail", "batch"), [("linear", 1), *(pytest.param(tail, 2, marks=pytest.mark.slow) for tail in ("linear", "none"))]
)
def test_decode_steps_equal_the_torch_backends(tail: str, batch: int) -> None:
    """float32: the same slots, and logits that agree to rounding; twins and sums kept up by the cache."""
    model, basis, ids = tiny_model(dtype=torch.float32).to(DEVICE), tiny_basis(), random_ids(batch, 152).to(DEVICE)
    logits, traces = {}, {}
    for backend in ("triton", "torch"):
        cache = DynamicCache(config=model.config)
        with attach(model, basis, budget=BUDGET, tail=tail, backend=backend) as handle, handle.trace() as trace:
            steps = [(0, 150), (150, 151), (151, 152)]
            logits[backend] = [model(ids[:, a:b], past_key_values=cache).logits[:, -1] for a, b in steps]
            report = handle.report()
        traces[backend] = trace
        assert report.backend.name == backend and report.sparse_steps > 0
        if backend == "triton":
            assert isinstance(cache.layers[1].store.twins.encoder, TritonEncoder)
    same = assert_same_slots(*(traces[backend] for backend in ("triton", "torch")))
    for i, (ours, theirs) in enumerate(zip(logits["triton"], logits["torch"], strict=True)):
        assert_same_logits(ours, theirs, steady=same or i == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation", ["greedy", "left padding"] if "left padding" in OPERATIONS else list(OPERATIONS)[:2]
)
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_generating_equals_the_torch_backend(family: str, operation: str) -> None:
    model, basis = tiny_model(family, dtype=torch.float32).to(DEVICE), tiny_basis(family)
    found = {}
    for backend in ("triton", "torch"):
        with attach(model, basis, budget=BUDGET, tail="linear", backend=backend):
            found[backend] = OPERATIONS[operation](model, DynamicCache(config=model.config))
    assert_same_tokens(found["triton"], found["torch"])


@torch.inference_mode()
def test_a_placed_model_answers_as_a_plain_one(tmp_path: Path) -> None:
    plain, basis, ids = tiny_model(dtype=torch.float32).to(DEVICE), tiny_basis(), random_ids(1, 121).to(DEVICE)
    plain.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map={"": DEVICE}).eval()
    logits = []
    for model in (plain, placed):
        cache = DynamicCache(config=model.config)
        with attach(model, basis, budget=BUDGET, tail="linear", backend="triton") as handle:
            model(ids[:, :120], past_key_values=cache)
            logits.append(model(ids[:, 120:], past_key_values=cache).logits)
            assert handle.report().sparse_steps > 0
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_static_cache_goes_by_the_break_even_of_captured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[attach.__module__], "break_even", lambda shape: 122 if shape.captured else 124)
    model, basis, ids = tiny_model(dtype=torch.float32).to(DEVICE), tiny_basis(), random_ids(1, 124).to(DEVICE)
    for cache, expected, below in ((static_cache(model), 3, 122), (DynamicCache(config=model.config), 1, 124)):
        with attach(model, basis, budget=BUDGET, dense_below="break-even", backend="triton") as handle:
            for a, b in ((0, 120), (120, 121), (121, 122), (122, 123), (123, 124)):
                model(ids[:, a:b], past_key_values=cache)
            report = handle.report()
        assert report.layers[1].sparse_steps == expected and f"dense below {below} tokens" in str(report)


def test_what_has_no_kernels_is_refused() -> None:
    model, basis = tiny_model(dtype=torch.float32).to(DEVICE), tiny_basis()
    for arguments in ({"per": "query-head"}, {"planes": "8@32"}, {"method": "exact-topk"}):
        with pytest.raises(LokiError, match=r"backend 'triton' cannot run here: .* no kernels"):
            attach(model, basis, budget=BUDGET, backend="triton", **arguments)
