"""From a transformers attention mask to the slots that each query row sees."""

import torch
from torch import Tensor

from loki_attention.errors import ModelError
from loki_attention.kernels.rows import Rows


def rows_of(mask: Tensor | None, batch: int, rows: int, slots: int, device: torch.device) -> Rows:
    """The rows of a forward of ``rows`` new tokens over ``slots`` cached ones, the new ones included.

    ``mask`` is what transformers hands to attention: nothing (causal, no padding), a boolean or additive
    (B, 1, T, S), or the two-dimensional (B, S) of older models.
    """
    if mask is None:
        return Rows.of_whole_prompts(batch, slots, rows, device)
    seen = seen_by(mask, slots).expand(batch, -1, -1)
    return Rows.of(seen[:, -1], seen.sum(-1)[:, -rows:])


def check_nested(mask: Tensor | None, rows: Rows, active: Tensor) -> None:
    """Raise ``ModelError`` where an active row sees anything but the first tokens of its sequence.

    Packed sequences, bidirectional prefixes and trees of drafts are not nested; they cannot select row by row.
    """
    if mask is None:
        return
    seen = seen_by(mask, rows.rank.shape[1])
    if bool(((seen != rows.visible) & active[..., None]).any()):
        raise ModelError(
            "this attention mask is not causal row by row (packed sequences or a custom mask); continuation rows "
            "need a plain causal mask"
        )


def own_slots(rows: Rows) -> Tensor:
    """Whether each row's own token is valid (not padding): (B, T)."""
    return rows.rank[:, -rows.tokens.shape[1] :] >= 0


def seen_by(mask: Tensor, slots: int) -> Tensor:
    """Which of the first ``slots`` slots each row sees by a mask of transformers' (:func:`rows_of`): (B, T or 1, slots)."""
    boolean = mask if mask.dtype == torch.bool else mask == 0
    boolean = boolean[:, 0] if mask.dim() == 4 else mask.bool()[:, None]
    return boolean[..., :slots]
