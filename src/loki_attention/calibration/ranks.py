"""Work shared out over the processes of ``torch.distributed``, to the result of one process. Knows no model and no text."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

from loki_attention.errors import ArgumentError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run: this one's ``rank`` of ``size``, and the group over which they talk."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and draws."""
        return self.rank == 0

    def each(self, compute: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """``compute`` of every item, in order, in every process; each item is computed by one of them.

        Items go round: of 5 items on 2 processes, rank 1 computes the second and the fourth. All processes must go
        through all results. Sums taken in this order are those of one process, to the last bit.
        """
        for start in range(0, len(items), self.size):
            turn = start + self.rank
            own = compute(items[turn]) if turn < len(items) else None
            yield from self._gathered(own)[: len(items) - start]

    def from_first(self, value: Result) -> Result:
        """The first process's ``value``."""
        return self._gathered(value if self.first else None)[0]

    def check_same(self, value: object) -> None:
        """Raise ``ArgumentError`` in every process unless all have the same ``value``."""
        if len(set(self._gathered(repr(value)))) > 1:
            raise ArgumentError(
                "the processes of this run were given different models, text or settings; give all the same: calibrate "
                "shares out the text itself"
            )

    def _gathered(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.group)
        return values


ALONE = Ranks()
"""One process."""


@contextmanager
def all_ranks() -> Iterator[Ranks]:
    """All processes of an initialised ``torch.distributed``, else this one alone. They talk over gloo: CPU tensors."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        yield ALONE
        return
    # The default of half an hour is no bound on a window of a large model on a slow machine.
    group = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), group)
    finally:
        distributed.destroy_process_group(group)
