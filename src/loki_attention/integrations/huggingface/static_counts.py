"""What decode steps over static caches did, counted on the device by the steps themselves and taken from there for a report."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loki_attention.static_cache import fixed


class Steps(NamedTuple):
    """Sparse steps, their rows, tokens cached and read; dense steps that the budget covered, and below dense_below."""

    sparse: int
    rows: int
    tokens_cached: int
    tokens_read: int
    covered: int
    below: int


class Kept(NamedTuple):
    """The tail's estimates of the mass kept in one layer: their sum, how many they are, and the worst."""

    total: float
    estimates: int
    worst: float


class Counts(NamedTuple):
    """What was counted: forwards, those whose mask showed other tokens, steps by budget, estimates by layer."""

    forwards: int
    unlike: int
    steps: tuple[Steps, ...]
    kept: tuple[Kept, ...]


class StaticCounts:
    """Counters of ``layers`` sparse layers and so many budgets, at fixed addresses: a replayed graph counts too."""

    def __init__(self, layers: int, budgets: int, device: torch.device) -> None:
        # Tensors of inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._forwards = fixed(torch.zeros(2, dtype=torch.int64, device=device))
            self._used = fixed(torch.zeros((), dtype=torch.int64, device=device))
            self._steps = fixed(torch.zeros(budgets, len(Steps._fields), dtype=torch.int64, device=device))
            self._kept = fixed(torch.zeros(2, layers, dtype=torch.float64, device=device))
            self._worst = fixed(torch.full((layers,), torch.inf, dtype=torch.float64, device=device))

    def begin_at(self, used: int) -> None:
        """Note how many slots a prompt left in use."""
        self._used.fill_(used)

    def add_forward(self, stop: Tensor, unlike: Tensor | None) -> None:
        """Count a forward that leaves ``stop`` (B,) slots in use; ``unlike``: whether its mask showed other tokens."""
        one = torch.ones_like(stop[0])
        self._forwards.add_(torch.stack([one, torch.zeros_like(one) if unlike is None else unlike.long()]))
        self._used.copy_(stop[0])

    def add_steps(self, tokens: Tensor, budgets: Sequence[Tensor], dense_below: int) -> None:
        """Count a step of every budget's layers, ``tokens`` (B,) cached and K (B,) of them read."""
        above = (tokens >= dense_below).any().long()
        added = []
        for k in budgets:
            sparse = (k < tokens).any().long()
            dense = 1 - sparse
            rows = torch.full_like(sparse, len(tokens))
            counts = [
                sparse,
                sparse * rows,
                sparse * tokens.sum(),
                sparse * k.sum(),
                dense * above,
                dense * (1 - above),
            ]
            added.append(torch.stack(counts))
        self._steps.add_(torch.stack(added))

    def add_kept(self, kept: Sequence[Tensor]) -> None:
        """Count every sparse layer's estimates (B, H, 1); what is not a number has no estimate."""
        masses = torch.stack([mass.to(self._kept.device) for mass in kept]).flatten(1).double()
        known = masses.isnan().logical_not()
        self._kept.add_(torch.stack([masses.nansum(-1), known.sum(-1).double()]))
        self._worst.copy_(torch.minimum(self._worst, torch.where(known, masses, torch.inf).amin(-1)))

    @property
    def used(self) -> int:
        """Slots in use after the last forward; waits for the device."""
        return int(self._used)

    def take(self) -> Counts:
        """Everything counted, from now on counted afresh; waits for the device."""
        (forwards, unlike), steps = self._forwards.tolist(), self._steps.tolist()
        kept = zip(*self._kept.tolist(), self._worst.tolist(), strict=True)
        found = Counts(
            forwards,
            unlike,
            tuple(Steps(*row) for row in steps),
            tuple(Kept(total, int(count), worst) for total, count, worst in kept),
        )
        for tensor in (self._forwards, self._steps, self._kept):
            tensor.zero_()
        self._worst.fill_(torch.inf)
        return found
