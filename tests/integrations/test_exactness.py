"""What an attached model computes is exactly what the method says: against masks, numpy, and step-by-step decode."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cache_checks import check_twins_and_sums
from loki_attention import Budget, attach
from loki_attention.integrations.huggingface.families import attention_modules
from loki_attention.integrations.huggingface.observe import observe
from loki_attention.methods import METHOD_NAMES
from masked_model import masked_by
from method_settings import BASELINES, SETTINGS, attached
from models import BUDGET, LAYOUTS, random_ids, tiny_basis, tiny_model

PROMPT, LENGTH = 150, 190
LAYOUT_CASES = [("llama", "gqa"), ("qwen3", "mqa"), ("llama", "mha")]
CASES = [(name, LENGTH, *case) for name in SETTINGS for case in LAYOUT_CASES]
CASES += [(name, PROMPT + 12, "llama", "gqa") for name in BASELINES]


@torch.inference_mode()
def stepwise_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, prompt: int = PROMPT) -> Tensor:
    """Logits of the rows from ``prompt`` on: dense prefill, then one token at a time on the same cache."""
    cache, mask = DynamicCache(), torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rows = []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
        step = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        rows.append(model(ids[:, start:stop], past_key_values=cache, **step).logits)
    return torch.cat(rows[1:], dim=1)


@pytest.mark.parametrize(("name", "length", "family", "layout"), CASES)
def test_continuation_equals_prefill_and_steps(name: str, length: int, family: str, layout: str) -> None:
    model, ids = tiny_model(family, layout), random_ids(2, length)
    with attached(model, name, family, layout) as handle:
        steps = stepwise_logits(model, ids)
        with torch.inference_mode(), handle.continuation(PROMPT):
            whole = model(ids, use_cache=False).logits[:, PROMPT:]
        with torch.inference_mode(), handle.continuation(PROMPT):
            cache = DynamicCache()
            model(ids[:, :PROMPT], past_key_values=cache)
            cached = model(ids[:, PROMPT:], past_key_values=cache).logits
        assert handle.report().sparse_steps > 0
    with torch.inference_mode():
        dense = model(ids).logits[:, PROMPT:]
    torch.testing.assert_close(whole, steps, rtol=0, atol=1e-9)
    torch.testing.assert_close(cached, steps, rtol=0, atol=1e-9)
    assert (whole - dense).abs().max() > 1e-3, "nothing was sparse"


@pytest.mark.parametrize("name", ["loki-linear", "loki-mean", "exact-topk-linear"])
def test_continuation_equals_steps_where_only_a_sample_is_scored_first(name: str) -> None:
    """From 1024 tokens on, L and the tail's mass come from a part of the tiles that changes with every token."""
    model, ids, prompt = tiny_model(), random_ids(1, 1560), 1530
    with torch.inference_mode(), attached(model, name) as handle:
        steps = stepwise_logits(model, ids, prompt=prompt)
        with handle.continuation(prompt):
            whole = model(ids).logits[:, prompt:]
    torch.testing.assert_close(whole, steps, rtol=0, atol=1e-9)


def test_every_method_is_held_to_the_contract() -> None:
    named = {settings.get("method", "loki") for settings in (*SETTINGS.values(), *BASELINES.values())}
    assert named == set(METHOD_NAMES) - {"dense"}


PADDED = [(name, LENGTH) for name in ("loki-linear", "exact-topk-linear", "streaming", "paper-loki")]
PADDED += [(name, PROMPT + 8) for name in ("random-mean", "h2o", "snapkv", "quest")]


@pytest.mark.parametrize(("name", "length"), PADDED)
def test_left_padded_batch_equals_single_sequences(name: str, length: int) -> None:
    model = tiny_model()
    long, short = random_ids(1, length, seed=3), random_ids(1, length - 13, seed=4)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 13, dtype=torch.long), short], dim=1)])
    mask = (batch != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode(), attached(model, name) as handle:
        padded_steps = stepwise_logits(model, batch, mask)
        with handle.continuation(torch.tensor([PROMPT, PROMPT - 13])):
            together = model(batch, attention_mask=mask, position_ids=positions).logits[:, PROMPT:]
        with handle.continuation(PROMPT):
            alone = model(long).logits[:, PROMPT:]
        with handle.continuation(PROMPT - 13):
            other = model(short).logits[:, PROMPT - 13 :]
    torch.testing.assert_close(together, padded_steps, rtol=0, atol=1e-9)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-9)
    torch.testing.assert_close(together[1:], other, rtol=0, atol=1e-9)


MASKED = ("loki-none", "exact-topk", "exact-topk-query-head", "streaming", "paper-loki")
MASKED_CASES = [(name, layout) for name in MASKED for layout in LAYOUTS]
MASKED_CASES += [(name, "gqa") for name in ("h2o", "snapkv", "quest", "double-sparsity")]


@pytest.mark.parametrize(("name", "layout"), MASKED_CASES)
def test_logits_equal_the_model_under_a_mask_of_traced_slots(name: str, layout: str) -> None:
    model, ids = tiny_model(layout=layout), random_ids(2, LENGTH)
    with torch.inference_mode():
        with attached(model, name, layout=layout) as handle, handle.continuation(PROMPT), handle.trace() as trace:
            ours = model(ids).logits
        redirection = masked_by(model, trace[0])
        try:
            masked = model(ids).logits
        finally:
            redirection.undo()
    assert len(trace) == 1
    assert set(trace[0]) == set(range(3)) - ({0} if name != "paper-loki" else set())
    torch.testing.assert_close(ours, masked, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_within_twice_torchs_own_error(dtype: torch.dtype) -> None:
    """Given the same indices: the masked model in float64 is the truth, in ``dtype`` torch's own error."""
    ids = random_ids(1, LENGTH)
    model = copy.deepcopy(tiny_model()).to(dtype)
    with torch.inference_mode():
        with attached(model, "loki-none") as handle, handle.continuation(PROMPT), handle.trace() as trace:
            ours = model(ids).logits.double()
        logits = {}
        for masked_model in (model, copy.deepcopy(model).double()):
            redirection = masked_by(masked_model, trace[0])
            try:
                logits[masked_model.dtype] = masked_model(ids).logits.double()
            finally:
                redirection.undo()
    exact, torchs = logits[torch.float64], logits[dtype]
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + 1e-6


def numpy_tail_step(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, chosen: np.ndarray, enc: dict, scale: float
) -> np.ndarray:
    """One query head over one KV head with the linear tail, as docs/concepts.md has it; n < 1024, all sampled."""
    n, covered = len(k), 64 * max(0, len(k) // 64 - 1)
    e = (k - enc["mean"]) @ enc["key_map"]
    levels = np.clip(np.round(e / enc["steps"]), -7, 7)
    folded = (q @ enc["query_map"]) * enc["steps"]
    codes = np.round(folded / (np.abs(folded).max() / 127))
    approx = scale * (np.abs(folded).max() / 127) * (levels @ codes)
    rest = np.setdiff1d(np.arange(n), chosen)
    t = np.log(np.exp(approx[rest] + scale * q @ enc["mean"] + scale**2 * enc["kappa"]).sum())
    lead, deviation = enc["tail_rank"], scale * np.sqrt(((q @ enc["query_map"] * enc["deviations"]) ** 2).sum())
    e, v_bar = e[:covered, :lead], v[:covered].mean(0)
    slope = (e.T @ v[:covered]) / covered - np.outer(e.mean(0), v_bar)
    u = v_bar + scale * min(1, 1 / deviation) * (q @ enc["query_map"])[:lead] @ slope
    weights = np.exp(np.append(scale * k[chosen] @ q, t))
    return (weights[:-1] @ v[chosen] + weights[-1] * u) / weights.sum()


def test_tail_equals_the_formula_in_numpy() -> None:
    model, ids, layer = tiny_model(), random_ids(1, LENGTH), 1
    seen = {}
    with torch.inference_mode(), observe(model, lambda o: seen.update({o.layer: o})):
        model(ids, use_cache=False)
    tensors, basis = seen[layer], tiny_basis()
    encoder = basis.encoder(layer).to(torch.device("cpu"), torch.float64)
    outputs = {}
    module = attention_modules(model)[layer]
    hook = module.o_proj.register_forward_pre_hook(lambda _, args: outputs.update(sparse=args[0]))
    with torch.inference_mode(), attach(model, basis, tail="linear", layers={0: "dense", 2: "dense"}) as handle:
        with handle.continuation(LENGTH - 1), handle.trace() as trace:
            model(ids)
    hook.remove()
    output = outputs["sparse"][0, -1].view(4, 16).numpy()
    for head in range(4):
        kv = head // 2
        chosen = trace[0][layer][0, kv, -1].numpy()
        names = ("mean", "query_map", "key_map", "steps", "kappa", "deviations")
        enc = {name: getattr(encoder, name)[kv].numpy() for name in names} | {"tail_rank": encoder.tail_rank}
        expected = numpy_tail_step(
            tensors.query[0, head, -1].numpy(),
            tensors.keys[0, kv].numpy(),
            tensors.values[0, kv].numpy(),
            chosen,
            enc,
            tensors.scale,
        )
        np.testing.assert_allclose(output[head], expected, rtol=0, atol=1e-9)


NEVER_READ = ("loki-none", "loki-linear", "streaming", "paper-loki", "h2o", "snapkv", "double-sparsity")


@pytest.mark.parametrize("name", NEVER_READ)
def test_rows_left_out_are_never_read(name: str) -> None:
    """NaN in every K/V row that a step left out, in a copy of the cache as it was, changes nothing."""
    model, ids = tiny_model(), random_ids(1, LENGTH)
    cache = DynamicCache()
    with torch.inference_mode(), attached(model, name) as handle:
        model(ids[:, :-2], past_key_values=cache)
        model(ids[:, -2:-1], past_key_values=cache)
        poisoned = copy.deepcopy(cache)
        with handle.trace() as trace:
            clean = model(ids[:, -1:], past_key_values=cache).logits
        for layer, chosen in trace[0].items():
            store = poisoned.layers[layer].store
            left_out = torch.ones(2, store.length + 1, dtype=torch.bool)
            per_kv = chosen[0, :, 0].reshape(2, -1)
            left_out.scatter_(1, per_kv, False)
            for buffer in (store.keys, store.values):
                buffer[0][left_out[:, : store.length]] = float("nan")
        again = model(ids[:, -1:], past_key_values=poisoned).logits
    assert len(trace[0]) >= 2
    assert bool(left_out.any())
    torch.testing.assert_close(again, clean, rtol=0, atol=0)


def numpy_algorithm_1(q: np.ndarray, keys: np.ndarray, p: np.ndarray, rank: int, k: int) -> np.ndarray:
    """Loki, algorithm 1, lines 3 to 6, for one query head: rotate, score in ``rank`` dims, take the top k."""
    q_hat, k_hat = q @ p, keys @ p
    scores = q_hat[:rank] @ k_hat[:, :rank].T
    return np.sort(np.argsort(-scores)[:k])


@pytest.mark.parametrize("candidate", ["pca-pre", "pca-post"])
def test_paper_loki_selects_by_algorithm_1(candidate: str) -> None:
    model, ids, layer = tiny_model(), random_ids(1, LENGTH), 2
    basis = tiny_basis(candidate=candidate)
    seen = {}
    with torch.inference_mode(), observe(model, lambda o: seen.update({o.layer: o})):
        model(ids, use_cache=False)
    others = {0: "dense", 1: "dense"}
    with torch.inference_mode(), attach(model, basis, method="paper-loki", planes="6@32", layers=others) as handle:
        with handle.continuation(PROMPT), handle.trace() as trace:
            model(ids)
    for row in (PROMPT, PROMPT + 17, LENGTH - 1):
        for head in range(4):
            p = basis.layers[layer].key_map[head // 2].double().numpy()
            query = seen[layer].query[0, head, row].numpy()
            expected = numpy_algorithm_1(query, seen[layer].keys[0, head // 2, : row + 1].numpy(), p, 6, 24)
            np.testing.assert_array_equal(trace[0][layer][0, head, row].numpy(), expected)


def turns(model: PreTrainedModel, cache: DynamicCache) -> None:
    ids = random_ids(1, 160, seed=5)
    first = model.generate(ids, max_new_tokens=20, past_key_values=cache, do_sample=False)
    more = torch.cat([first, random_ids(1, 90, seed=6)], dim=1)
    model.generate(more, max_new_tokens=40, past_key_values=cache, do_sample=False)


def beams(model: PreTrainedModel, cache: DynamicCache) -> None:
    model.generate(random_ids(2, 160, seed=7), max_new_tokens=50, num_beams=3, past_key_values=cache, do_sample=False)


def padded_batch(model: PreTrainedModel, cache: DynamicCache) -> None:
    ids = random_ids(2, 160, seed=8)
    ids[1, :37] = 0
    model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=50, past_key_values=cache, do_sample=False)


def cropped(model: PreTrainedModel, cache: DynamicCache) -> None:
    ids = random_ids(1, 260, seed=9)
    with torch.inference_mode():
        model(ids[:, :-1], past_key_values=cache)
        model(ids[:, -1:], past_key_values=cache)
        cache.crop(-75)
        model(random_ids(1, 3, seed=1), past_key_values=cache)
        model(ids[:, -1:], past_key_values=cache)


@pytest.mark.parametrize("use", [turns, beams, padded_batch, cropped])
def test_twins_and_sums_follow_the_cache(use: Callable[[PreTrainedModel, DynamicCache], None]) -> None:
    model, cache = tiny_model(), DynamicCache()
    with attach(model, tiny_basis(), budget=BUDGET, tail="linear") as handle:
        use(model, cache)
        assert handle.report().sparse_steps > 0
    check_twins_and_sums(cache, {1, 2})


def test_full_budget_through_the_sparse_step_is_dense() -> None:
    """A budget one token short of everything reads all but one token: no tail worth speaking of."""
    model, ids = tiny_model(), random_ids(1, LENGTH)
    budget = Budget(tokens=LENGTH - 1, sinks=0, recent=1)
    with torch.inference_mode():
        dense = model(ids).logits[:, -1]
        with attach(model, budget=budget, method="exact-topk") as handle, handle.continuation(PROMPT):
            ours = model(ids).logits[:, -1]
            assert handle.report().sparse_steps == 2
    assert (ours - dense).abs().max() < 0.2 * dense.std()
