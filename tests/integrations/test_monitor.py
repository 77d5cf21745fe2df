"""What a running attachment says of its own quality: estimates at every step, exact checks every n-th."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from loki_attention import Attached, Budget, LokiError, LokiWarning, attach
from loki_attention.integrations.huggingface.observe import observe
from models import random_ids, tiny_basis, tiny_model

BUDGET = Budget(tokens=60, sinks=2, recent=4)


@torch.inference_mode()
def decode(model: PreTrainedModel, ids: Tensor, prompt: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids[:, :prompt], past_key_values=cache)
    for t in range(prompt, ids.shape[1]):
        model(ids[:, t : t + 1], past_key_values=cache)
    return cache


def checks_of(handle: Attached) -> list:
    return handle._host.monitor._checks  # type: ignore[union-attr]


def test_every_nth_step_is_checked_on_one_layer_in_turn() -> None:
    model = tiny_model()
    with attach(model, tiny_basis(), budget=BUDGET, monitor_every=3) as handle:
        assert handle.report().monitor is None
        decode(model, random_ids(2, 213), 200)
        checks = checks_of(handle)
        report = handle.report().monitor
    assert [(check.layer, check.tokens) for check in checks] == [(1, 203), (2, 206), (1, 209), (2, 212)]
    assert report is not None
    assert report.checks == 4
    assert report.lowest_mass.worst_mass == min(check.worst_mass for check in checks)
    assert report.mean_error == pytest.approx(sum(check.mean_error for check in checks) / 4)


@pytest.mark.parametrize("tail", ["none", "linear"])
def test_a_check_is_exact(tail: str) -> None:
    """Mass and error of one step, computed from the model's own queries, keys and values."""
    model, ids, layer = tiny_model(), random_ids(1, 201, seed=2), 1
    seen, outputs = {}, {}
    with torch.inference_mode(), observe(model, lambda one: seen.update({one.layer: one})):
        model(ids, use_cache=False)
    one = seen[layer]
    # Layer 2 stays dense: nothing before layer 1 differs from the dense model.
    with attach(model, tiny_basis(), budget=BUDGET, tail=tail, layers={2: "dense"}, monitor_every=1) as handle:
        hook = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: outputs.update(sparse=args[0])
        )
        with handle.trace() as trace:
            decode(model, ids, 200)
        hook.remove()
        (check,) = checks_of(handle)
    masses, dense = [], []
    for head in range(4):
        weights = (one.scale * one.keys[0, head // 2] @ one.query[0, head, -1]).softmax(0)
        masses.append(float(weights[trace[-1][layer][0, head // 2, 0]].sum()))
        dense.append(weights @ one.values[0, head // 2])
    expected = torch.cat(dense)
    error = float((outputs["sparse"].flatten() - expected).norm() / expected.norm())
    assert (check.layer, check.tokens) == (layer, 201)
    assert check.mean_mass == pytest.approx(sum(masses) / 4, abs=1e-9)
    assert check.worst_mass == pytest.approx(min(masses), abs=1e-9)
    assert check.mean_error == pytest.approx(error, abs=1e-9)
    assert 0 < check.worst_mass < 1
    assert check.mean_error > 1e-3


def test_the_tails_own_estimate_is_near_the_measured_mass() -> None:
    model = tiny_model()
    with attach(model, tiny_basis(planes="16@8"), budget=BUDGET, tail="linear", monitor_every=1) as handle:
        decode(model, random_ids(2, 230, seed=3), 200)
        report = handle.report()
        masses = {i: [c.mean_mass for c in checks_of(handle) if c.layer == i] for i in (1, 2)}
    for layer in report.layers[1:]:
        assert layer.mean_mass is not None
        assert layer.worst_mass is not None
        assert layer.worst_mass <= layer.mean_mass
        assert layer.mean_mass == pytest.approx(sum(masses[layer.layer]) / len(masses[layer.layer]), abs=0.05)
    assert report.layers[0].mean_mass is None
    assert report.to_dict()["layers"][1]["mean_mass"] == report.layers[1].mean_mass


def test_without_a_tail_there_is_no_estimate() -> None:
    model = tiny_model()
    with attach(model, tiny_basis(), budget=BUDGET, tail="none") as handle:
        decode(model, random_ids(1, 205), 200)
        assert all(layer.mean_mass is None for layer in handle.report().layers)


def test_little_mass_warns_once_a_layer() -> None:
    model = tiny_model()
    with attach(model, tiny_basis(), budget=BUDGET, monitor_every=1, on_low_mass=(0.999, "warn")) as handle:
        with pytest.warns(LokiWarning, match=r"less than the 99.9% asked for; raise the budget") as caught:
            decode(model, random_ids(1, 210), 200)
        assert handle.report().monitor.layers_gone_dense == ()  # type: ignore[union-attr]
    assert len(caught) == 2
    assert "layer 1 kept" in str(caught[0].message)


def test_little_mass_can_leave_a_layer_dense() -> None:
    model = tiny_model()
    with attach(model, tiny_basis(), budget=BUDGET, monitor_every=1, on_low_mass=(0.999, "dense")) as handle:
        with pytest.warns(LokiWarning, match="it stays dense from here on"):
            decode(model, random_ids(1, 210), 200)
        report = handle.report()
    assert report.monitor is not None
    assert report.monitor.layers_gone_dense == (1, 2)
    assert report.layers[1].dense_steps["kept too little mass"] == 9
    assert report.layers[2].dense_steps["kept too little mass"] == 8
    assert "dense from then on: layers [1, 2]" in str(report)


def test_enough_mass_is_left_alone() -> None:
    model = tiny_model()
    with attach(model, tiny_basis(), budget=BUDGET, monitor_every=1, on_low_mass=(0.001, "dense")) as handle:
        decode(model, random_ids(1, 206), 200)
        assert handle.report().layers[1].sparse_steps == 6


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"monitor_every": 0}, "monitor_every must be a whole number of decode steps, at least 1; got 0"),
        ({"on_low_mass": (0.5, "warn")}, "give monitor_every too"),
        ({"monitor_every": 4, "on_low_mass": (1.5, "warn")}, r"a mass between 0 and 1 .*got \(1.5, 'warn'\)"),
        ({"monitor_every": 4, "on_low_mass": (0.5, "stop")}, "'warn' or 'dense'"),
        ({"monitor_every": 4, "on_low_mass": 0.5}, "got 0.5"),
    ],
)
def test_misuse_is_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(LokiError, match=sentence):
        attach(tiny_model(), tiny_basis(), **settings)
