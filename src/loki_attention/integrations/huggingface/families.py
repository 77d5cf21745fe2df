"""Which models can be served, and what differs between their families. One table, no file per model."""

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from loki_attention.core.spec import full_attention_layers, layer_kinds
from loki_attention.errors import ModelError

IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations whose masks and dense results this package builds on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a family needs.

    Its attention module's class, the function that applies RoPE in its modelling file (None without RoPE), and the
    attention implementations that compute its softmax.
    """

    attention_class: str
    rotary_function: str | None = "apply_rotary_pos_emb"
    implementations: tuple[str, ...] = IMPLEMENTATIONS


FAMILIES = {
    "cohere": Family(attention_class="CohereAttention"),
    "cohere2": Family(attention_class="Cohere2Attention"),
    "gemma": Family(attention_class="GemmaAttention"),
    # Soft-capping: some transformers versions accept sdpa here, which then leaves the cap out.
    "gemma2": Family(attention_class="Gemma2Attention", implementations=("eager",)),
    "gemma3_text": Family(attention_class="Gemma3Attention"),
    "gpt2": Family(attention_class="GPT2Attention", rotary_function=None),
    "gpt_neox": Family(attention_class="GPTNeoXAttention"),
    # Learned sinks in the denominator, which sdpa does not know.
    "gpt_oss": Family(attention_class="GptOssAttention", implementations=("eager",)),
    "granite": Family(attention_class="GraniteAttention"),
    "llama": Family(attention_class="LlamaAttention"),
    "ministral": Family(attention_class="MinistralAttention"),
    "mistral": Family(attention_class="MistralAttention"),
    "mixtral": Family(attention_class="MixtralAttention"),
    "olmo2": Family(attention_class="Olmo2Attention"),
    "olmo3": Family(attention_class="Olmo3Attention"),
    "opt": Family(attention_class="OPTAttention", rotary_function=None),
    "phi3": Family(attention_class="Phi3Attention"),
    "qwen2": Family(attention_class="Qwen2Attention"),
    "qwen3": Family(attention_class="Qwen3Attention"),
    "qwen3_moe": Family(attention_class="Qwen3MoeAttention"),
    "smollm3": Family(attention_class="SmolLM3Attention"),
    "stablelm": Family(attention_class="StableLmAttention"),
}


def family_of(model: Any) -> Family:
    """The model's family; raises ``ModelError`` for anything that is not a supported decoder."""
    if isinstance(getattr(model, "_orig_mod", None), PreTrainedModel):
        raise ModelError("this model is compiled; attach to the model that torch.compile was given, then compile it")
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"expected a transformers model, got {type(model).__name__}; load one with from_pretrained")
    return family_of_config(model.config)


def family_of_config(config: Any) -> Family:
    """The family of a model's configuration; raises ``ModelError`` with the reason where it cannot be served."""
    reason: str | None = "they are encoder-decoders; only decoders (causal language models) are"
    if not getattr(config, "is_encoder_decoder", False):
        config = config.get_text_config(decoder=True)
        reason = _refusal(config)
    if reason is not None:
        raise ModelError(f"models of type {config.model_type!r} are not supported: {reason}")
    if not full_attention_layers(config):
        kinds = ", ".join(sorted(set(layer_kinds(config))))
        raise ModelError(
            f"this {config.model_type} model has no full-attention layer (all are {kinds}): nothing can be made sparse"
        )
    return FAMILIES[config.model_type]


def causal_model_class(config: Any) -> type[PreTrainedModel] | None:
    """The class that transformers loads for a configuration as a causal language model, None where it has none."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return kind[0] if isinstance(kind, tuple) else kind


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the model's text decoder."""
    return model.config.get_text_config(decoder=True)


def attention_modules(model: Any) -> dict[int, Any]:
    """The attention module of every full-attention layer, by layer index; others are not ours."""
    family = family_of(model)
    modules = {m.layer_idx: m for m in model.modules() if type(m).__name__ == family.attention_class}
    return {i: modules[i] for i in full_attention_layers(text_config(model))}


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that takes ``past_key_values`` and runs the layers."""
    return model.get_decoder()


def _refusal(config: Any) -> str | None:
    """Why models of this configuration cannot be served, None where they can."""
    if getattr(config, "kv_lora_rank", None):
        return "latent attention (MLA) caches one compressed vector a token, not the keys of every head"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "ALiBi adds a bias by distance to every score, which low-rank keys do not know"
    if config.model_type in FAMILIES:
        return None
    kind = causal_model_class(config)
    if kind is None:
        return "transformers has no causal language model of this type"
    if not hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS"):
        return f"{kind.__name__} does not call transformers' attention interface"
    return f"untested; supported types: {', '.join(sorted(FAMILIES))}"
