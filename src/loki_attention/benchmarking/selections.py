"""Which tokens a real model selects: index sets of the bundled model, tiled to any length.

Uniformly random sets are the worst case for memory; a model's cluster. The file was written by
``benchmarks/record_selections.py``.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loki_attention.core.selection import forced
from loki_attention.data import recorded_selections

RECORDED_TOKENS = 4096
"""Tokens of the context that every recorded set was selected from."""


class Forced(NamedTuple):
    """How many leading and trailing tokens are in every set."""

    sinks: int
    recent: int


@cache
def recorded(fraction: float) -> Bool[Tensor, "sets tokens"]:
    """The recorded sets of the budget next to ``fraction``, a row a set, of ``RECORDED_TOKENS`` tokens."""
    with np.load(recorded_selections()) as file:
        near = min(file.files, key=lambda name: abs(float(name) - fraction))
        return torch.from_numpy(np.unpackbits(file[near], axis=1).astype(bool))


def real_selection(tokens: int, k: int, heads: int, always: Forced, *, seed: int) -> Int[Tensor, "heads k"]:
    """``k`` slots of ``tokens`` for each head, ascending, where a model would have selected them.

    Recorded sets one after the other, drawn anew for every 4096 tokens; what is too many is dropped and what lacks is
    added at random. The forced slots are in.
    """
    generator = torch.Generator().manual_seed(seed)
    sets = recorded(k / tokens)
    pieces = -(-tokens // RECORDED_TOKENS)
    drawn = torch.randint(len(sets), (heads, pieces), generator=generator)
    chosen = sets[drawn].flatten(1)[:, :tokens]
    order = chosen + torch.rand(heads, tokens, generator=generator)
    order[:, forced(tokens, *always)] = 3.0
    return order.topk(k).indices.sort().values
