"""What a basis must match, and how a fingerprint tells a change of dtype from a change of weights."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from helpers import FakeModel, noise
from loki_attention.core.spec import Fingerprint, ModelSpec
from loki_attention.errors import ArtifactError, MismatchError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def spec_of(**config: object) -> ModelSpec:
    return ModelSpec.of(FakeModel(**config))  # type: ignore[arg-type]


def fingerprint(*weights: Tensor) -> Fingerprint:
    return Fingerprint.of((f"layers.{i}", weight) for i, weight in enumerate(weights))


def test_reads_the_config() -> None:
    spec = spec_of(layer_types=["sliding_attention", "full_attention", "full_attention"])
    assert (spec.model_id, spec.architecture) == ("tiny", "FakeModel")
    assert (spec.depth, spec.layers) == (3, (1, 2))
    assert (spec.heads, spec.kv_heads, spec.group_size, spec.head_dim) == (4, 2, 2, 16)
    assert (spec.max_length, spec.vocabulary) == (2048, 211)
    assert spec.rope == {"rope_type": "default", "rope_theta": 10000.0}


def test_defaults_where_the_config_is_silent() -> None:
    spec = spec_of(num_key_value_heads=None, head_dim=None, rope_parameters=None, name_or_path="")
    assert (spec.layers, spec.kv_heads, spec.group_size, spec.head_dim) == ((0, 1, 2), 4, 1, 16)
    assert (spec.rope, spec.model_id) == ({}, "fake")


def test_reads_the_text_config_of_a_larger_model() -> None:
    model = FakeModel()
    inner = model.config
    model.config = SimpleNamespace(get_text_config=lambda: inner)
    assert ModelSpec.of(model) == ModelSpec.of(FakeModel())


def test_survives_json() -> None:
    spec = spec_of(rope_parameters={"rope_type": "yarn", "factor": 4, "betas": (1, 32)})
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_a_change_of_dtype_is_the_same_model(first: torch.dtype, second: torch.dtype) -> None:
    weights = 0.02 * noise(20, 30, 40, seed=0).float()
    ours, theirs = (fingerprint(*weights.to(dtype)) for dtype in (first, second))
    assert ours.matches(theirs)
    assert theirs.matches(ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [1e-2, 3e-3])
def test_a_fine_tune_is_another_model(dtype: torch.dtype, change: float) -> None:
    """Weights moved by less than a hundredth of their size, in the type they are held in."""
    weights = 0.02 * noise(20, 30, 40, seed=0)
    tuned = weights * (1 + change * noise(20, 30, 40, seed=1))
    assert not fingerprint(*weights.to(dtype)).matches(fingerprint(*tuned.to(dtype)))


def test_a_tuned_layer_is_enough() -> None:
    weights = 0.02 * noise(20, 30, 40, seed=0).float()
    tuned = weights.clone()
    tuned[7] += 1e-4
    assert not fingerprint(*weights).matches(fingerprint(*tuned))


def test_a_fine_tune_larger_than_the_rounding_shows_in_another_dtype() -> None:
    weights = 0.02 * noise(20, 30, 40, seed=0).float()
    tuned = weights * (1 + 0.03 * noise(20, 30, 40, seed=1).float())
    assert not fingerprint(*weights).matches(fingerprint(*tuned.bfloat16()))


def test_a_few_strays_are_let_pass() -> None:
    weights = 0.02 * noise(1, 25, 40, seed=0).float()
    strayed = weights.clone()
    strayed[0, 0, :5] += 1
    assert fingerprint(*weights).matches(fingerprint(*strayed))
    strayed[0, 0, :6] += 1
    assert not fingerprint(*weights).matches(fingerprint(*strayed))


def test_other_numbers_of_samples_never_match() -> None:
    weights = 0.02 * noise(20, 30, 40, seed=0).float()
    assert not fingerprint(*weights).matches(fingerprint(*weights[:3]))


def test_only_matrices_count_in_the_order_of_their_names() -> None:
    first, second = noise(3, 4, seed=0).float(), noise(3, 4, seed=1).float()
    plain = Fingerprint.of([("a", first), ("b", second)])
    extra = [("c", torch.ones(5)), ("d", torch.ones(2, 2, dtype=torch.int8))]
    assert Fingerprint.of([("b", second), *extra, ("a", first)]) == plain


def test_weights_without_data_are_no_fingerprint_and_say_so() -> None:
    model = FakeModel().to("meta")
    spec = ModelSpec.of(model)
    assert spec.fingerprint.values == ()
    with pytest.raises(MismatchError, match="not in memory"):
        spec_of().check_serves(spec)
    spec_of().check_serves(spec, other_weights=True)


def test_about_a_thousand_values_of_many_matrices() -> None:
    for count in (1, 7, 225, 1000, 5000):
        shared = torch.ones(4, 4)
        values = Fingerprint.of((f"{i:05}", shared) for i in range(count)).values
        assert 500 < len(values) <= 1000


def test_no_weights_at_all() -> None:
    assert Fingerprint.of([]).matches(Fingerprint.of([]))


def test_large_vocabularies_are_sampled_within_bounds() -> None:
    """128256 x 4096 weights: more than float32 can count. No memory is taken: every entry is the same one."""
    embedding = torch.full((1,), 0.5).expand(128256, 4096)
    assert set(Fingerprint.of([("embed", embedding)]).values) == {0.5}


def test_the_first_and_the_last_weight_are_sampled() -> None:
    weight = torch.zeros(100, 100)
    weight[0, 0], weight[-1, -1] = 1.0, 2.0
    values = Fingerprint.of([("a", weight)]).values
    assert (values[0], values[-1]) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"num_hidden_layers": 4}, "with depth 3 where this model has 4"),
        ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, r"with layers \(0, 1, 2\) where"),
        ({"num_attention_heads": 8}, "with heads 4 where this model has 8"),
        ({"num_key_value_heads": 4}, "with kv heads 2 where this model has 4"),
        ({"head_dim": 32}, "with head dim 16 where this model has 32"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "other RoPE parameters"),
        ({"seed": 1}, "other weights of the same architecture"),
    ],
)
def test_a_mismatch_is_refused_by_name(config: dict[str, object], what: str) -> None:
    spec = spec_of()
    with pytest.raises(MismatchError, match=what) as raised:
        spec.check_serves(spec_of(**config))
    assert isinstance(raised.value, ArtifactError)


def test_another_architecture_is_refused_by_name() -> None:
    other = type("OtherModel", (FakeModel,), {})
    with pytest.raises(MismatchError, match="with architecture FakeModel where this model has OtherModel"):
        spec_of().check_serves(ModelSpec.of(other()))


def test_other_weights_pass_on_request_and_another_layout_does_not() -> None:
    spec = spec_of()
    spec.check_serves(spec_of(seed=1), other_weights=True)
    with pytest.raises(MismatchError, match="head dim"):
        spec.check_serves(spec_of(seed=1, head_dim=32), other_weights=True)


def test_what_a_basis_does_not_depend_on_may_differ() -> None:
    spec_of().check_serves(spec_of(name_or_path="elsewhere/copy", max_position_embeddings=99, vocab_size=7))
