"""Ways of generating: each runs on a model and a cache and returns what came out."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models import random_ids

PROMPT, NEW, PAD = 150, 12, 37


class Generated(NamedTuple):
    """Token ids (B, S), the logits of every step, the attention mask of all of the cache, and beams' scores if any."""

    sequences: Tensor
    logits: Tensor
    mask: Tensor
    scores: Tensor | None = None


def greedy(model: PreTrainedModel, cache: DynamicCache) -> Generated:
    return _generate(model, cache, random_ids(2, PROMPT, seed=1), new=24)


def sampling(model: PreTrainedModel, cache: DynamicCache) -> Generated:
    torch.manual_seed(3)
    return _generate(model, cache, random_ids(2, PROMPT, seed=2), do_sample=True, temperature=0.8, top_k=20)


def beams(model: PreTrainedModel, cache: DynamicCache) -> Generated:
    return _generate(model, cache, random_ids(2, PROMPT, seed=3), num_beams=3, output_scores=True)


def left_padding(model: PreTrainedModel, cache: DynamicCache) -> Generated:
    return _generate(model, cache, _padded(random_ids(2, PROMPT, seed=4)))


def prompt_lookup(model: PreTrainedModel, cache: DynamicCache) -> Generated:
    """The prompt repeats itself, so that drafts are made; few of a random model's tokens are as drafted."""
    return _generate(model, cache, random_ids(1, PROMPT // 3, seed=5).repeat(1, 3), prompt_lookup_num_tokens=3)


def second_turn(model: PreTrainedModel, cache: DynamicCache) -> Generated:
    """Two turns of a batch on one cache; padding of the second turn leaves a hole."""
    first = _generate(model, cache, _padded(random_ids(2, PROMPT, seed=6)), new=8)
    turn = random_ids(2, 40, seed=7)
    turn[0, :11] = 0
    mask = torch.cat([_mask(first.sequences[:, :PROMPT]), torch.ones(2, 8, dtype=torch.long), _mask(turn)], dim=1)
    return _generate(model, cache, torch.cat([first.sequences, turn], dim=1), mask=mask)


OPERATIONS: dict[str, Callable[[PreTrainedModel, DynamicCache], Generated]] = {
    "greedy": greedy,
    "sampling": sampling,
    "beams": beams,
    "left padding": left_padding,
    "prompt lookup": prompt_lookup,
    "second turn": second_turn,
}


def _padded(ids: Tensor) -> Tensor:
    ids[1, :PAD] = 0
    return ids


def _mask(ids: Tensor) -> Tensor:
    return (ids != 0).long()


def _generate(
    model: PreTrainedModel,
    cache: DynamicCache,
    ids: Tensor,
    *,
    new: int = NEW,
    mask: Tensor | None = None,
    **settings: object,
) -> Generated:
    mask = _mask(ids) if mask is None else mask
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True} | settings
    placed = {"inputs": ids.to(model.device), "attention_mask": mask.to(model.device)}
    out = model.generate(**placed, max_new_tokens=new, past_key_values=cache, pad_token_id=0, **settings)
    cached = torch.ones(len(cache.layers[-1].keys), cache.get_seq_length(len(cache.layers) - 1), dtype=torch.long)
    repeats = len(cached) // len(mask)
    cached[:, : mask.shape[1]] = mask.repeat_interleave(repeats, dim=0)
    return Generated(out.sequences.cpu(), torch.stack(out.logits).cpu(), cached, getattr(out, "sequences_scores", None))
