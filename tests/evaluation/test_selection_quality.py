"""Measures of a selection against plain loops over the slots that the attached model traced."""

from dataclasses import replace

import pytest
import torch

from loki_attention import Budget
from loki_attention.evaluation.fidelity import Fidelity
from loki_attention.evaluation.kept_mass import kept_mass
from loki_attention.evaluation.variant import Variant
from loki_attention.integrations.huggingface.observe import Observation, observe
from loki_attention.methods import METHOD_NAMES, method_class
from loki_attention.methods.exact_topk import ExactTopK
from models import BUDGET, random_ids, tiny_basis, tiny_model

DENSE = Variant(name="dense", method="dense", budget=None)
WINDOW = random_ids(1, 120)


def variant_of(name: str, **changes: str) -> Variant:
    kind = method_class(name)
    assert kind is not None
    return Variant(name=name, method=name, budget=BUDGET, basis=tiny_basis() if kind.needs_basis else None, **changes)


def layers_of(variant: Variant, window: torch.Tensor = WINDOW) -> dict[str, dict[str, list[float]]]:
    found = Fidelity(tiny_model(), [window]).measure(0, [DENSE, variant])
    return found[variant.name]["layers"]


def test_exact_top_k_finds_itself() -> None:
    for per in ("kv-head", "query-head"):
        for measures in layers_of(variant_of("exact-topk", per=per)).values():
            for name in ("relative_mass", "set_recall", "jaccard"):
                assert measures[name] == pytest.approx([1, 1])


@pytest.mark.parametrize("name", ["loki", "streaming", "paper-loki"])
def test_measures_equal_plain_loops(name: str) -> None:
    """Of the first sparse layer, whose tensors are dense attention's: of the paper's method that is layer 0."""
    variant, model, layer = variant_of(name), tiny_model(), 0 if name == "paper-loki" else 1
    bound = Variant(
        name="bound",
        method="exact-topk",
        budget=Budget(tokens=24, sinks=0, recent=0) if name == "paper-loki" else BUDGET,
        per="query-head" if name == "paper-loki" else "kv-head",
        layers={layer: "sparse"},
    )
    seen: dict[int, Observation] = {}
    with torch.inference_mode(), observe(model, lambda o: seen.update({o.layer: o})):
        model(WINDOW, use_cache=False)
    ours, theirs = slots_of(variant, layer), slots_of(bound, layer)
    expected = {measure: [0.0, 0.0] for measure in ("kept_mass", "relative_mass", "set_recall", "jaccard")}
    for (group, row), mine in ours.items():
        sets = max(group for group, _ in ours) + 1
        best, part = theirs[group, row], 1 / 60 / (sets // 2)
        kept, most = (
            mass_on(seen[layer], slots, range(group * 4 // sets, (group + 1) * 4 // sets), row)
            for slots in (mine, best)
        )
        values = (kept, kept / most, len(mine & best) / len(best), len(mine & best) / len(mine | best))
        for measure, value in zip(expected, values, strict=True):
            expected[measure][group * 2 // sets] += value * part
    measures = layers_of(variant)[str(layer)]
    for measure, values in expected.items():
        assert measures[measure] == pytest.approx(values), measure


def slots_of(variant: Variant, layer: int) -> dict[tuple[int, int], set[int]]:
    """The slots that each set and row of the window's second half attends."""
    with torch.inference_mode(), variant.attach(tiny_model()) as attached:
        with attached.continuation(60), attached.trace() as trace:
            tiny_model()(WINDOW)
    indices = trace[0][layer][0]
    return {(s, row): set(indices[s, row].tolist()) - {-1} for s in range(len(indices)) for row in range(60, 120)}


def mass_on(seen: Observation, slots: set[int], heads: range, row: int) -> float:
    """Attention mass on the slots, mean over query heads."""
    total = 0.0
    for head in heads:
        scores = seen.scale * seen.keys[0, head // 2, : row + 1] @ seen.query[0, head, row]
        total += float(scores.softmax(-1)[sorted(slots)].sum()) / len(heads)
    return total


def test_the_output_error_is_the_relative_norm() -> None:
    variant, seen = variant_of("streaming"), {}
    with torch.inference_mode(), observe(tiny_model(), lambda o: seen.update({o.layer: o})):
        tiny_model()(WINDOW, use_cache=False)
    layer, slots, errors = seen[1], slots_of(variant, 1), torch.zeros(4, dtype=torch.float64)
    for head in range(4):
        for row in range(60, 120):
            keys, values = (tensor[0, head // 2, : row + 1] for tensor in (layer.keys, layer.values))
            scores = layer.scale * keys @ layer.query[0, head, row]
            chosen = sorted(slots[head // 2, row])
            dense, sparse = scores.softmax(-1) @ values, scores[chosen].softmax(-1) @ values[chosen]
            errors[head] += (sparse - dense).norm() / dense.norm() / 60
    assert layers_of(variant)["1"]["output_error"] == pytest.approx(errors.view(2, 2).mean(1).tolist())


def test_kept_mass_is_calibrations() -> None:
    basis = tiny_basis()
    encoders = {"mine": {i: basis.encoder(i) for i in basis.layers}}
    mass = kept_mass(tiny_model(), [WINDOW], encoders, BUDGET)
    for layer, measures in layers_of(variant_of("loki", tail="none")).items():
        assert measures["kept_mass"] == pytest.approx(mass[int(layer)]["mine"].tolist())


def test_a_tail_lowers_the_output_error_and_leaves_the_set() -> None:
    plain, linear = (layers_of(variant_of("loki", tail=tail), random_ids(1, 240)) for tail in ("none", "linear"))
    for layer in plain:
        assert plain[layer]["jaccard"] == linear[layer]["jaccard"]
        assert plain[layer]["output_error"] != linear[layer]["output_error"]


def test_methods_measured_together_are_measured_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods share exact top-k's slots only where K, sets and forced tokens are the same."""
    variants = [
        variant_of("loki"),
        variant_of("streaming"),
        replace(variant_of("streaming"), name="per query head", per="query-head"),
        replace(variant_of("streaming"), name="fewer", budget=replace(BUDGET, tokens=20)),
        replace(variant_of("streaming"), name="no sinks", budget=replace(BUDGET, sinks=0)),
        variant_of("paper-loki"),
    ]
    alone = [layers_of(variant) for variant in variants]
    chosen, original = [], ExactTopK.choose
    monkeypatch.setattr(ExactTopK, "choose", lambda self, step: chosen.append(self) or original(self, step))
    together = Fidelity(tiny_model(), [WINDOW]).measure(0, [DENSE, *variants])
    assert [together[variant.name]["layers"] for variant in variants] == alone
    # Two layers with five bounds, and layer 0, where the paper's method alone is sparse.
    assert len(chosen) == 2 * 5 + 1


def test_every_method_has_scores() -> None:
    task = Fidelity(tiny_model(), [WINDOW, random_ids(1, 90, seed=5)])
    variants = [DENSE, *(variant_of(name) for name in METHOD_NAMES if name != "dense")]
    outcomes = [task.measure(i, variants) for i in range(2)]
    for variant in variants:
        found = task.scores([o[variant.name] for o in outcomes], [o["dense"] for o in outcomes])
        names = {score.metric for score in found}
        assert {"kl_from_dense", "next_token_agreement"} <= names
        assert all(score.n == len(score.items or ()) == 2 for score in found)
        if variant.method == "loki":
            heads = next(s for s in found if s.metric == "jaccard" and s.config["layer"] == "1")
            numbers = [float(number) for number in str(heads.config["by_head"]).split()]
            assert sum(numbers) / len(numbers) == pytest.approx(heads.value, abs=1e-4)
        if variant.method == "pca-attn":
            assert "output_error" in names and "set_recall" not in names
        if variant is DENSE:
            assert len(found) == 2
