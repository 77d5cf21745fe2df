"""What a decode step reads by the method's own count, keys and values in 16 bits; and budgets that read a given share.

Counted, not measured: rows where the budget covers all tokens read what dense attention reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loki_attention.core.budget import Budget
from loki_attention.core.spec import HeadLayout
from loki_attention.evaluation.variant import Variant
from loki_attention.integrations.huggingface.families import text_config
from loki_attention.kernels.rows import Rows
from loki_attention.methods import Method

BYTES_PER_NUMBER = 2
_SHARES = 65536
_UNIT = 4096


class DecodeStep(NamedTuple):
    """A decode step: tokens of the dense prompt, and tokens in the cache, the new one included."""

    prompt: int
    tokens: int


class StepBytes(NamedTuple):
    """Bytes of the cache that a decode step reads in one sparse layer, mean over layers and steps, and dense's there."""

    read: float
    dense: float

    @property
    def fraction(self) -> float:
        """Read over dense."""
        return self.read / self.dense


def step_bytes(model: Any, variant: Variant, steps: Sequence[DecodeStep]) -> StepBytes:
    """The bytes of these decode steps."""
    with variant.attach(model) as attached:
        methods = attached.methods
    return _bytes_of(methods, HeadLayout.of(text_config(model)), steps)


def budget_within(
    methods: Mapping[int, Method], layout: HeadLayout, share: float, steps: Sequence[DecodeStep]
) -> Budget | None:
    """The largest budget, a fraction of the tokens, whose steps read at most ``share`` of dense attention's bytes.

    ``minimum`` is 0, sinks and recent stay the methods'. None where no budget with room for more than sinks and recent
    reads so little.

    With rows of 128 bytes (D = 64) and 16 bytes a token for low-rank keys, 1/8 of 2048 tokens' 256 bytes each is 65536
    bytes: 32768 for the keys' twins and 128 tokens of K and V, a sixteenth.
    """
    given = next(iter(methods.values())).budget
    fits, too_much = 0, _SHARES + 1
    while too_much - fits > 1:
        middle = (fits + too_much) // 2
        budget = Budget(fraction=middle / _SHARES, minimum=0, sinks=given.sinks, recent=given.recent)
        changed = {layer: replace(method, budget=budget) for layer, method in methods.items()}
        if _bytes_of(changed, layout, steps).fraction <= share:
            fits = middle
        else:
            too_much = middle
    shortest = min(step.tokens for step in steps)
    if not fits or fits * shortest <= _SHARES * (given.sinks + given.recent):
        return None
    return Budget(fraction=fits / _SHARES, minimum=0, sinks=given.sinks, recent=given.recent)


def ranking_share(methods: Mapping[int, Method], layout: HeadLayout) -> float:
    """What the methods read of a token to rank it, over what dense attention reads of one; 0 without any method.

    Twins of 16 bytes beside rows of 128 for the key and the value, D = 64: a sixteenth.
    """
    read = _read_of_none(methods, layout, [_UNIT, 2 * _UNIT])
    return float(read[1] - read[0]) / (2 * BYTES_PER_NUMBER * layout.head_dim * _UNIT)


def sums_share(methods: Mapping[int, Method], layout: HeadLayout, steps: Sequence[DecodeStep]) -> float:
    """What the methods read in a step however few tokens there are, the tail's sums, over what dense attention reads.

    A linear tail's 1104 float32 numbers beside 1536 tokens of 256 bytes, D = 64: 1.1 %.
    """
    tokens = sum(step.tokens for step in steps) / len(steps)
    return float(_read_of_none(methods, layout, [0])) / (2 * BYTES_PER_NUMBER * layout.head_dim * tokens)


def _read_of_none(methods: Mapping[int, Method], layout: HeadLayout, tokens: Sequence[int]) -> Tensor:
    """Bytes that steps of so many tokens read per KV head before any key is selected, mean over layers; 0 without methods."""
    cached, none = torch.tensor(tokens), torch.zeros(len(tokens), dtype=torch.int64)
    row, group = BYTES_PER_NUMBER * layout.head_dim, layout.heads // layout.kv_heads
    layers = [method.read_bytes(cached, none, group, row).double() for method in methods.values()]
    return torch.stack(layers or [none.double()]).mean(0)


def _bytes_of(methods: Mapping[int, Method], layout: HeadLayout, steps: Sequence[DecodeStep]) -> StepBytes:
    """The bytes of steps of these layers' methods, over all KV heads; dense ones where K covers all tokens."""
    tokens = torch.tensor([step.tokens for step in steps])
    prompts = torch.tensor([step.prompt for step in steps])
    row = BYTES_PER_NUMBER * layout.head_dim
    dense = 2.0 * row * layout.kv_heads * tokens.double()
    # One sequence a step: each has a prompt of its own.
    rows = Rows(torch.zeros(len(steps), 1, dtype=torch.int64), tokens[:, None])
    layers = []
    for method in methods.values():
        k = method.budgets(rows, prompts)[:, 0]
        read = layout.kv_heads * method.read_bytes(tokens, k, layout.heads // layout.kv_heads, row)
        layers.append(torch.where(k < tokens, read, dense))
    return StepBytes(float(torch.stack(layers or [dense]).mean()), float(dense.mean()))
