"""Attaching: plain generate, caches, batches, beams, handles, reports, and every misuse."""

import copy
import warnings

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from loki_attention import Budget, KeyBasis, LokiError, LokiWarning, attach
from loki_attention.integrations.huggingface.cache_layer import PreallocatedLayer
from models import BUDGET, LAYOUTS, random_ids, tiny_basis, tiny_model

WHOLE = Budget(tokens=1000, sinks=2, recent=4)
NEW = 24
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
SAMPLING = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "temperature": 1.3}
BEAMS = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3}


def generate(model: PreTrainedModel, ids: Tensor, **settings: object) -> tuple[Tensor, Tensor]:
    """New tokens (B, NEW) and their scores (B, NEW, V); padding is id 0."""
    torch.manual_seed(1)
    out = model.generate(
        ids, attention_mask=(ids != 0).long(), return_dict_in_generate=True, output_logits=True, **settings
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def padded(batch: int, length: int) -> Tensor:
    ids = random_ids(batch, length, seed=11)
    ids[0, :19] = 0
    return ids


@pytest.mark.parametrize("settings", [GREEDY, SAMPLING, BEAMS], ids=["greedy", "sampling", "beams"])
@pytest.mark.parametrize(("family", "layout"), [("llama", "gqa"), ("llama", "mha"), ("qwen3", "gqa"), ("qwen3", "mqa")])
def test_full_budget_equals_dense(family: str, layout: str, settings: dict[str, object]) -> None:
    model, ids = tiny_model(family, layout), padded(2, 90)
    tokens, logits = generate(model, ids, **settings)
    assert min(len(set(row.tolist())) for row in tokens) >= 8, "the model repeats itself: equality would show nothing"
    with (
        pytest.warns(LokiWarning, match="budget covers all tokens"),
        attach(model, tiny_basis(family, layout), budget=WHOLE),
    ):
        ours, our_logits = generate(model, ids, **settings)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_generation_of_a_padded_batch_equals_single_sequences(layout: str) -> None:
    model, ids = tiny_model(layout=layout), padded(2, 150)
    with attach(model, tiny_basis(layout=layout)) as handle:
        together, logits = generate(model, ids, **GREEDY)
        for i, row in enumerate(ids):
            alone, its_logits = generate(model, row[row != 0][None], **GREEDY)
            assert torch.equal(together[i], alone[0])
            torch.testing.assert_close(logits[i], its_logits[0], rtol=0, atol=1e-8)
        assert handle.report().sparse_steps == 2 * 3 * (NEW - 1)
    assert min(len(set(row.tolist())) for row in together) >= 8


def test_a_beam_scores_what_its_sequence_scores_alone() -> None:
    model, ids = tiny_model(), random_ids(1, 150, seed=2)
    with attach(model, tiny_basis()) as handle, torch.inference_mode():
        out = model.generate(
            ids, num_beams=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True, **GREEDY
        )
        with handle.continuation(ids.shape[1]):
            logits = model(out.sequences).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    alone = logits.gather(-1, out.sequences[0, ids.shape[1] :, None]).sum()
    torch.testing.assert_close(out.sequences_scores[0].double(), alone, rtol=1e-5, atol=1e-5)


def test_the_callers_cache_is_used_in_place_and_lives_on() -> None:
    model, ids = tiny_model(), random_ids(1, 150)
    cache = DynamicCache()
    with attach(model, tiny_basis()) as handle:
        first = model.generate(ids, past_key_values=cache, **GREEDY)
        assert all(isinstance(layer, PreallocatedLayer) for layer in cache.layers)
        assert cache.get_seq_length() == ids.shape[1] + NEW - 1
        second_turn = torch.cat([first, random_ids(1, 20, seed=3)], dim=1)
        ours = model.generate(second_turn, past_key_values=cache, **GREEDY)
        whole, _ = generate(model, second_turn, **GREEDY)
        assert handle.report().sparse_steps > 0
    # The first turn's tokens were cached by sparse steps, so the two prompts differ a little; the shapes do not.
    assert ours.shape[1] - second_turn.shape[1] == whole.shape[1] == NEW
    with torch.inference_mode():
        plain = DynamicCache()
        for layer, mine in enumerate(cache.layers):
            plain.update(mine.keys, mine.values, layer)
        step = random_ids(1, 1, seed=4)
        detached = model(step, past_key_values=cache).logits
        torch.testing.assert_close(detached, model(step, past_key_values=plain).logits, rtol=0, atol=1e-12)


def test_attaching_onto_a_filled_cache_encodes_it() -> None:
    model, ids = tiny_model(), random_ids(1, 150)
    step = random_ids(1, 1, seed=4)
    with torch.inference_mode():
        filled = DynamicCache()
        model(ids, past_key_values=filled)
        with attach(model, tiny_basis()):
            cache = DynamicCache()
            model(ids, past_key_values=cache)
            expected = model(step, past_key_values=cache).logits
            ours = model(step, past_key_values=filled).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_another_basis_on_the_same_cache_encodes_afresh() -> None:
    model, ids, step = tiny_model(), random_ids(1, 150), random_ids(1, 1, seed=4)
    logits = []
    with torch.inference_mode():
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        for candidate in ("balanced", "pca-post", "balanced"):
            with attach(model, tiny_basis(candidate=candidate), budget=BUDGET):
                logits.append(model(step, past_key_values=cache).logits)
            cache.crop(-1)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    torch.testing.assert_close(logits[0], logits[2], rtol=0, atol=1e-12)


def test_two_models_at_once_and_one_model_twice() -> None:
    llama, qwen, ids = tiny_model(), tiny_model("qwen3"), random_ids(1, 150)
    with attach(llama, tiny_basis()) as one, attach(qwen, tiny_basis("qwen3")) as two:
        with pytest.raises(LokiError, match="attached to this model already"):
            attach(llama, tiny_basis())
        model_tokens = [generate(model, ids, **GREEDY)[0] for model in (llama, qwen)]
        assert one.report().sparse_steps == two.report().sparse_steps == 2 * (NEW - 1)
    with attach(llama, tiny_basis()):
        alone, _ = generate(llama, ids, **GREEDY)
    assert torch.equal(alone, model_tokens[0])


def test_a_model_that_shares_the_configuration_is_left_alone() -> None:
    model = tiny_model()
    other = type(model)(model.config).double().eval()
    ids = random_ids(1, 150)
    with torch.inference_mode():
        before = other(ids).logits
        with attach(model, tiny_basis()) as handle, handle.continuation(100):
            during = other(ids).logits
            model(ids)
    assert torch.equal(before, during)


def test_detaching_leaves_no_trace() -> None:
    model, ids = tiny_model(), random_ids(1, 150)
    config, attributes = copy.deepcopy(model.config.to_dict()), set(vars(model))
    implementation = model.config._attn_implementation
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, logits = generate(model, ids, **GREEDY)
    with pytest.raises(RuntimeError, match="inside"), attach(model, tiny_basis()):
        generate(model, ids, **GREEDY)
        raise RuntimeError("inside")
    after, later_logits = generate(model, ids, **GREEDY)
    assert torch.equal(before, after)
    assert torch.equal(logits, later_logits)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert set(vars(model)) == attributes
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    handle = attach(model, tiny_basis(), method="dense")
    handle.detach()
    handle.detach()
    assert not handle.active


def test_an_error_inside_a_forward_does_not_leak_the_cache() -> None:
    model = tiny_model()
    with attach(model, tiny_basis(), method="dense"):
        with pytest.raises(LokiError, match="output_attentions"), torch.inference_mode():
            model(random_ids(1, 10), output_attentions=True)
        with torch.inference_mode():
            model(random_ids(1, 10))


def test_a_layer_that_bypasses_the_method_is_found_out() -> None:
    model = copy.deepcopy(tiny_model())
    model.model.layers[1].self_attn.config = copy.deepcopy(model.config)
    with attach(model, method="dense"), torch.inference_mode():
        with pytest.raises(LokiError, match=r"attention of layers \[1\] did not go through"):
            model(random_ids(1, 10))


def test_capacity_comes_from_generate_and_else_grows_by_a_quarter() -> None:
    model, ids = tiny_model(), random_ids(1, 100)
    cache = DynamicCache()
    with attach(model, tiny_basis()), torch.inference_mode():
        model.generate(ids, past_key_values=cache, **GREEDY)
        assert cache.layers[0].store.capacity == 100 + NEW - 1
        grown = DynamicCache()
        model(ids, past_key_values=grown)
        assert grown.layers[0].store.capacity == 100
        model(ids[:, :1], past_key_values=grown)
        assert grown.layers[0].store.capacity == 125


def test_pipeline_needs_no_further_argument(reference_model: PreTrainedModel, reference_tokenizer: object) -> None:
    from transformers import pipeline

    from loki_attention.data import haystack_text

    run = pipeline("text-generation", model=reference_model, tokenizer=reference_tokenizer)
    prompt = haystack_text().read_text(encoding="utf-8")[:1500]
    with attach(reference_model, method="exact-topk", budget=Budget(tokens=128)) as handle:
        out = run(prompt, max_new_tokens=5, do_sample=False, return_full_text=False)
        assert handle.report().sparse_steps == 3 * 4
    assert out[0]["generated_text"]


def test_eager_models_keep_their_own_mask() -> None:
    model = copy.deepcopy(tiny_model())
    model.set_attn_implementation("eager")
    ids = random_ids(2, 150)  # transformers' own eager attention gives NaN for padding in float64
    with attach(tiny_model(), tiny_basis()):
        tokens, logits = generate(tiny_model(), ids, **GREEDY)
    with attach(model, tiny_basis()):
        ours, our_logits = generate(model, ids, **GREEDY)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-3)  # eager softmax is float32
    assert model.config._attn_implementation == "eager"


def test_paper_rows_take_one_budget_for_the_window() -> None:
    model, ids = tiny_model(), random_ids(1, 160)
    budget = Budget(fraction=1 / 4, minimum=1, sinks=0, recent=1)
    with torch.inference_mode(), attach(model, tiny_basis(), method="paper-loki", budget=budget) as handle:
        with handle.paper_rows(), handle.trace() as trace:
            model(ids)
    rows = trace[0][0][0, 0]
    kept = (rows >= 0).sum(-1)
    assert kept[:40].sum() == 0, "rows up to K are dense"
    assert (kept[40:] == 40).all()


def test_trace_has_one_entry_a_forward() -> None:
    model, ids = tiny_model(), random_ids(2, 150)
    with attach(model, tiny_basis()) as handle, handle.trace() as trace:
        generate(model, ids, **GREEDY)
    assert len(trace) == NEW
    assert trace[0] == {}
    for entry in trace[1:]:
        assert set(entry) == {1, 2}
        for indices in entry.values():
            assert indices.shape == (2, 2, 1, BUDGET.tokens)
            assert (indices.diff(dim=-1) > 0).all()


def test_report_counts_what_was_read() -> None:
    model, ids = tiny_model(dtype=torch.float32), random_ids(1, 150)
    with attach(model, tiny_basis(), layers={1: Budget(tokens=50)}) as handle:
        generate(model, ids, **GREEDY)
        report = handle.report()
    assert report.sparse_layers == (1, 2)
    assert report.dense_layers == (0,)
    dense, one, two = report.layers
    assert dense.reason == "attends diffusely"
    assert dense.dense_steps == {"attends diffusely": NEW}
    assert one.dense_steps == {"prefill": 1}
    assert one.sparse_steps == one.sparse_rows == NEW - 1
    cached = sum(range(151, 151 + NEW - 1))
    assert two.tokens_cached == cached
    assert two.tokens_read == (NEW - 1) * BUDGET.tokens
    assert one.tokens_read == (NEW - 1) * 50
    # 4 bytes a twin, K keys and values of 16 floats, sums of (D + R1 + R1 D) floats; two KV heads.
    assert two.bytes_read == 2 * (4 * cached + (NEW - 1) * (2 * 64 * BUDGET.tokens + 4 * (16 + 4 + 4 * 16)))
    assert two.bytes_dense == 2 * 2 * 64 * cached
    assert report.memory.cache == 3 * 2 * 2 * (150 + NEW - 1) * 64
    # Native twins fill whole tiles of 16 slots.
    assert report.memory.twins == 2 * 2 * 176 * 4
    assert report.memory.used == report.memory.capacity == 150 + NEW - 1
    assert report.peak_bytes == report.memory.total
    assert report.to_dict()["layers"][2]["tokens_read"] == two.tokens_read
    assert "backend native" in str(report)


def test_dense_below_and_dense_layers() -> None:
    model, ids = tiny_model(), random_ids(1, 150)
    with pytest.warns(LokiWarning, match="below dense_below"), attach(model, tiny_basis(), dense_below=1000):
        generate(model, ids, **GREEDY)
    with pytest.warns(LokiWarning, match="every layer stays dense"):
        attach(model, tiny_basis(), layers={1: "dense", 2: "dense"}).detach()
    with attach(model, tiny_basis(), layers={0: "sparse"}) as handle:
        generate(model, ids, **GREEDY)
        assert handle.report().sparse_layers == (0, 1, 2)
    with pytest.warns(LokiWarning, match="prefill"), attach(model, tiny_basis()):
        generate(model, ids, use_cache=False, max_new_tokens=2)


def test_a_context_far_beyond_the_calibrated_length_warns_once() -> None:
    from dataclasses import replace

    model = tiny_model()
    basis = replace(tiny_basis(), record={"length": 100})
    with torch.inference_mode(), attach(model, basis) as handle, handle.continuation(120):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(random_ids(1, 150))
        with pytest.warns(LokiWarning, match="calibrated on windows of 100") as caught:
            model(random_ids(1, 151))
            model(random_ids(1, 152))
    assert len(caught) == 1


def test_continuation_needs_a_causal_mask() -> None:
    model, ids = tiny_model(), random_ids(1, 60)
    both_ways = torch.ones(1, 1, 60, 60, dtype=torch.bool)
    both_ways[..., 50:, :20] = False
    with torch.inference_mode(), attach(model, tiny_basis()) as handle, handle.continuation(30):
        with pytest.raises(LokiError, match="not causal row by row"):
            model(ids, attention_mask=both_ways)


def other_layout() -> KeyBasis:
    return tiny_basis(layout="mqa")


MISUSE = {
    "method": (lambda m, b: attach(m, b, method="locki"), "unknown method 'locki'.*did you mean 'loki'"),
    "tail": (lambda m, b: attach(m, b, tail="cubic"), "unknown tail 'cubic'; known: none, mean, linear"),
    "tail of streaming": (lambda m, b: attach(m, b, method="streaming", tail="linear"), "has no tail"),
    "linear without basis": (
        lambda m, b: attach(m, method="exact-topk", budget=BUDGET, tail="linear"),
        "tail='linear' needs a basis",
    ),
    "layer": (lambda m, b: attach(m, b, layers={7: "dense"}), "unknown layer 7; known: 0, 1, 2"),
    "layer choice": (lambda m, b: attach(m, b, layers={1: "sparce"}), "expected 'dense', 'sparse' or a Budget"),
    "backend": (lambda m, b: attach(m, b, backend="cuda"), "unknown backend 'cuda'"),
    "per": (lambda m, b: attach(m, b, per="head"), "unknown per 'head'"),
    "no basis": (lambda m, b: attach(m), "needs a basis"),
    "no budget": (lambda m, b: attach(m, method="streaming"), "needs a budget"),
    "planes": (lambda m, b: attach(m, b, planes="lots"), "outside the grammar"),
    "odd planes": (lambda m, b: attach(m, b, planes="16@5"), "outside the grammar"),
    "no dims": (lambda m, b: attach(m, b, planes="0@4"), "outside the grammar"),
    "too many dims": (lambda m, b: attach(m, b, planes="24@4"), "24 dims but the head dim is 16"),
    "paper planes": (lambda m, b: attach(m, b, method="paper-loki", planes="8@4"), "keeps float keys"),
    "layout": (lambda m, b: attach(m, other_layout()), "with kv heads 1 where this model has 2"),
    "depth": (lambda m, b: attach(tiny_model(layers=2), b), "with depth 3 where this model has 2"),
    "architecture": (lambda m, b: attach(tiny_model("qwen3"), b), "with architecture LlamaForCausalLM"),
    "dense_below": (lambda m, b: attach(m, b, dense_below=-1), "dense_below must be"),
    "prompt tokens": (lambda m, b: negative_prompt(m, b), "prompt_tokens must be"),
    "no moments": (lambda m, b: attach(m, without_moments(b), method="pca-attn"), "has no moments"),
}


def negative_prompt(model: PreTrainedModel, basis: KeyBasis) -> None:
    with attach(model, basis) as handle, handle.continuation(-1):
        pass


def without_moments(basis: KeyBasis) -> KeyBasis:
    from dataclasses import replace

    return replace(basis, moments=None)


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_refused_in_one_sentence(name: str) -> None:
    misuse, sentence = MISUSE[name]
    model = tiny_model()
    with pytest.raises(LokiError, match=sentence) as caught:
        misuse(model, tiny_basis())
    assert "\n" not in str(caught.value)
    with attach(model, tiny_basis(), method="dense"):
        pass


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(LokiError, match="expected a transformers model, got Linear"):
        attach(torch.nn.Linear(2, 2), method="streaming", budget=BUDGET)
