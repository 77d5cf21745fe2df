"""Attached models over transformers' static cache: what they answer and report, and operations on the cache."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from loki_attention import Budget, LokiWarning, attach
from loki_attention.integrations.huggingface.families import FAMILIES
from loki_attention.integrations.huggingface.loading import shorten
from loki_attention.integrations.huggingface.settings import LayerPlan
from loki_attention.integrations.huggingface.static_layer import TwinnedStaticLayer
from loki_attention.integrations.huggingface.static_step import StaticForward, StaticSteps
from loki_attention.static_cache import StaticTwins
from models import random_ids, tiny_basis, tiny_model
from static_caches import BUDGET, CAPACITY, both, padded_ids, skip_without, static_cache

skip_without("native")
SPARSE_LAYERS = (1, 2)


REST = (("linear", 0), ("mean", 20), ("none", 0), ("none", 20))


def model_of(family: str = "llama", layers: int = 3) -> PreTrainedModel:
    return tiny_model(family, dtype=torch.float32, layers=layers)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("tail", "padding"), [("linear", 20), *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_steps_and_reports_are_those_of_a_cache_that_grows(tail: str, padding: int) -> None:
    static, growing = both(model_of(), tail=tail, padding=padding)
    close(static.logits, growing.logits)
    assert static.logits.argmax(-1).unique().numel() > 8, "the model repeats itself"
    ours, theirs = static.report.to_dict(), growing.report.to_dict()
    assert ours["memory"].pop("capacity") == CAPACITY and theirs["memory"].pop("capacity") < CAPACITY
    for name in ("cache", "twins"):
        assert ours["memory"].pop(name) > 0 and theirs["memory"].pop(name) > 0
    assert ours["memory"] == theirs["memory"] and ours["memory"]["used"] == 195
    for mine, other in zip(ours["layers"], theirs["layers"], strict=True):
        masses = [(mine.pop(name), other.pop(name)) for name in ("mean_mass", "worst_mass")]
        assert mine == other
        assert all(a == b or abs(a - b) < 1e-4 for a, b in masses)
    assert static.report.sparse_steps == 2 * 9


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"dense_below": 190},
        {"budget": Budget(tokens=189)},
        {"layers": {0: "sparse", 1: Budget(tokens=40), 2: "dense"}},
    ],
    ids=["dense-below", "budget-outgrown", "layers"],
)
def test_what_is_dense_where_is_counted_on_the_device(settings: dict[str, Any]) -> None:
    static, growing = both(model_of(), padding=1, **settings)
    close(static.logits, growing.logits)
    for mine, other in zip(static.report.layers, growing.report.layers, strict=True):
        assert (dict(mine.dense_steps), mine.sparse_steps) == (dict(other.dense_steps), other.sparse_steps)
        assert (mine.tokens_read, mine.tokens_cached) == (other.tokens_read, other.tokens_cached)
        assert (mine.bytes_read, mine.bytes_dense) == (other.bytes_read, other.bytes_dense)


@pytest.mark.slow
def test_a_method_of_dense_steps_alone() -> None:
    static, growing = both(model_of(), method="dense", tail=None, padding=20)
    close(static.logits, growing.logits)
    assert dict(static.report.layers[2].dense_steps) == {"method dense": 10}


def generated(model: PreTrainedModel, *, batch: int, padding: int, new: int = 20, **settings: Any) -> Tensor:
    ids, mask = padded_ids(150, padding, batch)
    torch.manual_seed(3)
    settings = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0} | settings
    return model.generate(ids, attention_mask=mask, **settings)


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"batch": 1, "padding": 0}),
    ("llama", {"batch": 1, "padding": 20}),
    ("llama", {"batch": 2, "padding": 0, "do_sample": True, "temperature": 0.8, "top_k": 20}),
    ("llama", {"batch": 2, "padding": 20, "num_beams": 3}),
    ("llama", {"batch": 2, "padding": 20, "prefill_chunk_size": 50}),
    ("llama", {"batch": 1, "padding": 0, "prefill_chunk_size": 149}),
    *((family, {"batch": 2, "padding": 20}) for family in FAMILIES if family != "llama"),
]


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"batch": 2, "padding": 20}), *(pytest.param(*way, marks=pytest.mark.slow) for way in WAYS)],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_generate_with_a_static_cache_equals_one_that_grows(family: str, settings: dict[str, Any]) -> None:
    model = model_of(family)
    with attach(model, tiny_basis(family), budget=BUDGET, tail="linear", backend="native") as handle:
        expected = generated(model, **settings)
        before = handle.report().sparse_steps
        found = generated(model, **settings, cache_implementation="static")
        assert handle.report().sparse_steps == 2 * before > 0
    assert torch.equal(found, expected)


@torch.inference_mode()
def test_a_second_turn_and_a_third_go_on() -> None:
    """Prompts on a filled cache bring it up to date; decode steps follow."""
    model, (ids, mask) = model_of(), padded_ids(300, 20)
    ends = (100, 101, 102, 170, 171, 172, 173, 290, 291, 292)
    found = {}
    for cache in (static_cache(model), DynamicCache(config=model.config)):
        with attach(model, tiny_basis(), budget=BUDGET, tail="linear", backend="native") as handle:
            starts = (0, *ends[:-1])
            found[type(cache).__name__] = torch.stack(
                [
                    model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits[:, -1]
                    for a, b in zip(starts, ends, strict=True)
                ]
            )
            assert handle.report().sparse_steps == 2 * 7
            assert dict(handle.report().layers[1].dense_steps) == {"prefill": 3}
    close(found["StaticCache"], found["DynamicCache"])


@pytest.mark.slow
@torch.inference_mode()
def test_a_cropped_cache_goes_on_as_one_that_grows() -> None:
    """Blocks that the tail's sums held are subtracted; the tokens that follow are others."""
    model, (ids, mask) = model_of(), padded_ids(260, 20)
    mask[:, 130:] = 1
    parts = [(0, 195), (195, 196), (196, 197)], [(130, 190), (190, 191), (191, 192), (192, 193)]
    found = {}
    for cache in (static_cache(model), DynamicCache(config=model.config)):
        with attach(model, tiny_basis(), budget=BUDGET, tail="linear", backend="native"):
            for a, b in parts[0]:
                model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache)
            shorten(cache, 130)
            found[type(cache).__name__] = torch.stack(
                [
                    model(ids[:, a + 60 : b + 60], attention_mask=mask[:, :b], past_key_values=cache).logits[:, -1]
                    for a, b in parts[1]
                ]
            )
    close(found["StaticCache"], found["DynamicCache"])


@pytest.mark.slow
@torch.inference_mode()
def test_operations_within_an_attachment() -> None:
    """Crop, reorder, a copy that goes its own way, and reset, each followed by steps that hold no decision of the host."""
    model, (ids, _) = model_of(), padded_ids(200, 0)
    cache = static_cache(model)

    def step(cache: StaticCache, token: int) -> Tensor:
        return model(torch.full((2, 1), token), past_key_values=cache).logits[:, -1]

    with attach(model, tiny_basis(), budget=BUDGET, tail="linear", backend="native") as handle:
        model(ids[:, :199], past_key_values=cache)
        expected = step(cache, 9)
        shorten(cache, 140)
        model(ids[:, 140:199], past_key_values=cache)
        close(step(cache, 9), expected)
        other = copy.deepcopy(cache)
        for token in range(30):
            step(other, 20 + token)
        shorten(cache, 199)
        close(step(cache, 9), expected)
        cache.reorder_cache(torch.tensor([1, 0]))
        shorten(cache, 199)
        close(step(cache, 9), expected.flip(0))
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        model(ids[:, :199], past_key_values=cache)
        close(step(cache, 9), expected)
        assert handle.report().memory.used == 200


@pytest.mark.slow
@torch.inference_mode()
def test_filled_caches_are_attached_to_and_detached_ones_go_on() -> None:
    """A plain static cache, filled without us; after a detour without us everything is made up to date again."""
    model, (ids, mask) = model_of(), padded_ids(230, 20)
    static, growing = static_cache(model), DynamicCache(config=model.config)
    basis = tiny_basis()
    for cache in (static, growing):
        model(ids[:, :186], attention_mask=mask[:, :186], past_key_values=cache)
    for start in (186, 206):
        found = []
        for cache in (static, growing):
            with attach(model, basis, budget=BUDGET, tail="linear", backend="native") as handle:
                for i in range(start, start + 10):
                    logits = model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
                assert handle.report().sparse_steps == 2 * 10
            found.append(logits)
            for i in range(start + 10, start + 20):
                model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache)
        close(*found)
    assert all(isinstance(static.layers[layer], TwinnedStaticLayer) for layer in SPARSE_LAYERS)


@torch.inference_mode()
def test_nothing_moves_that_a_graph_knows() -> None:
    """From the first prompt on, over steps, operations and further prompts, every buffer keeps its address."""
    model, (ids, _) = model_of(), padded_ids(250, 0)
    cache = static_cache(model)

    def places() -> list[int]:
        layers = [cache.layers[layer] for layer in range(3)]
        held = [(layer.keys, layer.values, layer.cumulative_length, layer.twins.start) for layer in layers]
        beside = [(layer.twins.packed, *layer.twins.sums) for layer in layers[1:]]
        return [tensor.data_ptr() for group in (*held, *beside) for tensor in group]

    with attach(model, tiny_basis(), budget=BUDGET, tail="linear", backend="native"):
        model(ids[:, :150], past_key_values=cache)
        known = places()
        for i in range(150, 200):
            model(ids[:, i : i + 1], past_key_values=cache)
        model(ids[:, 200:240], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        shorten(cache, 100)
        cache.reset()
        model(ids[:, :180], past_key_values=cache)
        model(ids[:, 180:181], past_key_values=cache)
        assert places() == known


@torch.inference_mode()
def test_a_short_prompt_stays_dense_and_is_told() -> None:
    model, ids, cache = model_of(), random_ids(1, 10), static_cache(model_of())
    with pytest.warns(LokiWarning, match="every step stayed dense: .*budget covers all tokens"):
        with attach(model, tiny_basis(), budget=BUDGET, backend="native") as handle:
            ours = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(10)]
            assert dict(handle.report().layers[1].dense_steps) == {"budget covers all tokens": 10}
    close(torch.cat(ours, 1), model(ids).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_placed_model_answers_as_a_plain_one(on_disk: bool, tmp_path: Path) -> None:
    """As one that accelerate places whole, or whose layers it fetches one by one."""
    plain = model_of()
    plain.save_pretrained(tmp_path)
    parts = ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb")
    places = {"lm_head": "cpu", **{f"model.{part}": "disk" if part == "layers.1" else "cpu" for part in parts}}
    where: dict[str, Any] = {"device_map": places if on_disk else {"": "cpu"}, "offload_folder": tmp_path / "offloaded"}
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **where).eval()
    found = []
    for model in (plain, placed):
        with attach(model, tiny_basis(), budget=BUDGET, tail="linear", backend="native") as handle:
            found.append(generated(model, batch=2, padding=20, cache_implementation="static"))
            assert handle.report().sparse_steps > 0
    assert torch.equal(*found)


def test_layers_on_another_device_have_their_lengths_there() -> None:
    """As where ``device_map`` spreads a model; the first layer's are worked out, the others' moved."""
    cache = static_cache(model_of())
    for layer, device in enumerate(("cpu", "meta", "meta")):
        given = torch.zeros(2, 2, 40, 16, device=device)
        cache.layers[layer] = TwinnedStaticLayer.adopt(cache.layers[layer])
        cache.layers[layer].update(given, given)
        cache.layers[layer].twins = StaticTwins(cache.layers[layer].keys, cache.layers[layer].values)
    cache.layers[0].twins.start[1] = 7
    with attach(model_of(), tiny_basis(), budget=BUDGET, backend="native") as handle:
        steps = StaticSteps(
            {layer: LayerPlan(method) for layer, method in handle.methods.items()}, handle._settings, "sdpa"
        )
    forward = StaticForward(cache, steps)
    first = forward._lengths_at(0, None)
    assert (first.stop.tolist(), first.tokens.tolist(), first.k[0].tolist()) == ([40, 40], [40, 33], [24, 24])
    for layer in (1, 2):
        found = forward._lengths_at(layer, None)
        assert {tensor.device.type for tensor in (*found[:3], *found.k)} == {"meta"}
    assert forward._lengths_at(0, None).stop is first.stop
