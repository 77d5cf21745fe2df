"""Models that accelerate places or offloads: attached as others are, and known by their weights wherever those lie."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from loki_attention import Budget, KeyBasis, LokiWarning, attach
from loki_attention.core.spec import ModelSpec
from models import BUDGET, random_ids, tiny_basis, tiny_model

CPU = torch.device("cpu")
ON_DISK = "model.layers.1"


def load(path: Path, **settings: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **settings).eval()


def automatic(path: Path) -> PreTrainedModel:
    return load(path, device_map="auto")


def named(path: Path) -> PreTrainedModel:
    return load(path, device_map={"": "cpu"})


def offloaded(path: Path) -> PreTrainedModel:
    """All weights kept aside, each moved in for its own forward."""
    model = load(path)
    cpu_offload(model, execution_device=CPU)
    assert all(weight.is_meta for weight in model.parameters())
    return model


def partly_on_disk(path: Path) -> PreTrainedModel:
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(parts, "cpu"), ON_DISK: "disk"}
    model = load(path, device_map=places, offload_folder=path / "offloaded")
    assert {weight.is_meta for weight in model.parameters()} == {True, False}
    return model


PLACED = (automatic, named, offloaded, partly_on_disk)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placed") / "model"
    tiny_model().save_pretrained(path)
    tiny_basis().save(path / "basis")
    return path


def generate(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    ids = random_ids(2, 220, seed=11)
    settings = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


# transformers 5.17 takes weights that accelerate keeps aside for a model on another device.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("place", PLACED)
def test_a_placed_model_answers_as_a_plain_one(place: Callable[[Path], PreTrainedModel], folder: Path) -> None:
    plain, placed = tiny_model(), place(folder)
    basis = KeyBasis.load(folder / "basis", model=placed)
    dense, _ = generate(plain)
    assert min(len(set(row.tolist())) for row in dense) >= 8, "the model repeats itself: equality would show nothing"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LokiWarning)
        with attach(placed, basis, budget=Budget(tokens=1000)):
            assert torch.equal(generate(placed)[0], dense)
    answers = []
    for model in (plain, placed):
        with attach(model, basis, budget=BUDGET, tail="linear") as handle:
            answers.append(generate(model)[1])
            assert handle.report().sparse_steps > 0
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("place", PLACED)
def test_a_placed_model_has_the_fingerprint_of_a_plain_one(
    place: Callable[[Path], PreTrainedModel], folder: Path
) -> None:
    ours, plain = ModelSpec.of(place(folder)).fingerprint, ModelSpec.of(tiny_model()).fingerprint
    assert ours == plain
    assert not ours.matches(ModelSpec.of(tiny_model(seed=1)).fingerprint)
