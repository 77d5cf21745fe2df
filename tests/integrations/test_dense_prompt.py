"""A prompt that is computed once serves methods that must see it, in any order, as one of their own would."""

import random

import torch

from loki_attention import Budget
from loki_attention.evaluation.variant import Variant
from loki_attention.integrations.huggingface.dense_prompt import DensePrompt
from models import BUDGET, random_ids, tiny_basis, tiny_model

PROMPT, LENGTH = 130, 137
OTHERS = (Budget(tokens=60, sinks=1, recent=4), Budget(fraction=1 / 4, minimum=20, sinks=2, recent=9))
BASIS = tiny_basis()


def of_budgets() -> list[Variant]:
    """H2O and SnapKV with mixed budgets and tails."""
    pairs = [(budget, "none") for budget in (BUDGET, *OTHERS)] + [(BUDGET, "mean")]
    return [
        Variant(name=f"{method} {budget} {tail}", method=method, budget=budget, tail=tail)
        for method in ("h2o", "snapkv")
        for budget, tail in pairs
    ]


def watching() -> list[Variant]:
    """H2O and SnapKV with mixed budgets, tails, sets and layers."""
    found = of_budgets()
    for method in ("h2o", "snapkv"):
        found += [
            Variant(name=f"{method} per query head", method=method, budget=BUDGET, per="query-head"),
            Variant(name=f"{method} everywhere", method=method, budget=OTHERS[0], layers={0: "sparse"}),
            Variant(name=f"{method} in one layer", method=method, budget=BUDGET, layers={1: "dense"}),
        ]
    return found


def variants() -> list[Variant]:
    return [*watching(), Variant(name="loki", method="loki", budget=BUDGET, basis=BASIS, tail="linear")]


@torch.inference_mode()
def test_methods_that_watch_share_a_prompt_in_any_order() -> None:
    model, ids = tiny_model(), random_ids(1, LENGTH)
    rows = ids[:, PROMPT:]
    alone = {v.name: DensePrompt(model, ids[:, :PROMPT]).logits(rows, v) for v in variants()}
    shared = DensePrompt(model, ids[:, :PROMPT])
    for seed in range(2):
        for variant in random.Random(seed).sample(variants(), len(variants())):
            logits, read, dense = shared.logits(rows, variant)
            assert torch.equal(logits, alone[variant.name][0]), variant.name
            assert (read, dense) == alone[variant.name][1:]
    assert len({tuple(logits.sum(-1).tolist()) for logits, _, _ in alone.values()}) == len(alone)


@torch.inference_mode()
def test_answers_are_generated_as_on_a_prompt_of_its_own() -> None:
    model, ids = tiny_model(), random_ids(1, LENGTH)
    options = {"max_new_tokens": 3, "do_sample": False}
    shared = DensePrompt(model, ids[:, :PROMPT])
    for variant in of_budgets()[2:6]:
        own, report = DensePrompt(model, ids[:, :PROMPT]).generate(ids[:, PROMPT : PROMPT + 1], variant, **options)
        shared.logits(ids[:, PROMPT:], variant)
        tokens, ours = shared.generate(ids[:, PROMPT : PROMPT + 1], variant, **options)
        assert tokens.tolist() == own.tolist()
        assert ours.layers[-1].tokens_read == report.layers[-1].tokens_read


@torch.inference_mode()
def test_a_prompt_is_computed_once_more_for_all_that_watch() -> None:
    model, ids, lengths = tiny_model(), random_ids(1, LENGTH), []
    hook = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    try:
        prompt = DensePrompt(model, ids[:, :PROMPT])
        for variant in of_budgets():
            prompt.logits(ids[:, PROMPT:], variant)
    finally:
        hook.remove()
    assert lengths.count(PROMPT) == 1 + 1
    assert lengths.count(LENGTH - PROMPT) == 2 * 4


@torch.inference_mode()
def test_an_empty_prompt_and_one_of_a_single_token_are_watched_too() -> None:
    model, ids = tiny_model(), random_ids(1, 36)
    for length in (0, 1):
        shared = DensePrompt(model, ids[:, :length])
        for variant in of_budgets()[:4:3]:
            with variant.attach(model) as attached, attached.continuation(length):
                expected = model(ids).logits[0, length:]
            for _ in range(2):
                torch.testing.assert_close(shared.logits(ids[:, length:], variant)[0], expected, rtol=0, atol=1e-9)
