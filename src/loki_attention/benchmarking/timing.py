"""The conditions of a measurement: how busy the machine was with other things, and what it can do.

Interleaved medians from cold caches are ``kernels.stopwatch``; this says whether to believe them.
"""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from loki_attention.errors import LokiWarning
from loki_attention.kernels import native
from loki_attention.kernels.stopwatch import Timing, cache_bytes, interleaved
from loki_attention.results import Setting

__all__ = ["MachineLoad", "Timing", "interleaved", "machine", "watched"]

_BUSY_SHARE = 0.05
_STAT = Path("/proc/stat")
_IDLE_FIELDS = (3, 4)


@dataclass(slots=True)
class MachineLoad:
    """Load averages of the last minute before and after, and the share of all CPU time that others took in between.

    ``others`` counts other processes and what the host took away; None where the system does not say.
    """

    before: float
    after: float = 0.0
    others: float | None = None

    @property
    def settings(self) -> dict[str, Setting]:
        """The same, for a result's ``config``."""
        return {"load_before": self.before, "load_after": self.after, "others_cpu": self.others}


class _Used(NamedTuple):
    """CPU seconds of the whole machine, busy and in all, and of this process."""

    busy: float
    total: float
    own: float


@contextmanager
def watched() -> Iterator[MachineLoad]:
    """Yield the load, complete at the end of the block; warns (``LokiWarning``) where the machine was not idle.

    Load averages count this process too: what tells is the share of CPU time that others took.
    """
    load, start = MachineLoad(os.getloadavg()[0]), _used()
    yield load
    end = _used()
    load.after = os.getloadavg()[0]
    if start is None or end is None or end.total <= start.total:
        return
    others = (end.busy - start.busy - (end.own - start.own)) / (end.total - start.total)
    load.others = max(0.0, others)
    if load.others > _BUSY_SHARE:
        warnings.warn(
            f"the machine was not idle: other processes took {load.others:.0%} of its CPU time (load {load.before:.2f} "
            f"before, {load.after:.2f} after); measure again on an idle one",
            LokiWarning,
            stacklevel=3,
        )


def machine() -> dict[str, Setting]:
    """What the machine offers: instruction set in use, the CPU's features, threads, bytes of the largest cache."""
    return {
        "isa": native.isa() if native.available() else None,
        "cpu_features": " ".join(native.cpu_features()) if native.available() else None,
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(),
    }


def _used() -> _Used | None:
    if not _STAT.exists():
        return None
    ticks = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    second = os.sysconf("SC_CLK_TCK")
    idle = sum(ticks[field] for field in _IDLE_FIELDS)
    return _Used((sum(ticks) - idle) / second, sum(ticks) / second, time.process_time())
