"""One schema for every number this project publishes: what was measured, how surely, and on what machine.

Knows how results are written and read; knows nothing of how they come about or how sure they are (``intervals``).
"""

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PureWindowsPath
from types import NoneType
from typing import Any, NamedTuple

import torch

from loki_attention.errors import ArgumentError
from loki_attention.files import written_whole
from loki_attention.intervals import Interval

SCHEMA_VERSION = 1

Setting = str | int | float | None

_ABSOLUTE = re.compile(r"/|~|[A-Za-z]:[\\/]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measured number.

    ``value`` in ``unit``, over ``n`` questions, windows or runs drawn by ``seed`` (``None``: nothing was drawn);
    ``read_bytes``: cache bytes read a decode step, where it was measured; ``config``: what else tells this result
    from its neighbours (method, budget, planes, length); ``items``: the value of each of the n, where they were kept,
    for paired comparisons. Raises ``ArgumentError`` for a value that is not finite.
    """

    metric: str
    value: int | float
    unit: str
    n: int
    seed: int | None = None
    interval: tuple[int | float, int | float] | None = None
    read_bytes: int | float | None = None
    config: Mapping[str, Setting] = field(default_factory=dict)
    items: tuple[int | float, ...] | None = None

    def __post_init__(self) -> None:
        numbers = [self.value, *(self.interval or ()), self.read_bytes or 0, *(self.items or ())]
        numbers += [setting for setting in self.config.values() if isinstance(setting, float)]
        if not all(math.isfinite(number) for number in numbers):
            raise ArgumentError(f"{self.metric}: a result must be made of finite numbers; got {numbers}")
        if self.n < 1:
            raise ArgumentError(f"{self.metric}: a result over {self.n} items is none; n must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the items as one text, six digits each, so that a file stays readable."""
        items = None if self.items is None else " ".join(f"{item:.6g}" for item in self.items)
        return {**asdict(self), "items": items}


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a result was measured on and with; ``date`` is UTC, to the second, as 2026-01-31T12:00:00Z."""

    command: str
    hardware: str
    threads: int
    dtype: str | None
    versions: Mapping[str, str]
    commit: str
    date: str


class SavedResults(NamedTuple):
    """What a results file holds."""

    results: tuple[Result, ...]
    environment: Environment


def environment(command: str | None = None, *, dtype: str | None = None) -> Environment:
    """The environment of this process.

    ``command`` defaults to how the process was started; in either, absolute paths are cut to their last part.
    ``hardware`` is the processor, its cores and the GPU, if any; ``commit`` the project's, with ``+changes`` where
    tracked files differ (saved results apart), or ``unknown`` outside a checkout. The model's ``dtype`` is the caller's.
    """
    words = sys.argv if command is None else shlex.split(command)
    return Environment(
        command=shlex.join(_without_folders(word) for word in words),
        hardware=hardware(),
        threads=torch.get_num_threads(),
        dtype=dtype,
        versions={
            "python": platform.python_version(),
            **{name: installed_version(name) for name in ("torch", "transformers", "loki-attention")},
        },
        commit=_commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def hardware() -> str:
    """The processor, its cores and the GPU, if any."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.M) if information.exists() else None
    parts = [named[1].strip() if named else cpu, f"{os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return ", ".join(parts)


def save_results(path: str | os.PathLike[str], results: Sequence[Result], environment: Environment) -> None:
    """Write results and environment as JSON: whole or not at all. Makes the folder; replaces an older file."""
    content = {
        "schema": SCHEMA_VERSION,
        "environment": asdict(environment),
        "results": [result.to_dict() for result in results],
    }
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with written_whole(Path(path)) as draft:
        draft.write_text(text, encoding="utf-8")


def load_results(path: str | os.PathLike[str]) -> SavedResults:
    """The results and environment of a file that ``save_results`` wrote.

    Raises ``ArgumentError`` for a path that is not there, what is no JSON, another schema version, and fields that
    are missing, unknown or of another type.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror}; give the path of a results file") from None
    except ValueError:
        raise ArgumentError(f"{path} is no JSON file, so no results file; give one that save_results wrote") from None
    version = content.get("schema") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        found = "no schema version" if version is None else f"schema version {version!r}"
        raise ArgumentError(f"{path} has {found}; this version reads {SCHEMA_VERSION}: write the results again")
    if not isinstance(content.get("results"), list):
        raise ArgumentError(f"{path} has no list of results: it is damaged; write the results again")
    results = []
    for number, record in enumerate(content["results"]):
        # Files from before items were kept have none.
        record = {"items": None, **record} if isinstance(record, dict) else record
        checked = _checked(record, _RESULT_CHECKS, f"{path}, result {number}")
        interval, items = checked.pop("interval"), checked.pop("items")
        bounds = None if interval is None else Interval(*map(float, interval))
        results.append(Result(interval=bounds, items=None if items is None else _numbers(items), **checked))
    return SavedResults(
        tuple(results), Environment(**_checked(content.get("environment"), _ENVIRONMENT_CHECKS, f"{path}, environment"))
    )


def _of(*types: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, types) and not isinstance(value, bool)


def _mapping_of(*types: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(_of(*types), value.values()))


def _numbers(text: str) -> tuple[int | float, ...]:
    return tuple(int(word) if word.isdecimal() else float(word) for word in text.split())


def _is_numbers(value: object) -> bool:
    return value is None or (isinstance(value, str) and re.fullmatch(r"[-+.e0-9 ]+", value) is not None)


def _is_interval(value: object) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_of(int, float), value)))


_RESULT_CHECKS = {
    "metric": _of(str),
    "value": _of(int, float),
    "unit": _of(str),
    "n": _of(int),
    "seed": _of(int, NoneType),
    "interval": _is_interval,
    "read_bytes": _of(int, float, NoneType),
    "config": _mapping_of(str, int, float, NoneType),
    "items": _is_numbers,
}
_ENVIRONMENT_CHECKS = {
    "command": _of(str),
    "hardware": _of(str),
    "threads": _of(int),
    "dtype": _of(str, NoneType),
    "versions": _mapping_of(str),
    "commit": _of(str),
    "date": _of(str),
}


def _checked(record: object, checks: Mapping[str, Callable[[object], bool]], place: str) -> dict[str, Any]:
    """A copy of ``record``, whose fields are exactly those of ``checks`` and pass them."""
    if not isinstance(record, dict):
        raise ArgumentError(f"{place}: no record of named fields; the file is damaged, write the results again")
    for name in [*checks, *record]:
        if name not in record or name not in checks:
            what = "is missing" if name in checks else "is unknown"
            raise ArgumentError(f"{place}: field {name!r} {what}; known fields: {', '.join(checks)}")
        if not checks[name](record[name]):
            raise ArgumentError(f"{place}: field {name!r} has {record[name]!r}, which is of another type")
    return dict(record)


def _without_folders(word: str) -> str:
    """A word of a command line with absolute paths, also those after ``=`` and ``,``, cut to their last part."""
    return "".join(
        PureWindowsPath(part).name if _ABSOLUTE.match(part) and part.strip("/") else part
        for part in re.split(r"([=,])", word)
    )


def installed_version(name: str) -> str:
    """The version of a distribution, "not installed" where it is not: a checkout on the path alone is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the checkout this file is tracked in: an installed copy inside another checkout has none."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return "unknown"
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)*results/*.json")
    return f"{commit}+changes" if changes else commit or "unknown"


def _git(*arguments: str) -> str | None:
    """What git prints, run where this file lies; ``None`` where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
