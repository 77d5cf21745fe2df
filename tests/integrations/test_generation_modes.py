"""Ways of generating and of handling caches beside the matrix: right, or refused with a reason."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, QuantizedCache

from cache_checks import check_twins_and_sums
from loki_attention import Budget, LokiError, LokiWarning, attach
from models import BUDGET, random_ids, tiny_basis, tiny_model
from static_caches import compiling

SPARSE_LAYERS = {1, 2}


def filled_cache(model: PreTrainedModel, rows: slice = slice(0, 2)) -> DynamicCache:
    """A cache after a prompt and two sparse steps, 180 tokens of a batch of two; the model is attached."""
    cache, ids = DynamicCache(config=model.config), random_ids(2, 180, seed=3)[rows]
    for part in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
        model(part, past_key_values=cache)
    return cache


OPERATIONS: dict[str, tuple[Callable[[DynamicCache], object], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "crop": (lambda cache: cache.crop(-70), [0, 1]),
    "nothing": (lambda cache: None, [0, 1]),
}


@pytest.mark.parametrize("name", OPERATIONS)
@torch.inference_mode()
def test_a_step_after_an_operation_is_that_of_its_sequences(name: str) -> None:
    """Twins and sums follow, and each sequence goes on as it would alone in a cache of its own."""
    model, (operate, sources) = tiny_model(), OPERATIONS[name]
    token = torch.full((len(sources), 1), 9)
    with attach(model, tiny_basis(), tail="linear") as handle:
        cache = filled_cache(model)
        operate(cache)
        before = handle.report().sparse_steps
        ours = model(token, past_key_values=cache).logits
        assert handle.report().sparse_steps == before + 2
        check_twins_and_sums(cache, SPARSE_LAYERS)
        for row, source in enumerate(sources):
            alone = filled_cache(model, slice(source, source + 1))
            if name == "crop":
                operate(alone)
            expected = model(token[:1], past_key_values=alone).logits
            torch.testing.assert_close(ours[row : row + 1], expected, rtol=0, atol=1e-9)


@torch.inference_mode()
def test_a_reset_cache_starts_afresh() -> None:
    model, ids = tiny_model(), random_ids(1, 190, seed=4)
    with attach(model, tiny_basis()):
        cache = filled_cache(model)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = [model(part, past_key_values=cache).logits for part in (ids[:, :-1], ids[:, -1:])]
        fresh = DynamicCache(config=model.config)
        expected = [model(part, past_key_values=fresh).logits for part in (ids[:, :-1], ids[:, -1:])]
    assert torch.equal(again[1], expected[1])
    check_twins_and_sums(cache, SPARSE_LAYERS)


@torch.inference_mode()
def test_a_deep_copy_goes_its_own_way() -> None:
    model = tiny_model()
    with attach(model, tiny_basis()):
        cache = filled_cache(model)
        copied = copy.deepcopy(cache)
        for token in range(70, 76):
            model(torch.full((2, 1), token), past_key_values=copied)
        assert (cache.get_seq_length(), copied.get_seq_length()) == (180, 186)
        check_twins_and_sums(cache, SPARSE_LAYERS)
        check_twins_and_sums(copied, SPARSE_LAYERS)
        expected = filled_cache(model)
        for one in (cache, expected):
            model(torch.full((2, 1), 9), past_key_values=one)
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)


def test_the_last_chunk_of_a_prompt_is_no_decode_step() -> None:
    """151 tokens in chunks of 50 end in a chunk of one, which stays dense as the prompt does in one go."""
    model, ids = tiny_model(), random_ids(1, 151)
    with attach(model, tiny_basis()) as handle:
        whole = model.generate(ids, max_new_tokens=6, do_sample=False)
        chunked = model.generate(ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=50)
        assert dict(handle.report().layers[1].dense_steps) == {"prefill": 1 + 4}
        assert handle.report().layers[1].sparse_steps == 2 * 5
    assert torch.equal(whole, chunked)


@pytest.mark.parametrize(
    "settings", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model}, {"assistant_early_exit": 2}]
)
def test_assisted_decoding_equals_dense_at_full_budget(settings: dict[str, object]) -> None:
    model, ids = tiny_model(), random_ids(1, 50).repeat(1, 3)
    if "assistant_model" in settings:
        settings = {"assistant_model": tiny_model(layers=2)}
    dense = model.generate(ids, max_new_tokens=16, do_sample=False, **settings)
    with pytest.warns(LokiWarning, match="dense"), attach(model, tiny_basis(), budget=Budget(tokens=400)):
        assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False, **settings), dense)


def test_drafts_of_an_assistant_are_verified_densely_on_a_sound_cache() -> None:
    """At a small budget single rows are sparse, verified drafts dense; rejected ones leave twins and sums right."""
    model, draft, cache = tiny_model(), tiny_model(layers=2), DynamicCache()
    with attach(model, tiny_basis()) as handle:
        model.generate(
            random_ids(1, 180, seed=5), max_new_tokens=24, do_sample=False, assistant_model=draft, past_key_values=cache
        )
        with torch.inference_mode():
            model(torch.full((1, 1), 9), past_key_values=cache)
        steps = handle.report().layers[1]
        assert steps.dense_steps["prefill"] > 4
        assert steps.sparse_steps >= 1
    check_twins_and_sums(cache, SPARSE_LAYERS)


@torch.inference_mode()
def test_without_a_cache_twins_are_made_on_the_spot() -> None:
    """``use_cache=False``: every forward sees all tokens; continuation rows select among them."""
    model, ids = tiny_model(), random_ids(1, 190)
    with attach(model, tiny_basis()) as handle, handle.continuation(189):
        whole = model(ids, use_cache=False).logits[:, -1]
        cache = DynamicCache()
        model(ids[:, :-1], past_key_values=cache)
        step = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(whole, step, rtol=0, atol=1e-9)


def test_gradients_are_refused_before_anything_is_cached() -> None:
    model, cache = tiny_model(), DynamicCache()
    with attach(model, tiny_basis(), method="dense"):
        with pytest.raises(LokiError, match="an attached model has no gradients; call it under"):
            model(random_ids(1, 20), past_key_values=cache)
        assert cache.get_seq_length() == 0
        with torch.no_grad():
            model(random_ids(1, 20), past_key_values=cache)
    assert cache.get_seq_length() == 20


@torch.inference_mode()
def test_attention_weights_are_refused() -> None:
    model = copy.deepcopy(tiny_model())
    model.set_attn_implementation("eager")
    with attach(model, tiny_basis(), method="dense"):
        with pytest.raises(LokiError, match="output_attentions=True needs every attention weight"):
            model(random_ids(1, 20), output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(LokiError, match="output_attentions=True needs every attention weight"):
        attach(model, tiny_basis(), method="dense")


@torch.inference_mode()
def test_caches_that_cannot_carry_twins_are_refused() -> None:
    model = tiny_model()
    with attach(model, tiny_basis(), method="dense"):
        offloaded = DynamicCache(config=model.config)
        # A CUDA build without a driver cannot even make one.
        offloaded.offloading = True
        for cache in (QuantizedCache.__new__(QuantizedCache), offloaded):
            with pytest.raises(LokiError, match="cannot carry low-rank keys; pass a plain DynamicCache"):
                model(random_ids(1, 10), past_key_values=cache)
        mixed = DynamicCache(config=tiny_model("gemma3_text").config)
        with pytest.raises(LokiError, match="layer 0 has full attention, the cache keeps it as DynamicSlidingWindow"):
            model(random_ids(1, 10), past_key_values=mixed)


def test_layers_that_are_not_ours_are_left_alone_and_reported() -> None:
    model, cache = tiny_model("gemma3_text"), DynamicCache()
    with attach(model, tiny_basis("gemma3_text")) as handle:
        model.generate(random_ids(1, 180), max_new_tokens=4, do_sample=False, past_key_values=cache)
        report = handle.report()
    assert dict(report.other_layers) == {0: "sliding_attention"}
    assert [layer.layer for layer in report.layers] == [1, 2]
    assert "0  left alone: sliding_attention" in str(report)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", *["PreallocatedLayer"] * 2]


@torch.inference_mode()
def test_a_compiled_model_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs end where attention and the cache begin; ``eager`` runs dynamo without a code generator."""
    model, ids = tiny_model(dtype=torch.float32), random_ids(1, 182)
    parts = (ids[:, :-2], ids[:, -2:-1], ids[:, -1:])
    with compiling(monkeypatch), attach(model, tiny_basis()) as handle, handle.trace() as trace:
        plain = DynamicCache(config=model.config)
        expected = [model(part, past_key_values=plain).logits for part in parts]
        compiled, cache = torch.compile(model, backend="eager"), DynamicCache(config=model.config)
        ours = [compiled(part, past_key_values=cache).logits for part in parts]
        assert handle.report().layers[1].sparse_steps == 4
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert all(torch.equal(trace[2][layer], trace[5][layer]) for layer in SPARSE_LAYERS)


def test_detached_caches_go_on_and_are_encoded_again() -> None:
    """Detach, decode densely, attach with another basis: the missing tokens, or all, are encoded."""
    model = tiny_model()
    with torch.inference_mode():
        with attach(model, tiny_basis()):
            cache = filled_cache(model)
        for token in range(20, 90):
            model(torch.full((2, 1), token), past_key_values=cache)
        for basis in (tiny_basis(), tiny_basis(candidate="pca-post"), tiny_basis(planes="16@2")):
            with attach(model, basis, budget=BUDGET, tail="linear") as handle:
                model(torch.full((2, 1), 7), past_key_values=cache)
                assert handle.report().sparse_steps == 2
            check_twins_and_sums(cache, SPARSE_LAYERS)
            assert cache.layers[1].store.twins.encoder.planes == basis.planes
