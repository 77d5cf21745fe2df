"""``KeyBasis``: the model it belongs to, and what can be fitted again from its moments."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import FakeModel, random_basis
from key_bases import LAYERS, SHAPE, assert_same, make_basis
from loki_attention.core.basis import KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.core.candidates import CANDIDATES, TENSOR_FIELDS
from loki_attention.core.planes import Planes
from loki_attention.errors import ArgumentError, MismatchError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a saved basis."""
    return make_basis().save(tmp_path / "basis")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"num_hidden_layers": 4}, "depth"),
        ({"num_attention_heads": 8}, "heads"),
        ({"num_key_value_heads": 1}, "kv heads"),
        ({"head_dim": 32}, "head dim"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "RoPE"),
        ({"seed": 1}, "other weights"),
    ],
)
def test_another_model(saved: Path, config: dict[str, Any], what: str) -> None:
    model = FakeModel(**config)
    assert_same(KeyBasis.load(saved), make_basis())
    with pytest.raises(MismatchError, match=what):
        KeyBasis.load(saved, model)


def test_another_architecture(saved: Path) -> None:
    other = type("OtherModel", (FakeModel,), {})()
    with pytest.raises(MismatchError, match="architecture FakeModel where this model has OtherModel"):
        KeyBasis.load(saved, other)


def test_other_weights_pass_on_request(saved: Path) -> None:
    assert_same(KeyBasis.load(saved, FakeModel(seed=1), other_weights=True), make_basis())
    with pytest.raises(MismatchError, match="head dim"):
        KeyBasis.load(saved, FakeModel(seed=1, head_dim=32), other_weights=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_change_of_dtype_is_the_same_model(saved: Path, dtype: torch.dtype) -> None:
    assert_same(KeyBasis.load(saved, FakeModel().to(dtype)), make_basis())


def test_a_small_fine_tune_is_caught(saved: Path) -> None:
    tuned = FakeModel()
    with torch.no_grad():
        for weight in tuned.query.parameters():
            weight.mul_(1.001)
    with pytest.raises(MismatchError, match="a fine-tune"):
        KeyBasis.load(saved, tuned)


def test_moments_are_optional(saved: Path) -> None:
    (saved / "moments.safetensors").unlink()
    loaded = KeyBasis.load(saved)
    assert loaded.moments is None
    assert_same(loaded, make_basis())
    with pytest.raises(ArgumentError, match="holds balanced and has no moments beside it to fit pca-post from"):
        loaded.refit(candidate="pca-post")
    assert str(loaded.refit(planes="16@2").planes) == "16@2"


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_refit_of_another_candidate_needs_no_text(saved: Path, candidate: str) -> None:
    refitted = KeyBasis.load(saved).refit(candidate=candidate)
    assert refitted.candidate == candidate
    for i in LAYERS:
        expected = random_basis(SHAPE, candidate, seed=i)
        assert all(torch.equal(getattr(refitted.layers[i], name), getattr(expected, name)) for name in TENSOR_FIELDS)
    assert (refitted.planes, refitted.budget, refitted.tail) == (Planes.parse("8@4"), make_basis().budget, "linear")


def test_refit_of_planes_and_budget_drops_the_figures() -> None:
    refitted = make_basis().refit(planes="16@2", budget=Budget(tokens=100))
    assert (str(refitted.planes), refitted.budget) == ("16@2", Budget(tokens=100))
    assert dict(refitted.record) == {"length": 2048}
    assert refitted.layers is not None
    assert refitted.candidate == "balanced"


def test_a_refitted_basis_saves_and_loads(saved: Path, tmp_path: Path) -> None:
    refitted = KeyBasis.load(saved).refit(candidate="pca-pre", planes="8@4", budget=Budget(tokens=64))
    assert_same(KeyBasis.load(refitted.save(tmp_path / "refit"), FakeModel()), refitted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"candidate": "pca"}, "unknown candidate 'pca'; known: pca-pre, pca-post, balanced"),
        ({"planes": "lots"}, "outside the grammar"),
        ({"planes": "24@4"}, "head dim is 16"),
    ],
)
def test_refit_refuses(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_basis().refit(**fields)


def test_principal_takes_the_pca_of_lower_loss() -> None:
    assert make_basis().principal().candidate == "pca-post"
    assert make_basis(record={}).principal().candidate == "pca-pre"


@pytest.mark.parametrize("candidate", ["pca-pre", "pca-post"])
def test_principal_of_pca_is_itself(candidate: str) -> None:
    basis = make_basis().refit(candidate=candidate)
    assert basis.principal() is basis


def test_principal_without_moments() -> None:
    with pytest.raises(ArgumentError, match="no moments beside it"):
        make_basis(moments=None).principal()


def test_encoder_of_a_layer_uses_the_basis_planes_or_others() -> None:
    basis = make_basis()
    assert str(basis.encoder(1).planes) == "8@4"
    assert str(basis.encoder(1, Planes.parse("16@2")).planes) == "16@2"
    assert torch.equal(basis.encoder(1).mean, basis.layers[1].mean)
