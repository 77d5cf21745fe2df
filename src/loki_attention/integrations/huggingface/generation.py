"""Text from a prompt by ``model.generate``, handed over piece by piece as it comes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from loki_attention.errors import ArgumentError, check_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What was generated after a prompt, and how many tokens prompt and text have."""

    text: str
    prompt_tokens: int
    new_tokens: int


def generate_text(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generation:
    """The text that follows ``prompt``; ``on_text`` is called with each piece as soon as it is whole.

    Greedy at temperature 0, else sampled at that temperature after ``torch.manual_seed(seed)``. Raises
    ``ArgumentError`` for a prompt without tokens, fewer than 1 new token and a negative temperature.
    """
    check_tokens("max_new_tokens", max_new_tokens, least=1)
    if not 0 <= temperature < float("inf"):
        raise ArgumentError(f"temperature must be 0 (greedy) or above; got {temperature}")
    encoded = tokenizer(prompt, return_tensors="pt", verbose=False)
    ids = encoded["input_ids"].to(model.device)
    if not ids.shape[1]:
        raise ArgumentError("the prompt has no tokens; give some text")
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature}
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=_Pieces(tokenizer, on_text),
        pad_token_id=_padding(model, tokenizer),
        **sampling,
    )
    new = output[0, ids.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Generation(text=text, prompt_tokens=ids.shape[1], new_tokens=len(new))


class _Pieces(TextStreamer):
    """Hands whole words to a function instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


def _padding(model: PreTrainedModel, tokenizer: Any) -> int | None:
    """A padding id, so that generate needs not choose one with a message: one sequence is never padded."""
    end = model.generation_config.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first_end
