"""What methods share that must see every row, dense ones too: H2O, SnapKV. Notes stand beside the cache they are of.

Nothing is evicted in fact: the tokens that such a method gave up stay in the cache, and the rows of a later prompt,
which is dense, see them again. Evictions then begin anew.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loki_attention.cache import Watched
from loki_attention.errors import ArgumentError
from loki_attention.kernels import torch_backend
from loki_attention.kernels.torch_backend import GroupScores
from loki_attention.methods.base import SelectionMethod, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchingMethod(SelectionMethod):
    """A selection that follows from the attention of earlier rows."""

    watches_prompt: ClassVar[bool] = True
    tails: ClassVar[tuple[str, ...]] = ("none", "mean")
    simulation: ClassVar[str | None] = "nothing is evicted, and the prompt's attention is computed twice"
    row_by_row: ClassVar[bool] = False
    """Whether a row's choice needs what the row before it attended."""
    serves_paper_rows: ClassVar[bool] = True
    """Whether one K for all rows of a window means anything to the method."""

    @property
    def owner(self) -> str:
        """Whose notes they are: others' are not taken over."""
        return f"{self.name}, {self.per}, {self.budget}"

    @abstractmethod
    def watch(self, step: Step) -> None:
        """Note rows that were dense: K is all the tokens that a row sees, and 0 for rows of padding."""


def notes_of(step: Step) -> Watched:
    """The notes of the step's layer; raises ``ArgumentError`` where nobody takes any."""
    if step.layer.watched is None:
        raise ArgumentError("a method that watches every row needs notes of the rows before; run it through attach()")
    return step.layer.watched


def attention_share(step: Step, shown: Tensor, sets: int) -> GroupScores:
    """Each row's exact attention over the slots that are ``shown`` (B, 1 or sets, T, S), 0 elsewhere; at least float32."""
    scores = torch_backend.score_exact(step.query, step.layer.keys, step.scale, sets, step.softmax)
    scores = scores.masked_fill(~shown[:, :, None], -torch.inf)
    share = scores.softmax(-1)
    if step.softmax.sink_logits is not None:
        total = scores.logsumexp(-1, keepdim=True)
        logits = step.softmax.sink_logits.to(total.dtype).reshape(1, sets, -1, 1, 1)
        share = share * torch.sigmoid(total - logits)
    # Rows that are shown nothing.
    return share.nan_to_num()
