"""What an attached model did: layers, steps by reason, tokens and bytes read against dense, memory."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loki_attention.cache import LayerCache
from loki_attention.integrations.huggingface.monitor import MonitorReport
from loki_attention.integrations.huggingface.sparse_rows import BELOW, COVERED, SparseRows, Tensors
from loki_attention.integrations.huggingface.static_counts import Steps
from loki_attention.kernels.ops import Backend
from loki_attention.methods import Answer, Method


@dataclass(slots=True)
class Tally:
    """Running counts of one layer. A step is one forward of the layer; rows, tokens and bytes sum over sequences."""

    sparse_steps: int = 0
    dense_steps: Counter[str] = field(default_factory=Counter)
    sparse_rows: int = 0
    tokens_read: int = 0
    tokens_cached: int = 0
    bytes_read: Tensor | float = 0.0  # summed where it lies: reading it would wait for a device
    bytes_dense: float = 0.0
    kept: "KeptMass" = field(default_factory=lambda: KeptMass())

    def add_step(self, method: Method, tensors: Tensors, found: SparseRows, answer: Answer) -> None:
        """Count one sparse step of a layer."""
        kv_heads = tensors.keys.shape[1]
        row_bytes = tensors.keys.shape[3] * tensors.keys.element_size()
        cached, read = found.totals
        self.sparse_steps += 1
        self.sparse_rows += found.tokens_cached.numel()
        self.tokens_cached += cached
        self.tokens_read += read
        group = tensors.query.shape[1] // kv_heads
        read_bytes = method.read_bytes(found.tokens_cached, found.tokens_read, group, row_bytes)
        self.bytes_read = self.bytes_read + kv_heads * read_bytes.sum(dtype=torch.float64)
        self.bytes_dense += float(2 * kv_heads * row_bytes * cached)
        if answer.kept is not None:
            kept = answer.kept.transpose(1, 2)
            self.kept.add(kept if found.all_active else kept[found.active])

    def add_steps(self, method: Method, steps: Steps, sizes: tuple[int, int, int]) -> None:
        """Count steps over a static cache; ``sizes`` are key heads, query heads a key head, and a key's bytes."""
        kv_heads, group, row_bytes = sizes
        self.sparse_steps += steps.sparse
        self.sparse_rows += steps.rows
        self.tokens_cached += steps.tokens_cached
        self.tokens_read += steps.tokens_read
        # What a row reads grows evenly with its tokens and K, from what it reads of none.
        all_rows, of_none = (
            float(method.read_bytes(torch.tensor(tokens), torch.tensor(k), group, row_bytes))
            for tokens, k in ((steps.tokens_cached, steps.tokens_read), (0, 0))
        )
        read = all_rows + (steps.rows - 1) * of_none
        self.bytes_read = self.bytes_read + kv_heads * read
        self.bytes_dense += float(2 * kv_heads * row_bytes * steps.tokens_cached)
        for reason, count in ((COVERED, steps.covered), (BELOW, steps.below)):
            if count:
                self.dense_steps[reason] += count


class KeptMass:
    """The tail's estimates of the attention mass kept, summed where they lie: reading them would wait for a device."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count: Tensor | int = 0
        self._worst: Tensor | float = torch.inf

    def add(self, kept: Tensor) -> None:
        """Count estimates of any shape; what is not a number has no estimate."""
        known = kept.isnan().logical_not()
        self._sum = self._sum + kept.nansum(dtype=torch.float64)
        self._count = self._count + known.sum()
        worst = torch.where(known, kept, torch.inf).amin().double()
        self._worst = worst if isinstance(self._worst, float) else torch.minimum(self._worst, worst)

    def add_sums(self, total: float, count: int, worst: float) -> None:
        """Count ``count`` estimates by their sum and the worst of them."""
        self._sum, self._count = self._sum + total, self._count + count
        self._worst = min(self._worst, worst) if isinstance(self._worst, float) else self._worst.clamp(max=worst)

    def read(self) -> tuple[float, float] | None:
        """Mean and worst, None without any estimate."""
        count = int(self._count)
        return (float(self._sum) / count, float(self._worst)) if count else None


class Memory(NamedTuple):
    """Bytes of a cache's K/V buffers, twins and tail sums over its layers; slots a layer holds and uses."""

    cache: int = 0
    twins: int = 0
    sums: int = 0
    capacity: int = 0
    used: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.cache + self.twins + self.sums

    @classmethod
    def of(cls, stores: Iterable[LayerCache]) -> "Memory":
        """The memory of a cache's layers."""
        held = list(stores)
        capacity, used = max((s.capacity for s in held), default=0), max((s.length for s in held), default=0)
        return cls.summed((store.bytes for store in held), capacity, used)

    @classmethod
    def summed(cls, sizes: Iterable[Mapping[str, int]], capacity: int, used: int) -> "Memory":
        """The memory of layers of these sizes, as stores give them."""
        by_part = list(sizes)
        cache, twins, sums = (sum(size[name] for size in by_part) for name in ("cache", "twins", "sums"))
        return cls(cache, twins, sums, capacity, used)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One layer: whether it may be sparse, why not, its counts, and the tail's estimates of the mass kept."""

    layer: int
    sparse: bool
    reason: str
    sparse_steps: int
    dense_steps: Mapping[str, int]
    sparse_rows: int
    tokens_read: int
    tokens_cached: int
    bytes_read: float
    bytes_dense: float
    mean_mass: float | None
    worst_mass: float | None

    @classmethod
    def of(cls, layer: int, tally: Tally, *, sparse: bool, reason: str) -> "LayerReport":
        """A snapshot of a layer's tally."""
        mean, worst = tally.kept.read() or (None, None)
        apart = ("kept", "dense_steps", "bytes_read")
        counts = {name: getattr(tally, name) for name in Tally.__slots__ if name not in apart}
        counts["bytes_read"], steps = float(tally.bytes_read), dict(tally.dense_steps)
        return cls(
            layer=layer, sparse=sparse, reason=reason, dense_steps=steps, mean_mass=mean, worst_mass=worst, **counts
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A snapshot of an attached model's work. ``simulated`` says what of the method is, so that its time says nothing.

    ``bytes_*`` of reading cover sparse rows only, beside dense ones' need.
    ``other_layers`` have no full attention and are left alone, each with its kind. ``monitor`` is None before its first
    check. ``memory`` is that of the cache of the last forward; ``peak_bytes`` the most that any forward's cache held. Of
    a tensor-parallel model all of it is this process's: its own heads.
    """

    method: str
    budget: str
    planes: str | None
    tail: str
    simulated: str | None
    dense_below: int
    backend: Backend
    layers: tuple[LayerReport, ...]
    other_layers: Mapping[int, str]
    monitor: MonitorReport | None
    memory: Memory
    peak_bytes: int

    @property
    def _threshold(self) -> str:
        return f", dense below {self.dense_below} tokens" if self.dense_below else ""

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the layers that may be sparse."""
        return tuple(layer.layer for layer in self.layers if layer.sparse)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Indices of the layers that stay dense."""
        return tuple(layer.layer for layer in self.layers if not layer.sparse)

    @property
    def sparse_steps(self) -> int:
        """Sparse steps over all layers."""
        return sum(layer.sparse_steps for layer in self.layers)

    @property
    def read_fraction(self) -> float | None:
        """Bytes read by sparse rows over what dense attention would have read for them; None without any."""
        dense = sum(layer.bytes_dense for layer in self.layers)
        return sum(layer.bytes_read for layer in self.layers) / dense if dense else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        fields = asdict(self)
        return fields | {
            "backend": self.backend._asdict(),
            "monitor": None if self.monitor is None else self.monitor.to_dict(),
            "memory": self.memory._asdict(),
            "read_fraction": self.read_fraction,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.method}, {self.budget}, planes {self.planes or '-'}, tail {self.tail}{self._threshold}",
            *([f"simulated, not to be timed: {self.simulated}"] if self.simulated else []),
            f"backend {self.backend.name}: {self.backend.reason}",
            f"{'layer':>5}  {'mode':<6}  {'sparse steps':>12}  {'tokens read':>12}  {'bytes read':>10}  {'mass kept':>9}"
            "  dense steps",
        ]
        for layer in self.layers:
            tokens = f"{layer.tokens_read / layer.tokens_cached:.1%}" if layer.tokens_cached else "-"
            read = f"{layer.bytes_read / layer.bytes_dense:.1%}" if layer.bytes_dense else "-"
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(layer.dense_steps.items()))
            mode = "sparse" if layer.sparse else "dense"
            mass = "-" if layer.mean_mass is None else f"{layer.mean_mass:.1%}"
            lines.append(
                f"{layer.layer:>5}  {mode:<6}  {layer.sparse_steps:>12}  {tokens:>12}  {read:>10}  {mass:>9}  {reasons}"
            )
        lines += [f"{layer:>5}  left alone: {kind}" for layer, kind in sorted(self.other_layers.items())]
        if self.monitor is not None:
            lines.append(str(self.monitor))
        memory = self.memory
        lines.append(
            f"memory: K/V {_mib(memory.cache)}, twins {_mib(memory.twins)}, tail {_mib(memory.sums)}, peak "
            f"{_mib(self.peak_bytes)}; {memory.used} of {memory.capacity} slots a layer in use"
        )
        return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
