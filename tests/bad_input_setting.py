"""What the wrong inputs of ``bad_inputs.py`` name: models, a basis, texts, damaged folders; and how an input is run."""

import json
import shlex
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
)
from transformers.cache_utils import QuantizedCache

from command_line import error_line, run, write_model
from loki_attention import Budget, KeyBasis, LokiError, Planes, attach, calibrate
from loki_attention.data import sample_texts
from models import basis_of, random_ids

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = TINY | {"num_key_value_heads": 2, "head_dim": 16}
MLA = GROUPED | {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
}


def make_folders() -> None:
    """Write everything that the inputs name into the working directory."""
    model = AutoModelForCausalLM.from_pretrained(write_model(Path("my-model")), dtype=torch.float32)
    write_model(Path("fine-tuned"), seed=1)
    basis = basis_of(model)
    basis.save("my-basis")
    _make_damaged_bases()
    AutoConfig.for_model("deepseek_v3", **MLA).save_pretrained("deepseek")
    _model("qwen3", GROUPED).save_pretrained("qwen")
    AutoTokenizer.from_pretrained("my-model").save_pretrained("qwen")
    shutil.copytree("my-model", "no-tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree("my-model", "no-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    text = sample_texts()[0].read_text(encoding="utf-8")
    Path("book.txt").write_text(text[:20000], encoding="utf-8")
    Path("prompt.txt").write_text(text[:200], encoding="utf-8")
    Path("short.txt").write_text("Call me Ishmael.", encoding="utf-8")
    Path("empty.txt").touch()
    Path("latin1.txt").write_bytes("Käse".encode("latin-1"))
    Path("table.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    Path("notes.jsonl").write_text('{"title": "Moby Dick", "year": 1851}\n', encoding="utf-8")
    Path("pictures").mkdir()
    Path("pictures/whale.png").write_bytes(b"\x89PNG")
    for folder, fields in (
        ("unknown-model", {}),
        ("code-model", {"auto_map": {"AutoModelForCausalLM": "model.Model"}}),
    ):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(json.dumps({"model_type": "nonesuch", **fields}), encoding="utf-8")


def namespace() -> dict[str, Any]:
    """The names that inputs in Python use."""
    model = AutoModelForCausalLM.from_pretrained("my-model", dtype=torch.float32).eval()
    basis = KeyBasis.load("my-basis", model=model)
    weights_wanted, flash = _model("llama", GROUPED), _model("llama", GROUPED)
    weights_wanted.set_attn_implementation("eager")
    weights_wanted.config.output_attentions = True
    flash.config._attn_implementation = "flash_attention_2"
    multi_query = _model("llama", GROUPED | {"num_key_value_heads": 1})
    cache = DynamicCache(config=multi_query.config)
    with torch.inference_mode():
        multi_query(random_ids(1, 5) % 64, past_key_values=cache)
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True  # Made as a user would, it asks CUDA for a stream.
    both_ways = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    both_ways[..., 8:, :2] = False
    padded_right = torch.ones(1, 10, dtype=torch.long)
    padded_right[:, 8:] = 0
    return {
        "model": model,
        "tokenizer": AutoTokenizer.from_pretrained("my-model"),
        "basis": basis,
        "without_moments": replace(basis, moments=None),
        "ids": random_ids(1, 10) % 64,
        "qwen": _model("qwen3", GROUPED),
        "deeper": AutoModelForCausalLM.from_config(_changed(model.config, num_hidden_layers=4)),
        "fine_tuned": AutoModelForCausalLM.from_pretrained("fine-tuned", dtype=torch.float32).eval(),
        "flash": flash,
        "weights_wanted": weights_wanted,
        "deepseek": _model("deepseek_v3", MLA),
        "bloom": _model("bloom"),
        "t5": AutoModelForSeq2SeqLM.from_config(
            AutoConfig.for_model("t5", d_model=16, d_ff=16, num_layers=1, num_heads=2)
        ),
        "gptj": _model("gptj", TINY | {"rotary_dim": 8}),
        "falcon": _model("falcon"),
        "sliding": _model("mistral", GROUPED | {"sliding_window": 64}),
        "phi": _model("phi"),
        "quantized_cache": QuantizedCache.__new__(QuantizedCache),
        "offloaded_cache": offloaded,
        "sliding_cache": DynamicCache(config=AutoConfig.for_model("mistral", **GROUPED, sliding_window=64)),
        "cache_of_another_model": cache,
        "both_ways": both_ways,
        "padded_right": padded_right,
        **{kind.__name__: kind for kind in (Budget, KeyBasis, Path, Planes, StaticCache, attach, calibrate)},
        "torch": torch,
    }


def answer(shown: str, names: dict[str, Any]) -> tuple[str, str]:
    """The kind of error that an input gets, and its sentence; as users meet them, without the tests' check of types."""
    config.update("jaxtyping_disable", True)
    try:
        return _of_command(shown) if "loki " in shown else _of_python(shown, names)
    finally:
        config.update("jaxtyping_disable", False)


def _of_command(shown: str) -> tuple[str, str]:
    """A command line, with variables of the environment in front where it has some."""
    words = shlex.split(shown)
    start = words.index("loki")
    result = run(*words[start + 1 :], env=dict(word.split("=") for word in words[:start]))
    return "error", error_line(result).removeprefix("error: ")


def _of_python(shown: str, names: dict[str, Any]) -> tuple[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(shown, dict(names))
        except LokiError as error:
            return type(error).__name__, str(error)
    return "none", "nothing was refused"


def _model(kind: str, settings: dict[str, Any] = TINY) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()


def _changed(config: Any, **changes: Any) -> Any:
    return type(config)(**{**config.to_dict(), **changes})


def _make_damaged_bases() -> None:
    for name in ("future-basis", "truncated-basis", "edited-basis", "garbled-basis"):
        shutil.copytree("my-basis", name)
    manifest = Path("my-basis/manifest.json").read_text(encoding="utf-8")
    Path("future-basis/manifest.json").write_text(manifest.replace('"format_version": 1', '"format_version": 9'))
    Path("edited-basis/manifest.json").write_text(manifest.replace('"tail": "linear"', '"tail": "none"'))
    Path("garbled-basis/manifest.json").write_text(manifest[:100])
    tensors = Path("truncated-basis/basis.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-100])
