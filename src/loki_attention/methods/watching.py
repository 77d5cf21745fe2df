"""What methods share that must see every row, dense ones too: H2O, SnapKV. Notes stand beside the cache they are of.

Nothing is evicted in fact: the tokens that such a method gave up stay in the cache, and the rows of a later prompt,
which is dense, see them again. Evictions then begin anew.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from loki_attention.cache import Watched
from loki_attention.errors import ArgumentError
from loki_attention.kernels import torch_backend
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

    @property
    @abstractmethod
    def noted_of_dense(self) -> str:
        """All that the notes of dense rows depend on: methods that agree in it note the same of a prompt."""

    @abstractmethod
    def watch(self, step: Step) -> None:
        """Note rows that were dense: K is all the tokens that a row sees, and 0 for rows of padding."""


def notes_of(step: Step) -> Watched:
    """The notes of the step's layer; raises ``ArgumentError`` where nobody takes any."""
    if step.layer.watched is None:
        raise ArgumentError("a method that watches every row needs notes of the rows before; run it through attach()")
    return step.layer.watched


def attention_drawn(step: Step, shown: Tensor, sets: int) -> Float[Tensor, "b sets s"]:
    """The exact attention that each slot draws of rows which attend the slots ``shown`` (B, 1 or sets, T, S) to them.

    The sum over the rows and a set's heads, in the precision of attention: add up many rows' a few at a time.
    """
    scores = torch_backend.score_exact(step.query, step.layer.keys, step.scale, sets, step.softmax)
    scores = scores.masked_fill(~shown[:, :, None], -torch.inf)
    share = scores.softmax(-1)
    if step.softmax.sink_logits is not None:
        total = scores.logsumexp(-1, keepdim=True)
        logits = step.softmax.sink_logits.to(total.dtype).reshape(1, sets, -1, 1, 1)
        share = share * torch.sigmoid(total - logits)
    # Rows that are shown nothing have no share.
    return share.nan_to_num().sum((2, 3))
