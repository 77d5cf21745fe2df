"""The generation benchmark on a tiny model: every variant decodes, the gate comes first, caches are as before."""

from dataclasses import replace

import pytest
import torch
from transformers import CompileConfig

from loki_attention.benchmarking import timing
from loki_attention.benchmarking.generate import LOKI_STATIC, STATIC, VARIANTS, Generation, Suite
from loki_attention.benchmarking.random_model import SMALL_MODEL, ModelShape, random_model
from loki_attention.errors import LokiError
from loki_attention.kernels import native
from static_caches import compiling

if not native.available():
    pytest.skip("the native extension is not built", allow_module_level=True)

SUITE = Suite(shape=SMALL_MODEL, lengths=[300], new_tokens=3, rounds=2)


@pytest.fixture(autouse=True)
def _not_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "_BUSY_SHARE", 2.0)
    monkeypatch.setattr("loki_attention.kernels.break_even._LONGEST", 1024)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_every_variant_is_timed():
    measured = Generation(SUITE).measure(300)
    assert [row.config["variant"] for row in measured.results] == list(VARIANTS)
    assert all(row.value > 0 and row.unit == "tokens/s" and row.n == 2 for row in measured.results)
    assert [row.config["budget"] is None for row in measured.results] == [True, True, False, False]


def test_decoding_leaves_the_cache_as_long_as_it_was():
    generation = Generation(SUITE)
    ids = generation._ids(301)
    caches = [(name, generation._filled(300, name)) for name in (*VARIANTS, STATIC, LOKI_STATIC)]
    for name, cache in caches:
        with torch.inference_mode(), generation._attached(name):
            generation._generate(ids, cache, 2)
        assert cache.get_seq_length() == 300


@pytest.mark.parametrize("variant", [STATIC, LOKI_STATIC])
def test_a_static_cache_is_decoded_by_a_compiled_step(variant, monkeypatch):
    """As on a GPU, but with a compiler that takes no time; batch 2. An attachment's is compiled once for all rounds."""
    generation = Generation(replace(SUITE, variants=(variant,), batch=2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    settings = CompileConfig(backend=backend, mode="default")
    settings._compile_all_devices = True
    generation._model.generation_config.compile_config = settings
    with compiling(monkeypatch):
        (row,) = generation.measure(300).results
    backend = "native" if variant == LOKI_STATIC else None
    assert (row.config["variant"], row.config["backend"], row.config["batch"]) == (variant, backend, 2)
    assert len(graphs) == 1 and row.value > 0


def test_caches_are_counted_before_they_are_made():
    suite = replace(SUITE, variants=(STATIC, VARIANTS[0]), batch=3)
    caches = [Generation(suite)._filled(100, name) for name in suite.variants]
    held = sum(
        tensor[:, :, :100].nbytes for cache in caches for layer in cache.layers for tensor in (layer.keys, layer.values)
    )
    assert suite.cache_bytes(100) == held


def test_wrong_logits_are_not_timed(monkeypatch):
    generation = Generation(SUITE)
    logits = generation._logits
    monkeypatch.setattr(generation, "_logits", lambda name, budget: logits(name, budget) * (1 + (name == "loki")))
    with pytest.raises(LokiError, match=r"loki with a budget of .* differ from dense ones by 1.*nothing is timed"):
        generation._check()


def test_the_model_has_the_shape_asked_for():
    model = random_model(replace(SMALL_MODEL, layers=3), torch.bfloat16)
    assert len(model.model.layers) == 3
    assert model.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    full = ModelShape().config
    assert (full["num_hidden_layers"], full["hidden_size"], full["intermediate_size"]) == (16, 2048, 8192)
