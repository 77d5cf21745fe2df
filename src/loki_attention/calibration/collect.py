"""From token windows to moments: one streaming pass, memory O(layers Hkv D^2) in float64."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from loki_attention.calibration.checkpoint import Checkpoint
from loki_attention.calibration.progress import stage
from loki_attention.core.moments import LayerMoments
from loki_attention.integrations.huggingface.observe import Observation, observe

_SECONDS_BETWEEN_SAVES = 20.0


def collect(
    model: Any,
    windows: Sequence[Int[Tensor, "1 s"]],
    checkpoint: Checkpoint,
    *,
    show: bool = False,
) -> dict[int, LayerMoments]:
    """The moments of every full-attention layer over all windows; goes on from what ``checkpoint`` holds."""
    done, moments = checkpoint.moments() or (0, {})

    def add(seen: Observation) -> None:
        kv_heads, dim = seen.keys.shape[1], seen.keys.shape[3]
        layer = moments.setdefault(seen.layer, LayerMoments.empty(kv_heads, dim))
        layer.pre_keys.add(seen.pre_keys[0])
        layer.post_keys.add(seen.keys[0])
        layer.queries.add(seen.query[0].reshape(kv_heads, -1, dim))

    lengths = [window.shape[1] for window in windows]
    saved = time.monotonic()
    with (
        stage("moments", sum(lengths), show=show, done=sum(lengths[:done])) as advance,
        torch.inference_mode(),
        observe(model, add),
    ):
        for i in range(done, len(windows)):
            model(windows[i].to(model.device), use_cache=False, logits_to_keep=1)
            advance(lengths[i])
            if time.monotonic() - saved >= _SECONDS_BETWEEN_SAVES or i + 1 == len(windows):
                checkpoint.save_moments(i + 1, moments)
                saved = time.monotonic()
    return moments
