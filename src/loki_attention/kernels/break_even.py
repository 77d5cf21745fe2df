"""From which length on a sparse step is faster than dense attention here: measured once per machine and shape, then kept.

Knows Loki's step on the native or the Triton kernels, with the low-rank key of the new token, and their dense decode. On a
GPU steps that are launched one by one and captured ones are told apart: a sparse step has more to launch. Nothing here
depends on a model's values: packed keys are random bytes, so the selection is random, the worst case for memory.
"""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loki_attention.core.budget import Budget
from loki_attention.core.encoder import Encoder
from loki_attention.core.planes import Planes
from loki_attention.core.tail import TailSums, check_tail, covered_tokens
from loki_attention.errors import ArgumentError, LokiWarning, check_tokens
from loki_attention.files import written_whole
from loki_attention.kernels import gpu_clock, native
from loki_attention.kernels.native import NativeEncoder, Spans
from loki_attention.kernels.native_extension import thread_count
from loki_attention.kernels.stopwatch import interleaved
from loki_attention.kernels.triton import availability
from loki_attention.kernels.triton.encoder import TritonEncoder
from loki_attention.results import hardware, installed_version

NEVER = 1 << 62
"""The break-even where the sparse step is not faster at any length that was measured: above any number of tokens."""
ROUNDS = 7
"""Timed calls of each step at each length."""
_FILE_VERSION = 1
_SHORTEST, _LONGEST = 256, 65536
_MOST_BYTES = 1 << 29
_GRAIN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEvenShape:
    """What a break-even depends on beside the machine.

    ``planes`` as text, ``dtype`` of K and V. ``batch`` counts as the next power of two, ``threads`` default to torch's.
    ``backend`` is native or triton; ``captured``: of steps in a CUDA graph, where launching costs nothing.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    planes: str
    budget: Budget
    tail: str = "linear"
    batch: int = 1
    threads: int | None = None
    backend: str = "native"
    captured: bool = False

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "batch"):
            check_tokens(name, getattr(self, name), least=1, unit=name)
        if self.heads % self.kv_heads:
            raise ArgumentError(f"{self.heads} heads do not share {self.kv_heads} key heads evenly; give a multiple")
        if self.captured and self.backend != "triton":
            raise ArgumentError(
                f"captured steps are those of the triton backend, got {self.backend!r}; leave captured out"
            )
        Planes.parse(self.planes).check_fits(self.head_dim)
        check_tail(self.tail)

    @property
    def bucket(self) -> int:
        """The batch that is measured: the next power of two.

        >>> shape = dict(heads=8, kv_heads=2, head_dim=64, dtype=torch.float32, planes="32@4", budget=Budget(tokens=64))
        >>> [BreakEvenShape(**shape, batch=batch).bucket for batch in (1, 3, 8)]
        [1, 4, 8]
        """
        return 1 << (self.batch - 1).bit_length()

    @property
    def device(self) -> torch.device:
        """Where the backend's kernels run."""
        return torch.device("cuda" if self.backend == "triton" and not availability.interpreted() else "cpu")

    @property
    def key(self) -> str:
        """The name of this shape on this machine and with this version."""
        budget = ",".join(f"{name}={value}" for name, value in asdict(self.budget).items())
        parts = (
            installed_version("loki-attention"), hardware(), self._runs_on, f"threads={thread_count(self.threads)}",
            f"{self.heads}/{self.kv_heads}/{self.head_dim}", str(self.dtype), self.planes, self.tail, budget,
            f"batch={self.bucket}", *(["captured"] if self.captured else []),
        )  # fmt: skip
        return "; ".join(parts)

    @property
    def _runs_on(self) -> str:
        return (
            native.isa()
            if self.backend == "native"
            else f"{availability.description()}, triton {availability.version()}"
        )


class Point(NamedTuple):
    """Seconds of one layer's decode step at a length: the 20th percentile, which a busy machine moves least."""

    tokens: int
    dense: float
    sparse: float


class BreakEven(NamedTuple):
    """From how many tokens on the sparse step is faster (``NEVER``: at none measured), and what was measured."""

    tokens: int
    points: tuple[Point, ...]


def break_even(shape: BreakEvenShape, *, refresh: bool = False) -> int:
    """From how many tokens on Loki's step is faster than dense attention: what sequences shorter than that should use.

    Measured in a few hundred milliseconds where it is not known yet or ``refresh`` is asked for, and kept in the user's
    cache folder (``cache_file()``). ``NEVER`` where dense is faster at every length measured. Raises ``ArgumentError``
    where the native kernels are not there or have none for these planes.
    """
    return curve(shape, refresh=refresh).tokens


def curve(shape: BreakEvenShape, *, refresh: bool = False, whole: bool = False) -> BreakEven:
    """The break-even with its points; ``whole`` measures on beyond it, up to the longest length."""
    path, key = cache_file(), shape.key
    kept = {} if refresh else _read(path)
    longest = _lengths(shape)[-1]
    if key in kept and (not whole or kept[key].points[-1].tokens >= longest):
        return kept[key]
    found = measure(shape, whole=whole)
    _write(path, {**_read(path), key: found})
    return found


def cache_file() -> Path:
    """Where break-evens are kept: below ``XDG_CACHE_HOME``, by default ``~/.cache``."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "loki-attention" / "break-even.json"


def measure(shape: BreakEvenShape, *, whole: bool = False, rounds: int = ROUNDS) -> BreakEven:
    """The break-even, measured now: lengths double until the sparse step was faster twice in a row."""
    layer, other, points = _Layer(shape), _Layer(shape), list[Point]()
    other.fill(_SHORTEST)
    before = {"dense": other.dense(_SHORTEST), "sparse": other.sparse(_SHORTEST)}
    for tokens in _lengths(shape):
        layer.fill(tokens)
        calls = {"dense": layer.dense(tokens), "sparse": layer.sparse(tokens)}
        if shape.backend == "triton":
            alone = {name: [call] for name, call in calls.items()}
            timed = gpu_clock.interleaved(alone, shape.device, rounds=rounds, captured=shape.captured)
        else:
            timed = interleaved(calls, rounds=rounds, before=before, threads=shape.threads)
        points.append(Point(tokens, timed["dense"].p20, timed["sparse"].p20))
        if not whole and len(points) > 1 and all(point.sparse < point.dense for point in points[-2:]):
            break
    return BreakEven(crossing(points), tuple(points))


def crossing(points: Sequence[Point]) -> int:
    """The length from which on every point's sparse step is faster, to the next multiple of 64 tokens.

    Between the last point where it is not and the first where it is, dense over sparse is taken as a straight line.

    >>> crossing([Point(256, 1.0, 1.5), Point(512, 1.0, 1.0 / 3)]), crossing([Point(256, 2.0, 1.0)])
    (320, 256)
    >>> crossing([Point(256, 1.0, 0.9), Point(512, 1.0, 1.1)]) == NEVER
    True
    """
    losing = [i for i, point in enumerate(points) if point.sparse >= point.dense]
    if not losing:
        return points[0].tokens
    if losing[-1] + 1 == len(points):
        return NEVER
    before, after = points[losing[-1]], points[losing[-1] + 1]
    low, high = before.dense / before.sparse, after.dense / after.sparse
    tokens = before.tokens + (after.tokens - before.tokens) * (1 - low) / (high - low)
    return min(after.tokens, -(-int(tokens) // _GRAIN) * _GRAIN)


def _lengths(shape: BreakEvenShape) -> list[int]:
    """Powers of two up to the longest whose K and V stay below half a gigabyte; at least two."""
    token_bytes = 2 * shape.bucket * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    longest = min(_LONGEST, _MOST_BYTES // token_bytes)
    lengths, tokens = [_SHORTEST, 2 * _SHORTEST], 4 * _SHORTEST
    while tokens <= longest:
        lengths.append(tokens)
        tokens *= 2
    return lengths


class _Layer:
    """One layer of random content, filled only as far as was measured, and its two steps."""

    def __init__(self, shape: BreakEvenShape) -> None:
        self._shape, self._filled = shape, 0
        batch, dim, longest = shape.bucket, shape.head_dim, _lengths(shape)[-1]
        kind, device = NativeEncoder if shape.backend == "native" else TritonEncoder, shape.device
        self._encoder: Any = kind(_random_encoder(shape).to(device, torch.float32))
        self._query = torch.randn(batch, shape.heads, 1, dim).to(device, shape.dtype)
        rows = (batch, shape.kv_heads, longest, dim)
        self._keys, self._values = (torch.empty(rows, dtype=shape.dtype, device=device) for _ in "kv")
        self._packed = self._encoder.buffer(batch, longest)
        sums = _random_sums(batch, shape.kv_heads, dim, self._encoder.tail_rank)
        self._sums = TailSums(*(tensor.to(device) for tensor in sums))
        self._kernels: Any = native
        self._options: dict[str, Any] = {"threads": shape.threads}
        if shape.backend == "triton":
            self._kernels = import_module("loki_attention.kernels.triton.launch")
            # The one that steps share is replaced when a longer one runs, under a graph that was captured in it.
            layer = (self._query, self._keys, self._values)
            self._options = {"workspace": self._kernels.workspace_of(self._encoder, *layer)}

    def fill(self, tokens: int) -> None:
        """Give the first ``tokens`` slots content: one block over and over, for drawing them all would take seconds."""
        new = slice(self._filled, tokens)
        block = torch.randn(tokens - self._filled, self._shape.head_dim).to(self._shape.device, self._shape.dtype)
        self._keys[:, :, new], self._values[:, :, new] = block, block
        self._packed[:, :, new].random_(256)
        self._filled = tokens

    def dense(self, tokens: int) -> Callable[[], object]:
        """Dense attention over the first ``tokens`` slots."""
        stop = torch.full((self._shape.bucket,), tokens, device=self._shape.device)
        keys, values, scale = self._keys[:, :, :tokens], self._values[:, :, :tokens], self._shape.head_dim**-0.5
        return lambda: self._kernels.dense_decode(self._query, keys, values, Spans(None, stop), scale, **self._options)

    def sparse(self, tokens: int) -> Callable[[], object]:
        """Loki's step over the first ``tokens`` slots, the last one's low-rank key included."""
        shape, stop = self._shape, torch.full((self._shape.bucket,), tokens, device=self._shape.device)
        keys, values, scale = self._keys[:, :, :tokens], self._values[:, :, :tokens], shape.head_dim**-0.5
        k, budget = shape.budget.of_each(stop), shape.budget
        tail = shape.tail if int(covered_tokens(stop).min()) else "none"
        options = {**self._options, "newest": True} if shape.captured else self._options

        def step() -> object:
            if shape.backend == "native":
                native.encode_keys(self._encoder, keys, self._packed, tokens - 1, tokens, threads=shape.threads)
            elif not shape.captured:
                self._encoder.write(keys, self._packed, tokens - 1, tokens)
            return self._kernels.decode_step(
                self._encoder, self._query, keys, values, self._packed, Spans(None, stop), k, scale,
                sinks=budget.sinks, recent=budget.recent, tail=tail, sums=self._sums, **options,
            )  # fmt: skip

        return step


def _random_encoder(shape: BreakEvenShape) -> Encoder:
    planes = Planes.parse(shape.planes)
    kv_heads, dim, rank = shape.kv_heads, shape.head_dim, planes.rank
    query_map, key_map = (torch.randn(kv_heads, dim, rank) / dim**0.5 for _ in range(2))
    return Encoder(
        digest="random",
        planes=planes,
        mean=torch.zeros(kv_heads, dim),
        query_map=query_map,
        key_map=key_map,
        deviations=torch.ones(kv_heads, rank),
        steps=torch.ones(kv_heads, rank),
        kappa=torch.zeros(kv_heads),
    )


def _random_sums(batch: int, kv_heads: int, dim: int, rank: int) -> TailSums:
    shapes = ((batch, kv_heads, dim), (batch, kv_heads, rank), (batch, kv_heads, rank, dim))
    return TailSums(torch.full((batch, 1), 128.0), *(torch.randn(shape) for shape in shapes))


def _read(path: Path) -> dict[str, BreakEven]:
    """What the file holds; nothing where it is missing, damaged or of another version: it is measured again then."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _FILE_VERSION:
            return {}
        return {
            key: BreakEven(int(entry["tokens"]), tuple(Point(*point) for point in entry["points"]))
            for key, entry in content["measured"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(path: Path, measured: dict[str, BreakEven]) -> None:
    content = {"version": _FILE_VERSION, "measured": {key: found._asdict() for key, found in measured.items()}}
    try:
        with written_whole(path) as draft:
            draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"the break-even cannot be kept in {path} ({error.strerror}); it is measured again the next time"
        warnings.warn(message, LokiWarning, stacklevel=4)
