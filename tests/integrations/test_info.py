"""``loki info``: what would happen to a model, by its configuration alone, is what attaching does and costs."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from command_line import error_line, run
from loki_attention import KeyBasis, LokiError, attach
from loki_attention.cli.info import _size
from loki_attention.errors import ArgumentError, MismatchError, ModelError
from loki_attention.integrations.huggingface.families import FAMILIES
from loki_attention.integrations.huggingface.info import DENSE, LEFT_ALONE, SPARSE, ModelInfo, machine_info, model_info
from loki_attention.integrations.huggingface.loading import load_config
from loki_attention.kernels.ops import choose_backend
from models import BUDGET, random_ids, tiny_basis, tiny_model

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 211, "head_dim": 16}
GROUPED = {**TINY, "num_key_value_heads": 2, "max_position_embeddings": 2048}


def folder(path: Path, kind: str, **settings: object) -> Path:
    """A folder that holds nothing but a tiny model's configuration."""
    AutoConfig.for_model(kind, **settings).save_pretrained(path / kind)
    assert [file.name for file in (path / kind).iterdir()] == ["config.json"]
    return path / kind


def modes(info: ModelInfo) -> list[str]:
    assert [layer.layer for layer in info.layers] == list(range(len(info.layers)))
    return [layer.action for layer in info.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_those_that_attaching_makes_sparse(family: str) -> None:
    model = tiny_model(family)
    info = model_info(model.config)
    with attach(model, method="exact-topk", budget=BUDGET) as handle:
        report = handle.report()
    assert info.sparse_layers == report.sparse_layers
    assert tuple(one.layer for one in info.layers if one.action == DENSE) == report.dense_layers
    assert {one.layer: one.kind for one in info.layers if one.action == LEFT_ALONE} == report.other_layers
    assert info.implementations == FAMILIES[family].implementations
    assert info.architecture == type(model).__name__


@pytest.mark.parametrize("tail", ["none", "mean", "linear"])
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("gemma3_text", torch.float32)])
def test_bytes_are_those_of_an_attached_models_cache(family: str, dtype: torch.dtype, tail: str) -> None:
    model, basis, length = tiny_model(family, dtype=dtype), tiny_basis(family, tail=tail), 150
    config = copy.deepcopy(model.config)
    config.dtype = dtype  # Moving a model to a dtype leaves its configuration as it was.
    info = model_info(config, basis=basis, context_tokens=length)
    sparse = len(info.sparse_layers)
    with torch.inference_mode(), attach(model, basis) as handle:
        cache = model(random_ids(1, length - 1)).past_key_values
        model(random_ids(1, 1), past_key_values=cache)
        memory, full_layers = handle.report().memory, len(handle.report().layers)
    assert info.dtype == str(dtype).removeprefix("torch.")
    assert memory.cache == full_layers * memory.capacity * info.kv_bytes
    # Native kernels keep whole tiles of tokens.
    assert 0 <= memory.twins / (sparse * info.twin_bytes) - memory.capacity < 64
    assert memory.sums == sparse * info.sum_bytes
    totals = info.to_dict()["sparse_layer_bytes"]
    assert totals["per_token"] == {"kv": sparse * info.kv_bytes, "twins": sparse * info.twin_bytes}
    assert totals["context"]["twins"] == length * totals["per_token"]["twins"]
    assert totals["context"]["sums"] == memory.sums


def test_llama_by_hand(tmp_path: Path) -> None:
    info = model_info(load_config(str(folder(tmp_path, "llama", num_hidden_layers=4, dtype="bfloat16", **GROUPED))))
    assert modes(info) == [DENSE, SPARSE, SPARSE, SPARSE]
    assert [layer.reason for layer in info.layers[:2]] == ["attends diffusely", "sees the whole context"]
    assert (info.heads, info.kv_heads, info.head_dim, info.dtype) == (4, 2, 16, "bfloat16")
    assert (info.planes, info.tail, info.context_tokens) == ("8@4", "linear", 2048)
    # Two heads: 16 dims of K and of V in 2 bytes, 8 dims in 4 bits; sums of v, of 4 dims of e, of their products.
    assert (info.kv_bytes, info.twin_bytes) == (2 * 2 * 16 * 2, 2 * 4)
    assert info.sum_bytes == 4 * (1 + 2 * (16 + 4 + 4 * 16))


def test_layers_of_other_kinds_are_left_alone_with_their_names(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    path = folder(tmp_path, "gemma3_text", num_hidden_layers=4, layer_types=kinds, **GROUPED)
    info = model_info(load_config(str(path)))
    assert modes(info) == [LEFT_ALONE, SPARSE, LEFT_ALONE, SPARSE]
    assert [layer.kind for layer in info.layers] == kinds
    assert info.dtype is None
    assert info.kv_bytes == 2 * 2 * 16 * 4, "without a dtype bytes are float32's"


def test_a_basis_says_what_calibration_left_dense(tmp_path: Path) -> None:
    basis = replace(tiny_basis(tail="mean"), dense_layers=(2,))
    config = tiny_model().config
    info = model_info(config, basis=basis)
    assert modes(info) == [DENSE, SPARSE, DENSE]
    assert info.layers[2].reason == "marked by calibration"
    assert (info.planes, info.tail) == (str(basis.planes), "mean")
    assert model_info(config, basis=basis, planes="16@2").planes == "16@2"
    with pytest.raises(MismatchError, match="with architecture LlamaForCausalLM where this model has Qwen3ForCausalLM"):
        model_info(tiny_model("qwen3").config, basis=basis)


REFUSED = {
    "deepseek_v3": ({}, r"latent attention \(MLA\)"),
    "bloom": ({}, "ALiBi"),
    "t5": ({}, "encoder-decoder"),
    "gptj": ({}, "GPTJForCausalLM does not call transformers' attention interface"),
    "falcon": ({}, "FalconForCausalLM does not call transformers' attention interface"),
    "mistral": ({"sliding_window": 64, **GROUPED}, "no full-attention layer"),
    "bert": ({}, "untested"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_served_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    settings, reason = REFUSED[kind]
    path = folder(tmp_path, kind, **settings)
    with pytest.raises(ModelError, match=f"{kind}.*{reason}") as caught:
        model_info(load_config(str(path)))
    assert error_line(run("info", path)) == f"error: {caught.value}"
    assert error_line(run("info", path, "--json")) == f"error: {caught.value}"


def config_file(path: Path, text: str) -> str:
    (path / "config.json").write_text(text, encoding="utf-8")
    return str(path)


def test_types_that_transformers_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="type 'nonesuch' are not supported: this version of transformers"):
        load_config(config_file(tmp_path, '{"model_type": "nonesuch"}'))
    with pytest.raises(ModelError, match="type 'nonesuch' are not supported: their code comes with the weights"):
        load_config(config_file(tmp_path, '{"model_type": "nonesuch", "auto_map": {"AutoConfig": "c.C"}}'))
    for broken in ("{}", "{", "[]", "7"):
        with pytest.raises(ModelError, match="cannot load a model from") as caught:
            load_config(config_file(tmp_path, broken))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"context_tokens": 0}, "context must be a whole number of tokens, at least 1; got 0"),
        ({"planes": "24@4"}, "24 dims but the head dim is 16"),
        ({"planes": "many"}, "outside the grammar"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        model_info(tiny_model().config, **settings)


def test_a_head_too_small_for_twins_is_refused() -> None:
    config = AutoConfig.for_model("llama", **{**GROUPED, "head_dim": 4})
    with pytest.raises(LokiError, match="head dim of 4 is too small"):
        model_info(config)


def test_the_machine_is_described() -> None:
    machine = machine_info()
    assert machine.backend == choose_backend("auto")
    assert machine.versions["torch"] == torch.__version__
    assert set(machine.versions) == {"loki-attention", "torch", "transformers", "python"}
    assert machine.threads == torch.get_num_threads()
    assert json.loads(json.dumps(machine.to_dict()))["backend"]["reason"]


def test_the_command_prints_layers_bytes_and_machine(tmp_path: Path) -> None:
    path = folder(tmp_path, "llama", num_hidden_layers=6, dtype="bfloat16", **GROUPED)
    result = run("info", path)
    assert result.exit_code == 0
    for shown in (
        "LlamaForCausalLM (llama): 4 query heads, 2 key heads of 16 dims, bfloat16",
        "sdpa, eager",
        "attends diffusely",
        "1-5",
        "a token, 5 sparse layers",
        "2,048 tokens (the model's maximum)",
        "calibration may choose a lighter tail",
        f"backend {choose_backend('auto').name}: {choose_backend('auto').reason}",
        f"torch {torch.__version__}",
        "Triton kernels: ",
        "CPU features: ",
    ):
        assert shown in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    asked = run("info", path, "--context", "4096", "--planes", "16@4")
    assert "4,096 tokens " in asked.stdout and "planes 16@4" in asked.stdout and "maximum" not in asked.stdout


def test_json_holds_what_the_functions_return(tmp_path: Path) -> None:
    config = tiny_model().config
    config.save_pretrained(tmp_path / "model")
    tiny_basis().save(tmp_path / "basis")
    said = json.loads(run("info", tmp_path / "model", "--basis", tmp_path / "basis", "--json").stdout)
    expected = model_info(config, basis=KeyBasis.load(tmp_path / "basis")).to_dict()
    assert said["model"] == json.loads(json.dumps(expected))
    assert set(said["machine"]) == {"backend", "versions", "cpu_features", "isas", "threads", "gpus", "triton"}


def test_sizes_are_whole_bytes_up_to_64_kib() -> None:
    assert [_size(n) for n in (0, 65535, 65536, 2**20, 3 * 2**30)] == [
        "0 B",
        "65,535 B",
        "64.00 KiB",
        "1.00 MiB",
        "3.00 GiB",
    ]
