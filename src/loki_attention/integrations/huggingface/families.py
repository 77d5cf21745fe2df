"""Which models can be served, and what differs between their families. One table, no file per model."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from loki_attention.core.spec import full_attention_layers
from loki_attention.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a family needs: its attention module's class, and the function that applies RoPE in its modelling file."""

    attention_class: str
    rotary_function: str = "apply_rotary_pos_emb"


FAMILIES = {
    "cohere": Family(attention_class="CohereAttention"),
    "granite": Family(attention_class="GraniteAttention"),
    "llama": Family(attention_class="LlamaAttention"),
    "mistral": Family(attention_class="MistralAttention"),
    "olmo2": Family(attention_class="Olmo2Attention"),
    "phi3": Family(attention_class="Phi3Attention"),
    "qwen2": Family(attention_class="Qwen2Attention"),
    "qwen3": Family(attention_class="Qwen3Attention"),
    "smollm3": Family(attention_class="SmolLM3Attention"),
}
IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations whose masks and dense results this package builds on."""


def family_of(model: Any) -> Family:
    """The model's family; raises ``ModelError`` for anything that is not a supported decoder."""
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"expected a transformers model, got {type(model).__name__}; load one with from_pretrained")
    model_type = text_config(model).model_type
    if model_type not in FAMILIES:
        raise ModelError(
            f"models of type {model_type!r} are not supported; supported types: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the model's text decoder."""
    return model.config.get_text_config(decoder=True)


def attention_modules(model: Any) -> dict[int, Any]:
    """The attention module of every full-attention layer, by layer index; others are not ours."""
    family, config = family_of(model), text_config(model)
    modules = {m.layer_idx: m for m in model.modules() if type(m).__name__ == family.attention_class}
    ours = {i: modules[i] for i in full_attention_layers(config) if i in modules}
    if not ours:
        raise ModelError(
            f"this {config.model_type} model has no full-attention layer (all slide over a window); there is nothing to "
            "make sparse"
        )
    return ours


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that takes ``past_key_values`` and runs the layers."""
    return model.get_decoder()
