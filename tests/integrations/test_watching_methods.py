"""H2O and SnapKV note the rows that go by: their notes follow the cache, and where they cannot a step is refused."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from generate_operations import beams, prompt_lookup
from loki_attention import attach
from loki_attention.errors import ArgumentError, ModelError
from models import BUDGET, random_ids, tiny_model

PROMPT, LENGTH = 100, 106
watching = pytest.mark.parametrize("method", ["h2o", "snapkv"])


def steps(model: PreTrainedModel, ids: Tensor, cache: DynamicCache, start: int, stop: int | None = None) -> Tensor:
    """Logits of tokens ``start`` on, one forward each."""
    stop = ids.shape[1] if stop is None else stop
    return torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(start, stop)], dim=1)


@watching
@torch.inference_mode()
def test_notes_follow_reordered_repeated_and_selected_sequences(method: str) -> None:
    model, ids, cache = tiny_model(), random_ids(3, LENGTH), DynamicCache()
    with attach(model, method=method, budget=BUDGET):
        model(ids[:, :PROMPT], past_key_values=cache)
        expected = steps(model, ids, cache, PROMPT)
        cache = DynamicCache()
        model(ids[:, :PROMPT], past_key_values=cache)
        steps(model, ids, cache, PROMPT, PROMPT + 2)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        reordered = steps(model, ids[[2, 0, 0]], cache, PROMPT + 2, PROMPT + 4)
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.batch_repeat_interleave(2)
        repeated = steps(model, ids[[2, 2, 0, 0]], cache, PROMPT + 4)
    torch.testing.assert_close(reordered, expected[[2, 0, 0], 2:4], rtol=0, atol=1e-9)
    torch.testing.assert_close(repeated, expected[[2, 2, 0, 0], 4:], rtol=0, atol=1e-9)


@watching
@torch.inference_mode()
def test_a_prompt_in_two_parts_is_one_prompt(method: str) -> None:
    model, ids, whole, parts = tiny_model(), random_ids(2, LENGTH), DynamicCache(), DynamicCache()
    with attach(model, method=method, budget=BUDGET):
        model(ids[:, :PROMPT], past_key_values=whole)
        model(ids[:, :70], past_key_values=parts)
        model(ids[:, 70:PROMPT], past_key_values=parts)
        torch.testing.assert_close(
            steps(model, ids, parts, PROMPT), steps(model, ids, whole, PROMPT), rtol=0, atol=1e-9
        )


@watching
@torch.inference_mode()
def test_rows_below_a_threshold_are_dense_and_noted(method: str) -> None:
    model, ids, cache = tiny_model(), random_ids(1, LENGTH), DynamicCache()
    with attach(model, method=method, budget=BUDGET, dense_below=PROMPT + 3) as handle:
        model(ids[:, :PROMPT], past_key_values=cache)
        expected = steps(model, ids, cache, PROMPT)
        assert handle.report().sparse_steps == 2 * 4
        with handle.continuation(PROMPT):
            ours = model(ids).logits[:, PROMPT:]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@watching
def test_beam_search_runs(method: str) -> None:
    with attach(tiny_model(), method=method, budget=BUDGET) as handle:
        assert beams(tiny_model(), DynamicCache()).sequences.shape[1] > 150
        assert handle.report().sparse_steps > 0


@watching
@torch.inference_mode()
def test_a_prompt_that_went_by_before_is_refused(method: str) -> None:
    model, ids, cache = tiny_model(), random_ids(1, LENGTH), DynamicCache()
    model(ids[:, :PROMPT], past_key_values=cache)
    refused = pytest.raises(ModelError, match=r"went by unseen .* start from an empty cache")
    with refused, attach(model, method=method, budget=BUDGET):
        steps(model, ids, cache, PROMPT)
    with refused, attach(model, method=method, budget=BUDGET):
        prompt_lookup(model, DynamicCache())


@torch.inference_mode()
def test_other_settings_do_not_take_over_the_notes() -> None:
    model, ids, cache = tiny_model(), random_ids(1, LENGTH), DynamicCache()
    with attach(model, method="h2o", budget=BUDGET):
        model(ids[:, :PROMPT], past_key_values=cache)
        steps(model, ids, cache, PROMPT, PROMPT + 1)
    with attach(model, method="h2o", budget=BUDGET, per="query-head"), pytest.raises(ModelError, match="unseen"):
        steps(model, ids, cache, PROMPT + 1)


@torch.inference_mode()
def test_snapkv_goes_on_after_a_crop_of_new_tokens_and_h2o_does_not() -> None:
    model, ids = tiny_model(), random_ids(1, LENGTH)
    logits = {}
    for cropped in (False, True):
        cache = DynamicCache()
        with attach(model, method="snapkv", budget=BUDGET):
            model(ids[:, :PROMPT], past_key_values=cache)
            steps(model, ids, cache, PROMPT, PROMPT + 2)
            if cropped:
                steps(model, ids.flip(1), cache, PROMPT + 2, PROMPT + 4)
                cache.crop(-2)
            logits[cropped] = steps(model, ids, cache, PROMPT + 2)
    torch.testing.assert_close(logits[True], logits[False], rtol=0, atol=1e-9)
    cache = DynamicCache()
    refused = pytest.raises(ModelError, match="h2o adds up the attention of every row")
    with refused, attach(model, method="h2o", budget=BUDGET):
        model(ids[:, :PROMPT], past_key_values=cache)
        cache.crop(-2)
        steps(model, ids, cache, PROMPT)


@torch.inference_mode()
def test_the_papers_rows_suit_h2o_alone() -> None:
    model, ids = tiny_model(), random_ids(1, LENGTH)
    with attach(model, method="h2o", budget=BUDGET) as handle, handle.paper_rows(), handle.trace() as trace:
        model(ids)
    assert (trace[0][1][0, :, BUDGET.tokens :] >= 0).sum(-1).unique().tolist() == [BUDGET.tokens]
    refused = pytest.raises(ArgumentError, match=r"selects by the end of a prompt.* use continuation")
    with refused, attach(model, method="snapkv", budget=BUDGET) as handle, handle.paper_rows():
        model(ids)


@torch.inference_mode()
def test_snapkv_reads_the_prompts_share_and_every_token_since() -> None:
    model, ids, cache = tiny_model(), random_ids(2, LENGTH), DynamicCache()
    with attach(model, method="snapkv", budget=BUDGET) as handle:
        model(ids[:, :PROMPT], past_key_values=cache)
        with handle.trace() as trace:
            steps(model, ids, cache, PROMPT)
        report = handle.report()
    kept = [int((forward[1][0, 0, 0] >= 0).sum()) for forward in trace]
    assert kept == [BUDGET.tokens + new for new in range(1, LENGTH - PROMPT + 1)]
    assert report.layers[1].tokens_read == 2 * sum(kept)
    assert "simulated, not to be timed: nothing is evicted" in str(report)
    assert report.to_dict()["simulated"] == report.simulated
