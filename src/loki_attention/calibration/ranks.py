"""Work shared out over the processes of ``torch.distributed``, to the result of one process. Knows no model and no text."""

import os
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
_LAUNCH_VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """For a program of its own: the processes that ``torchrun`` started, joined for the block, else this one alone.

    They are those that ``WORLD_SIZE`` and the other variables of ``torchrun`` tell of. Nothing is joined, nor left at
    the end, where ``torch.distributed`` is initialised already. Raises ``ArgumentError`` where the variables tell of
    several processes and not how to reach them.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not distributed.is_available() or size == "1":
        yield ALONE
        return
    joined = distributed.is_initialized()
    if not joined:
        _join(size)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        if not joined:
            distributed.destroy_process_group()


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


def _join(size: str) -> None:
    missing = [name for name in _LAUNCH_VARIABLES if not os.environ.get(name)]
    if missing:
        raise ArgumentError(
            f"WORLD_SIZE={size} tells of several processes, but there is no {' and no '.join(missing)}; start them with "
            "torchrun, or unset WORLD_SIZE for one process"
        )
    try:
        distributed.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"cannot join the processes that WORLD_SIZE={size} tells of: {str(error).splitlines()[0]}; start them with "
            "torchrun, or unset WORLD_SIZE for one process"
        ) from error
