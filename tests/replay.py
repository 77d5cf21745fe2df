"""A ``generate`` run again by other means: the same calls, with attention as the specification has it.

Decode rows that a trace calls sparse are computed from the cached keys and values by ``core`` (with a tail) or under a
mask of the traced slots (without one); everything else is the model's own attention. The model's keys, masks and beams
go through transformers alone, so that equal logits show that ours did the same at every step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loki_attention.core.attention import Softmax, attend, decode_step
from loki_attention.core.budget import Budget
from loki_attention.core.encoder import Encoder
from loki_attention.integrations.huggingface.families import attention_modules, decoder_of
from loki_attention.integrations.huggingface.interception import Redirection, original_attention


@contextmanager
def replayed(
    model: PreTrainedModel, trace: list[dict[int, Tensor]], encoders: Mapping[int, Encoder], budget: Budget, tail: str
) -> Iterator[None]:
    """Within the block, forward number i takes its sparse rows from ``trace[i]``."""
    forwards = iter(trace)
    now: dict[int, Tensor] = {}

    def start(*_: object) -> None:
        now.clear()
        now.update(next(forwards))

    def attention(module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
        dense = original_attention(module, redirection.original)
        output, weights = dense(module, query, key, value, attention_mask, **kwargs)
        traced = now.get(module.layer_idx)
        if traced is None:
            return output, weights
        assert query.shape[2] == 1, "only decode rows are sparse in generate"
        rule = Softmax(kwargs.get("softcap"), kwargs.get("s_aux"))
        rows = []
        for b in range(len(query)):
            slots, tensors = traced[b, :, 0], (query[b, :, 0], key[b], value[b])
            if (slots < 0).all():
                rows.append(output[b, 0])
                continue
            valid = _valid(attention_mask, b, key.shape[2])
            if int(valid.sum()) <= budget.tokens:
                rows.append(output[b, 0])
            elif tail == "none":
                rows.append(_masked(*tensors, slots, kwargs["scaling"], rule))
            else:
                encoder = encoders[module.layer_idx].to(query.device, query.dtype)
                step = decode_step(*tensors, valid, encoder, budget, kwargs["scaling"], tail, rule)
                assert torch.equal(step.indices, slots), "another selection than the reference's"
                rows.append(step.output)
        return torch.stack(rows)[:, None].to(output.dtype), None

    redirection = Redirection(model, attention_modules(model), attention)
    hook = decoder_of(model).register_forward_pre_hook(start)
    try:
        yield
    finally:
        hook.remove()
        redirection.undo()
    assert next(forwards, None) is None, "fewer forwards than were traced"


def _valid(mask: Tensor | None, b: int, slots: int) -> Tensor:
    if mask is None:
        return torch.ones(slots, dtype=torch.bool)
    row = mask[b, 0, -1, :slots]
    return row if row.dtype == torch.bool else row == 0


def _masked(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, scale: float, rule: Softmax) -> Tensor:
    """Attention of every query head under a mask of its key head's slots: (H, D)."""
    group = len(query) // len(keys)
    outputs = []
    for head in range(len(keys)):
        heads, picked = slice(head * group, (head + 1) * group), slots[head][slots[head] >= 0]
        outputs.append(
            attend(query[heads], keys[head, picked], values[head, picked], scale, softmax=rule.of_heads(heads))
        )
    return torch.cat(outputs)
