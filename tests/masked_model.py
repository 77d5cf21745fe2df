"""A model under a mask of chosen slots: the dense computation that a traced sparse step must equal."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loki_attention.integrations.huggingface.families import attention_modules
from loki_attention.integrations.huggingface.interception import Redirection


def masked_by(model: PreTrainedModel, chosen: dict[int, Tensor]) -> Redirection:
    """The model under a 4-D mask per layer: sparse rows see just the traced slots, dense rows are causal."""

    def attention(module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
        batch, heads, rows, _ = query.shape
        slots = key.shape[2]
        visible = torch.ones(rows, slots, dtype=torch.bool).tril(slots - rows).expand(batch, heads, -1, -1)
        if module.layer_idx in chosen:
            indices = chosen[module.layer_idx]
            marks = torch.zeros(*indices.shape[:3], slots + 1, dtype=torch.bool)
            marks.scatter_(-1, indices.where(indices >= 0, slots), True)
            sets = marks[..., :slots].repeat_interleave(heads // indices.shape[1], dim=1)
            visible = torch.where(sets.any(-1, keepdim=True), sets, visible)
        group = heads // key.shape[1]
        repeated = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            query, *repeated, attn_mask=visible, scale=kwargs["scaling"]
        )
        return output.transpose(1, 2), None

    return Redirection(model, attention_modules(model), attention)
