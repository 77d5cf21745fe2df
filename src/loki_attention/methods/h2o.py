"""H2O (arXiv:2306.14048): keep the heavy hitters, by the attention they drew so far, and the most recent tokens.

Every row's attention is added up, over what the row saw: everything in the prompt, afterwards what is still kept. A new
token takes the place of the one with the least, which does not come back. As in the paper half of K is recent, at least
the budget's ``recent``; its sinks stay too. The paper evicts before the new token comes, here after: a row reads K tokens
in all. H2O evicts for each head: here one set a KV head, by its group's attention in sum; ``per="query-head"`` is the
paper's rule.

Simulated: nothing is evicted, and the prompt's attention is computed twice. One float32 sum a kept token counts as read.
The notes cannot be taken back: after a crop (rejected drafts), and on a cache filled by others, a step is refused.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loki_attention.cache import Watched
from loki_attention.errors import ModelError
from loki_attention.kernels import torch_backend
from loki_attention.methods.base import Chosen, SelectionMethod, Step
from loki_attention.methods.watching import WatchingMethod, attention_drawn, notes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class H2O(WatchingMethod):
    """Attend the K / 2 most recent tokens and those of the rest, still kept, that drew most attention."""

    name: ClassVar[str] = "h2o"
    row_by_row: ClassVar[bool] = True

    @property
    def noted_of_dense(self) -> str:
        """Dense rows evict nothing: no budget matters."""
        return f"{self.name}, {self.per}"

    def watch(self, step: Step) -> None:
        """Add up the attention of dense rows; they saw everything, so nothing counts as evicted after them."""
        notes = self._notes(step)
        shown = step.rows.visible & (step.k > 0)[..., None]
        notes["mass"] = notes["mass"] + attention_drawn(step, shown[:, None], step.sets(self.per))
        notes["kept"] = notes["kept"] | shown.any(1)[:, None]

    def choose(self, step: Step) -> Chosen:
        """The recent half of K and the heaviest of what is kept; their attention is added up."""
        notes, rows = self._notes(step), step.rows
        rank, count, visible = rows.rank[:, None], rows.tokens[..., None], rows.visible
        recent = torch.clamp(step.k - step.k // 2, min=self.budget.recent)[..., None]
        stays = visible & ((rank < self.budget.sinks) | (rank >= count - recent))
        mass = notes["mass"].masked_fill(~notes["kept"], -torch.inf)[:, :, None]
        ranking = torch.where(stays[:, None], torch.inf, mass)
        indices = torch_backend.top_k(ranking, rows, step.k, torch_backend.Forced(0, 0))
        chosen = ~torch_backend.unselected(indices, rank.shape[-1])
        notes["mass"] = notes["mass"] + attention_drawn(step, chosen, step.sets(self.per))
        seen = visible & (step.k > 0)[..., None]
        notes["kept"] = notes["kept"] & (chosen | ~seen[:, None]).all(2)
        return Chosen(indices)

    def read_bytes(self, tokens: Tensor, k: Tensor, group_size: int, row_bytes: int) -> Tensor:
        """K keys, values and sums of attention for every set, and the tail's sums."""
        sums = 4.0 * self.sets_per_kv_head(group_size) * k.double()
        return sums + SelectionMethod.read_bytes(self, tokens, k, group_size, row_bytes)

    def _notes(self, step: Step) -> dict[str, Tensor]:
        """Attention drawn and whether a token is still kept, (B, sets, S), new slots included."""
        held = notes_of(step)
        if not held.complete:
            raise ModelError(
                "h2o adds up the attention of every row, and rows of this cache went by unseen (filled before attaching, "
                "cropped, or by other settings); start from an empty cache, without assisted generation"
            )
        keys, sets = step.layer.keys, step.sets(self.per)
        new = keys.shape[2] - held.covered
        if new or not held.notes:
            _grow(held, torch.zeros(len(keys), sets, new, dtype=torch.float64, device=keys.device))
        return held.notes


def _grow(held: Watched, nothing: Tensor) -> None:
    """Notes of new slots: no attention yet, and kept."""
    if not held.notes:
        held.notes = {"mass": nothing[..., :0], "kept": nothing[..., :0].bool()}
    fresh = {"mass": nothing, "kept": torch.ones_like(nothing, dtype=torch.bool)}
    held.notes = {name: torch.cat([old, fresh[name]], dim=-1) for name, old in held.notes.items()}
    held.covered += nothing.shape[-1]
