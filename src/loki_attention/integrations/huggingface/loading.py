"""Models, their configurations, tokenizers and caches by the name or path a user gives."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from loki_attention.errors import ArgumentError, ModelError, unknown_name
from loki_attention.integrations.huggingface.static_layer import TwinnedStaticLayer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}

_WHERE = "give a folder that save_pretrained wrote, or a name on the hub"
_FAILURES = (OSError, ValueError, KeyError)


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of the model at a local folder or hub name; no weights are read.

    Raises ``ModelError`` where there is none, and for a type that transformers does not know.
    """
    _check_place(name)
    try:
        _check_known(_fields(name))
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except _FAILURES as error:
        raise ModelError(f"cannot load a model from {name!r}: {_first_line(error)}; {_WHERE}") from error


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """The causal language model at a local folder or hub name, in eval mode.

    Raises ``ModelError`` where transformers cannot load it, with its reason, and ``ArgumentError`` for an unknown
    ``dtype`` or a ``device`` that is not there.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, tuple(DTYPES))
    _check_device(device)
    load_config(name)
    _check_weights(name)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], trust_remote_code=False)
    except (*_FAILURES, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load a model from {name!r}: {_first_line(error)}; {_WHERE}") from error
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer at a local folder or hub name; raises ``ModelError`` where there is none."""
    folder = Path(name)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")):
        raise ModelError(
            f"cannot load a tokenizer from {name!r}: the folder has no tokenizer.json; save the model's tokenizer there, "
            "with its save_pretrained"
        )
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except _FAILURES as error:
        raise ModelError(f"cannot load a tokenizer from {name!r}: {_first_line(error)}; {_WHERE}") from error


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for ``model``."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def new_static_cache(model: PreTrainedModel, slots: int) -> StaticCache:
    """An empty cache of transformers' own with room for ``slots`` tokens, as ``cache_implementation="static"`` makes."""
    return StaticCache(model.config.get_text_config(decoder=True), max_cache_len=slots)


def shorten(cache: DynamicCache | StaticCache, tokens: int) -> None:
    """Keep the first ``tokens`` tokens of a cache; of a static one only where every layer has full attention."""
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            # Low-rank keys and sums follow where the layer is ours; transformers' own has no crop.
            if isinstance(layer, TwinnedStaticLayer):
                layer.crop(min(0, tokens - int(layer.cumulative_length)))
            else:
                layer.cumulative_length.fill_(tokens)
    else:
        cache.crop(tokens - cache.get_seq_length())


def _check_place(name: str) -> None:
    """Raise for what can be no model's folder; what is no path at all may be a name on the hub."""
    place, reason = Path(name), None
    if place.is_dir():
        reason = None if (place / "config.json").is_file() else "the folder has no config.json"
    elif place.exists():
        reason = "it is a file"
    elif place.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        reason = "there is no such folder"
    if reason is not None:
        raise ModelError(f"cannot load a model from {name!r}: {reason}; {_WHERE}")


def _check_weights(name: str) -> None:
    folder = Path(name)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "*.bin*")):
        raise ModelError(f"cannot load a model from {name!r}: the folder has no weights (model.safetensors); {_WHERE}")


def _fields(name: str) -> dict[str, Any]:
    """What config.json says; ``ValueError`` where it is JSON and no object, which transformers does not expect."""
    try:
        fields: Any = PreTrainedConfig.get_config_dict(name)[0]
    except TypeError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError("its config.json is no JSON object")
    return fields


def _check_known(fields: dict[str, Any]) -> None:
    kind = fields.get("model_type")
    if kind is None or kind in CONFIG_MAPPING:
        return
    reason = "this version of transformers does not know them; a later one may"
    if "auto_map" in fields:
        reason = "their code comes with the weights (trust_remote_code), and is not run"
    raise ModelError(f"models of type {kind!r} are not supported: {reason}")


def _check_device(device: str) -> None:
    try:
        known = torch.device(device)
    except RuntimeError:
        raise ArgumentError(f"unknown device {device!r}; give cpu, cuda, or cuda:1 for the second GPU") from None
    try:
        torch.empty(1, device=known)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(
            f"cannot use device {device!r}: {_first_line(error)}; give cpu, or a GPU there is"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
