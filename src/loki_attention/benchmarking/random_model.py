"""Random models of real ones' shapes, and the moments of their keys and queries: what is timed depends on sizes alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loki_attention.core.moments import LayerMoments
from loki_attention.integrations.huggingface.families import causal_model_class
from loki_attention.integrations.huggingface.loading import load_config
from loki_attention.integrations.huggingface.observe import Observation, observe

_WINDOWS, _WINDOW_TOKENS = 2, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A Llama's sizes; by default those of Llama 3.2 1B with a vocabulary of 32000 instead of 128256."""

    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    hidden: int = 2048
    intermediate: int = 8192
    vocabulary: int = 32000

    @property
    def config(self) -> dict[str, Any]:
        """The fields of its config.json."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.heads}/{self.kv_heads}/{self.head_dim}, hidden {self.hidden}"


SMALL_MODEL = ModelShape(layers=2, heads=4, kv_heads=2, head_dim=32, hidden=128, intermediate=256, vocabulary=512)
"""A model of milliseconds, to try the benchmark out."""


def random_model(shape: ModelShape, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A model of this shape with random weights on ``device``, in eval mode."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config), encoding="utf-8")
        config = load_config(folder)
    kind = causal_model_class(config)
    assert kind is not None
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def moments_of(model: Any) -> tuple[dict[int, LayerMoments], dict[int, float]]:
    """Moments of keys and queries on windows of random tokens, and the deviation of values, of every layer."""
    found: dict[int, LayerMoments] = {}
    deviations: dict[int, float] = {}

    def add(seen: Observation) -> None:
        kv_heads, dim = seen.keys.shape[1], seen.keys.shape[3]
        layer = found.setdefault(seen.layer, LayerMoments.empty(kv_heads, dim))
        for b in range(len(seen.keys)):
            layer.pre_keys.add(seen.pre_keys[b].cpu())
            layer.post_keys.add(seen.keys[b].cpu())
            layer.queries.add(seen.query[b].reshape(kv_heads, -1, dim).cpu())
        deviations[seen.layer] = float(seen.values.float().std())

    ids = torch.randint(1, model.config.vocab_size, (_WINDOWS, _WINDOW_TOKENS)).to(model.device)
    with torch.inference_mode(), observe(model, add):
        model(ids, use_cache=False, logits_to_keep=1)
    return found, deviations
