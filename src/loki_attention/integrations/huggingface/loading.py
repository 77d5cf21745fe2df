"""Models, tokenizers and caches by the name or path a user gives."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.utils import logging

from loki_attention.errors import ArgumentError, ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}

_WHERE = "(give a local folder with a config.json, or a name on the hub)"


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """The causal language model at a local folder or hub name, in eval mode.

    Raises ``ModelError`` where transformers cannot load it, with its reason, and ``ArgumentError`` for an unknown
    ``dtype`` or a ``device`` that is not there.
    """
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    _check_device(device)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a model from {name!r}: {_first_line(error)} {_WHERE}") from error
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer at a local folder or hub name; raises ``ModelError`` where there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a tokenizer from {name!r}: {_first_line(error)} {_WHERE}") from error


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for ``model``."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"cannot use device {device!r}: {_first_line(error)}; give cpu, or cuda") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
