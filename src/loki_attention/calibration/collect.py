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
    """The moments of every full-attention layer over all windows; goes on from what ``checkpoint`` holds.

    The checkpoint's processes share the windows out; each window's moments are added in the windows' order in all.
    """
    done, moments = checkpoint.moments() or (0, {})
    of_window: dict[int, LayerMoments] = {}

    def add(seen: Observation) -> None:
        kv_heads, dim = seen.keys.shape[1], seen.keys.shape[3]
        layer = of_window.setdefault(seen.layer, LayerMoments.empty(kv_heads, dim))
        layer.pre_keys.add(seen.pre_keys[0])
        layer.post_keys.add(seen.keys[0])
        layer.queries.add(seen.query[0].reshape(kv_heads, -1, dim))

    def of(window: Int[Tensor, "1 s"]) -> dict[int, LayerMoments]:
        of_window.clear()
        model(window.to(model.device), use_cache=False, logits_to_keep=1)
        return dict(of_window)

    lengths = [window.shape[1] for window in windows]
    saved = time.monotonic()
    with (
        stage("moments", sum(lengths), show=show, done=sum(lengths[:done])) as advance,
        torch.inference_mode(),
        observe(model, add),
    ):
        for i, parts in enumerate(checkpoint.ranks.each(of, windows[done:]), done):
            for index, part in parts.items():
                if index in moments:
                    moments[index].merge(part)
                else:
                    moments[index] = part
            advance(lengths[i])
            if time.monotonic() - saved >= _SECONDS_BETWEEN_SAVES or i + 1 == len(windows):
                checkpoint.save_moments(i + 1, moments)
                saved = time.monotonic()
    return moments
