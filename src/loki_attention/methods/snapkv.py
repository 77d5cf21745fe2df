"""SnapKV (arXiv:2404.14469): the last queries of the prompt vote which of its tokens are kept.

The attention of the last rows of the prompt (the budget's ``recent``: the paper's observation window) is added up over
the tokens before them, pooled by the maximum over 7 neighbours, and the best are kept beside that window, K of the
prompt's length in all. Every token after the prompt is kept too: K bounds the prompt alone, and a long answer reads more.
The budget's sinks stay as well. SnapKV keeps for each head: here one set a KV head, by its group's votes in sum;
``per="query-head"`` is the paper's rule. In a later turn's prompt, which is dense, all tokens are seen, and vote anew.

Simulated: nothing is evicted, and the window's attention is computed twice. A prompt that came in parts (chunked prefill)
is judged by the window's rows in the last part. On a cache whose prompt was filled by others, and after a crop into the
prompt, a step is refused.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from loki_attention.errors import ModelError
from loki_attention.kernels import torch_backend
from loki_attention.kernels.rows import Rows
from loki_attention.methods.base import Chosen, Step
from loki_attention.methods.watching import WatchingMethod, attention_drawn, notes_of

POOLED = 7
"""Neighbours whose largest vote a token has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV(WatchingMethod):
    """Attend the tokens of the prompt that its last rows attended, and all tokens since."""

    name: ClassVar[str] = "snapkv"
    serves_paper_rows: ClassVar[bool] = False

    @property
    def noted_of_dense(self) -> str:
        """Of the budget the window alone matters."""
        return f"{self.name}, {self.per}, {self.budget.recent}"

    def budgets(self, rows: Rows, prompt_tokens: Int[Tensor, " b"] | None = None) -> Int[Tensor, "b t"]:
        """K of the prompt and every token since; where no prompt is known, as if all tokens were one."""
        if prompt_tokens is None:
            return self.budget.of_each(rows.tokens)
        since = (rows.tokens - prompt_tokens[:, None]).clamp(min=0)
        return torch.minimum(self.budget.of_each(prompt_tokens)[:, None] + since, rows.tokens)

    def watch(self, step: Step) -> None:
        """Add up the votes of those rows that are the last of a prompt."""
        held, rows = notes_of(step), step.rows
        if held.prompt_tokens is None:
            return
        end = held.prompt_tokens[:, None]
        voting = (rows.tokens > end - max(1, self.budget.recent)) & (rows.tokens <= end) & (step.k > 0)
        if not bool(voting.any()):
            return
        votes = self._votes(step, voting.any(1))
        first = int(voting.any(0).int().argmax())
        last = step._replace(query=step.query[:, :, first:], rows=rows.chunk(first, rows.tokens.shape[1]))
        shown = last.rows.visible & voting[:, first:, None]
        held.notes["votes"] = votes + attention_drawn(last, shown[:, None], step.sets(self.per))
        in_prompt = ((rows.rank >= 0) & (rows.rank < end)).any(0)
        held.covered = max(held.covered, int(in_prompt.nonzero().max()) + 1)

    def choose(self, step: Step) -> Chosen:
        """The prompt's window, its best tokens before, and all since."""
        self.watch(step)
        held, rows = notes_of(step), step.rows
        if held.prompt_tokens is None or "votes" not in held.notes:
            raise ModelError(
                "snapkv needs the queries of the prompt's last rows, and this cache's prompt went by unseen (filled before "
                "attaching, cropped, or by other settings); start from an empty cache, without assisted generation"
            )
        window = held.prompt_tokens[:, None] - self.budget.recent
        stays = (rows.rank >= window) | (rows.rank < self.budget.sinks)
        pooled = _pooled(self._votes(step), rows, window)
        ranking = torch.where(stays[:, None], torch.inf, pooled)[:, :, None].expand(-1, -1, rows.tokens.shape[1], -1)
        return Chosen(torch_backend.top_k(ranking, rows, step.k, torch_backend.Forced(0, 0)))

    def _votes(self, step: Step, counting: Tensor | None = None) -> Tensor:
        """Votes so far (B, sets, S); sequences that are ``counting`` for a prompt not yet voted on start at 0."""
        notes, keys = notes_of(step).notes, step.layer.keys
        ends = notes_of(step).prompt_tokens
        assert ends is not None
        nothing = torch.zeros(len(keys), step.sets(self.per), keys.shape[2], dtype=torch.float64, device=keys.device)
        if "votes" not in notes:
            notes |= {"votes": nothing, "voted_at": torch.full_like(ends, -1)}
        missing = keys.shape[2] - notes["votes"].shape[-1]
        notes["votes"] = torch.nn.functional.pad(notes["votes"], (0, missing))
        if counting is not None:
            anew = counting & (notes["voted_at"] != ends)
            notes["votes"] = torch.where(anew[:, None, None], nothing, notes["votes"])
            notes["voted_at"] = torch.where(anew, ends, notes["voted_at"])
        return notes["votes"]


def _pooled(votes: Tensor, rows: Rows, window: Tensor) -> Tensor:
    """The largest vote among each token's neighbours before the window, (B, sets, S)."""
    rank = rows.rank
    before = (rank >= 0) & (rank < window)
    votes = torch.where(before[:, None], votes, 0.0)
    slots = rows.slots_in_order(rank.shape[1])[:, None].expand(-1, votes.shape[1], -1)
    pooled = torch.nn.functional.max_pool1d(votes.gather(-1, slots), POOLED, stride=1, padding=POOLED // 2)
    return pooled.gather(-1, rank.clamp(min=0)[:, None].expand(-1, votes.shape[1], -1))
