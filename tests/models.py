"""Tiny random models that emit many different tokens, and bases for them."""

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loki_attention import Budget, KeyBasis, Planes
from loki_attention.calibration.checkpoint import Checkpoint
from loki_attention.calibration.collect import collect
from loki_attention.core.candidates import build
from loki_attention.core.spec import ModelSpec
from loki_attention.integrations.huggingface.families import FAMILIES

MIXED: dict[str, object] = {
    "sliding_window": 48,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
GEMMA: dict[str, object] = {**MIXED, "query_pre_attn_scalar": 16, "tie_word_embeddings": False}
EXPERTS: dict[str, object] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
HALF_ROTARY: dict[str, object] = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
FAMILY_SETTINGS: dict[str, dict[str, object]] = {
    "cohere": {"logit_scale": 1.0, "tie_word_embeddings": False},
    "cohere2": {**MIXED, "logit_scale": 1.0, "tie_word_embeddings": False},
    "gemma": {"tie_word_embeddings": False},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 30.0},
    "gemma3_text": GEMMA,
    "gpt2": {"tie_word_embeddings": False},
    "gpt_neox": {"rope_parameters": HALF_ROTARY},
    "gpt_oss": {**MIXED, **EXPERTS, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    "granite": {},
    "llama": {},
    "ministral": MIXED,
    "mistral": {"sliding_window": None},
    "mixtral": {**EXPERTS, "sliding_window": None},
    "olmo2": {},
    "olmo3": MIXED,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": False},
    "phi3": {"partial_rotary_factor": 0.5},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 32},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {"rope_parameters": HALF_ROTARY},
}
SCALES = {"gpt_neox": (12.0, 30.0)}
"""How far weights of attention and feed-forward layers are scaled, where others than (6, 10) give more variety."""
SEEDS = {"gemma3_text": 1}
NO_SHARED_KEYS = ("gpt2", "gpt_neox", "opt")
VOCABULARY = 211
BUDGET = Budget(tokens=24, sinks=2, recent=4)
LAYOUTS = {"gqa": (4, 2), "mqa": (4, 1), "mha": (2, 2)}


@cache
def tiny_model(
    family: str = "llama", layout: str = "gqa", dtype: torch.dtype = torch.float64, seed: int = 0, layers: int = 3
) -> PreTrainedModel:
    """A random model of a few layers, its weights scaled so that greedy decoding does not repeat one token."""
    heads, kv_heads = LAYOUTS[layout]
    shared_keys = {} if family in NO_SHARED_KEYS else {"num_key_value_heads": kv_heads}
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=16,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **shared_keys,
        **FAMILY_SETTINGS[family],
    )
    # Mixtures of experts: the grouped kernel takes no float64.
    config._experts_implementation = "eager"
    torch.manual_seed(SEEDS.get(family, seed))
    attention, feed_forward = SCALES.get(family, (6.0, 10.0))
    implementation = FAMILIES[family].implementations[0]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.mul_(attention if "att" in name else feed_forward if "mlp" in name else 16.0)
    return model.to(dtype)


@cache
def tiny_basis(
    family: str = "llama",
    layout: str = "gqa",
    candidate: str = "balanced",
    tail: str = "linear",
    planes: str = "8@4",
    seed: int = 0,
) -> KeyBasis:
    """The basis of a tiny model from a few random windows."""
    return basis_of(tiny_model(family, layout, seed=seed), candidate=candidate, tail=tail, planes=planes, seed=seed)


def basis_of(
    model: PreTrainedModel, *, candidate: str = "balanced", tail: str = "linear", planes: str = "8@4", seed: int = 0
) -> KeyBasis:
    """The basis of any small model from a few random windows."""
    moments = collect(model, random_ids(6, 256, seed=seed + 1).split(1), Checkpoint(None, ""))
    return KeyBasis(
        spec=ModelSpec.of(model),
        layers={i: build(candidate, m) for i, m in moments.items()},
        planes=Planes.parse(planes),
        budget=BUDGET,
        tail=tail,
        moments=moments,
    )


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids (B, S), none of them the padding id 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)
