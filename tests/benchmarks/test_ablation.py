"""A change does what it is named after while its variant runs, and nothing afterwards."""

from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ablation import CHANGES, Changed, capped_at, combined, kappa_times, per_head, tempered
from evidence import STUDIES, equal_bytes, every_planes, file_name, without
from loki_attention.data import reference_model_path
from loki_attention.evaluation.variant import Variant
from loki_attention.integrations.huggingface.dense_prompt import DensePrompt
from models import BUDGET, random_ids, tiny_basis, tiny_model

COMMON: dict[str, Any] = {"method": "loki", "basis": tiny_basis(), "budget": BUDGET}
SHORT = random_ids(1, 560)
# Below 1024 tokens the sample is all tokens: a larger one and an exact L change nothing.
NOTHING = ("sample all", "sample 1024", "0.75 L, exact")
ONLY_LINEAR = ("cap 0.5", "cap 1.5", "cap 2", "no cap")


def logits(variant: Variant) -> Tensor:
    with torch.inference_mode():
        return DensePrompt(tiny_model(), SHORT[:, :548]).logits(SHORT[:, 548:], variant)[0]


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return {tail: logits(Variant(name=tail, tail=tail, **COMMON)) for tail in ("none", "mean", "linear")}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_felt_and_undone(change: str, plain: dict[str, Tensor]) -> None:
    variant = Changed(name=change, change=change, tail="linear", **COMMON)
    changed = logits(variant)
    if change in NOTHING:
        torch.testing.assert_close(changed, plain["linear"], rtol=0, atol=1e-9)
    else:
        assert (changed - plain["linear"]).abs().max() > 1e-3
    assert torch.equal(logits(Variant(name="again", tail="linear", **COMMON)), plain["linear"])
    assert variant.config["change"] == change
    if change in ONLY_LINEAR:
        assert torch.equal(logits(replace(variant, tail="mean")), plain["mean"])
    if change.startswith("kappa"):
        assert torch.equal(logits(replace(variant, tail="none")), plain["none"])


def test_a_rule_of_the_package_is_itself() -> None:
    """The tempered maximum at 3/4 of the sample's L, and a cap of one deviation, by the same code."""
    variant = Variant(name="loki", tail="linear", **COMMON)
    before = logits(variant)
    for same in (partial(combined, tempered(0.75)), partial(capped_at, 1.0), partial(kappa_times, 1.0)):
        with patch.dict(CHANGES, {"same": same}):
            assert torch.equal(logits(Changed(name="same", change="same", tail="linear", **COMMON)), before)


def test_planes_are_the_whole_grammar_and_fit() -> None:
    found = every_planes(64)
    assert len(set(found)) == len(found) == 32
    assert {"8@4", "16@4+32@2", "64@4", "16@2", "32@8", "4@8"} <= {str(planes) for planes in found}
    assert all(planes.rank <= 64 and 4 <= planes.bytes_per_token <= 32 for planes in found)


def test_each_heads_candidate_is_the_one_that_keeps_most() -> None:
    mass = {"pca-pre": [0.2, 0.9], "pca-post": [0.3, 0.1], "balanced": [0.1, 0.2], "exact-topk": [1.0, 1.0]}
    basis = replace(tiny_basis(), record={"figures": {"mass": {"1": mass, "2": mass}}})
    picked = per_head(basis)
    assert {layer: one.candidates for layer, one in picked.layers.items()} == dict.fromkeys(
        (1, 2), ("pca-post", "pca-pre")
    )


def test_at_equal_bytes_loki_stands_with_and_without_its_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evidence.at_equal_bytes", lambda setting, names, tail, lengths: [*names, tail])
    names: Any = equal_bytes(None)  # type: ignore[arg-type]
    assert names[0] == "loki:tail=none" and names[-1] == ""
    assert {"dense", "loki"}.isdisjoint(names) and {"random", "quest", "exact-topk"} <= set(names)


def test_budgets_without_sinks_or_recent_and_file_names(tmp_path: Any) -> None:
    assert (without(1 / 8, "sinks").sinks, without(1 / 8, "recent").recent) == (0, 1)
    names = [file_name(study, reference_model_path()) for study in STUDIES]
    assert names[:2] == ["wikitext2.json", "evidence-equal-bytes.json"]
    assert file_name("ablation", tmp_path / "g4") == "evidence-ablation-g4.json"
