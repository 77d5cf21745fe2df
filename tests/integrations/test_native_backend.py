"""Models on the native kernels: decode steps equal the torch backend's, and the same exactness checks hold."""

import copy
import sys

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from generate_operations import OPERATIONS
from loki_attention import LokiError, attach
from loki_attention.kernels.native import NativeEncoder, to_tiles
from models import BUDGET, random_ids, tiny_basis, tiny_model
from replay import replayed

SPARSE_LAYERS = (1, 2)
attach_module = sys.modules["loki_attention.integrations.huggingface.attach"]


def steps(model: PreTrainedModel, ids: Tensor, prompt: int = 150) -> tuple[Tensor, DynamicCache]:
    cache, rows = DynamicCache(config=model.config), []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
        rows.append(model(ids[:, start:stop], past_key_values=cache).logits[:, -1])
    return torch.stack(rows), cache


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_generating_equals_the_specification(family: str, operation: str) -> None:
    """float32: the reference step in ``core`` replays the same ``generate``, with the same selections."""
    model, basis = tiny_model(family, dtype=torch.float32), tiny_basis(family)
    for tail in ("none", "linear"):
        with attach(model, basis, budget=BUDGET, tail=tail, backend="native") as handle, handle.trace() as trace:
            ours = OPERATIONS[operation](model, DynamicCache(config=model.config))
            assert handle.report().sparse_steps > 0
        encoders = {layer: basis.encoder(layer) for layer in SPARSE_LAYERS}
        with replayed(model, trace, encoders, BUDGET, tail):
            theirs = OPERATIONS[operation](model, DynamicCache(config=model.config))
        assert torch.equal(ours.sequences, theirs.sequences)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=5e-3)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_twins_and_estimates_equal_the_torch_backends(dtype: torch.dtype) -> None:
    model, basis, ids = tiny_model(dtype=dtype), tiny_basis(), random_ids(2, 170)
    reports = {}
    for backend in ("native", "torch"):
        with attach(model, basis, budget=BUDGET, tail="linear", backend=backend) as handle:
            _, cache = steps(model, ids)
            reports[backend] = handle.report()
        if backend == "native":
            for layer in SPARSE_LAYERS:
                store = cache.layers[layer].store
                encoder = basis.encoder(layer)
                assert isinstance(store.twins.encoder, NativeEncoder)
                fresh = to_tiles(encoder.encode_keys(store.keys), encoder.planes)
                ours = store.twins.packed[:, :, :160]
                assert (ours == fresh[:, :, :160]).float().mean() > 0.999
    for ours, theirs in zip(reports["native"].layers, reports["torch"].layers, strict=True):
        assert (ours.sparse_steps, ours.tokens_read) == (theirs.sparse_steps, theirs.tokens_read)
        if ours.sparse:
            assert ours.mean_mass == pytest.approx(theirs.mean_mass, abs=0.02)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_left_out_are_never_read(dtype: torch.dtype) -> None:
    model, ids = tiny_model(dtype=dtype), random_ids(2, 170)
    with attach(model, tiny_basis(), budget=BUDGET, tail="linear", backend="native") as handle:
        _, cache = steps(model, ids)
        poisoned, token = copy.deepcopy(cache), torch.full((2, 1), 9)
        with handle.trace() as trace:
            clean = model(token, past_key_values=cache).logits
        for layer, chosen in trace[0].items():
            store = poisoned.layers[layer].store
            read = torch.zeros(2, 2, store.length + 1, dtype=torch.bool).scatter_(2, chosen[:, :, 0], True)
            unread = ~read[..., : store.length]
            assert bool(unread.any())
            store.keys[unread] = float("nan")
            store.values[unread] = float("nan")
        again = model(token, past_key_values=poisoned).logits
    assert set(trace[0]) == set(SPARSE_LAYERS)
    assert torch.equal(again, clean)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_dense_steps_run_on_the_dense_kernel(family: str) -> None:
    """Left-padded and plain batches: within float32 rounding of the model's own attention."""
    model = tiny_model(family, dtype=torch.float32)
    plain = OPERATIONS["left padding"](model, DynamicCache(config=model.config))
    with attach(model, method="dense", backend="native") as handle:
        ours = OPERATIONS["left padding"](model, DynamicCache(config=model.config))
        assert handle.report().backend.name == "native"
    assert torch.equal(ours.sequences, plain.sequences)
    assert 0 < float((ours.logits - plain.logits).abs().max()) < 2e-3, "the model's own attention ran, or a wrong one"


@torch.inference_mode()
def test_rows_of_one_forward_leave_the_tiles_alone() -> None:
    """Continuation rows run on torch; the decode steps before and after keep what they encoded."""
    model, ids = tiny_model(dtype=torch.float32), random_ids(1, 180)
    with attach(model, tiny_basis(), budget=BUDGET, backend="native") as handle:
        expected, _ = steps(model, ids)
        _, cache = steps(model, ids[:, :160])
        twins = cache.layers[1].store.twins
        with handle.continuation(0):
            ours = model(ids[:, 160:175], past_key_values=cache).logits
        assert cache.layers[1].store.twins is twins
        last = model(ids[:, 175:176], past_key_values=cache).logits
    torch.testing.assert_close(ours[0], expected[11:26, 0], rtol=0, atol=2e-2)
    torch.testing.assert_close(last[0, 0], expected[26, 0], rtol=0, atol=2e-2)


def test_break_even_keeps_shorter_sequences_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny_model(dtype=torch.float32), []

    def measured(shape: object) -> int:
        asked.append(shape)
        return 160

    monkeypatch.setattr(attach_module, "break_even", measured)
    with attach(model, tiny_basis(), tail="linear", dense_below="break-even") as handle:
        with torch.inference_mode():
            steps(model, random_ids(1, 165))
        report = handle.report()
    (shape,) = asked
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.planes, shape.tail) == (4, 2, 16, "8@4", "linear")
    assert report.layers[1].dense_steps == {"prefill": 1, "below dense_below": 9}
    assert report.layers[1].sparse_steps == 6
    assert "dense below 160 tokens" in str(report)
    with pytest.raises(
        LokiError, match=r"measured on the native or Triton kernels, and this attachment runs on torch \(asked"
    ):
        attach(model, tiny_basis(), dense_below="break-even", backend="torch")
    with pytest.raises(LokiError, match="dense_below must be a whole number"):
        attach(model, tiny_basis(), dense_below="never")


def test_the_choice_says_why() -> None:
    small = tiny_model(dtype=torch.float32)
    with attach(small, tiny_basis(), method="loki", tail="none") as handle:
        assert handle.report().backend.name == "native"
    reasons = {
        "the model is in float64": (tiny_model(), {}),
        "method 'exact-topk' has no kernels": (small, {"method": "exact-topk"}),
        "per='query-head' has no kernels": (small, {"per": "query-head"}),
        r"planes '8@32' have no kernels": (small, {"planes": "8@32"}),
    }
    for reason, (model, settings) in reasons.items():
        with attach(model, tiny_basis(), **settings) as handle:
            chosen = handle.report().backend
            assert (chosen.name, chosen.reason) == ("torch", f"no native kernels here: {reason}")
        with pytest.raises(LokiError, match=r"backend 'native' cannot run here: .*use 'auto' or 'torch'"):
            attach(model, tiny_basis(), backend="native", **settings)
