"""The native extension: whether it loads, what the machine can run, and which instruction set is in use."""

import importlib
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from loki_attention.errors import ArgumentError

ISA_VARIABLE = "LOKI_NATIVE_ISA"
"""Environment variable that forces an instruction set: avx512, avx2 or portable."""


def available() -> bool:
    """Whether the extension was built and loads."""
    return problem() is None


def cpu_features() -> tuple[str, ...]:
    """The processor features that the choice of instruction set looks at, those that this machine has."""
    return tuple(extension().features())


def usable_isas() -> tuple[str, ...]:
    """The instruction sets that can run on this machine, the best first."""
    return tuple(extension().usable())


def isa() -> str:
    """The instruction set in use: the one that ``LOKI_NATIVE_ISA`` names, else the best.

    Raises ``ArgumentError`` where the named one cannot run here.
    """
    return _isa_in_use(os.environ.get(ISA_VARIABLE) or None)


def thread_count(wish: int | None) -> int:
    """The threads to use: as many as torch does, unless told."""
    return torch.get_num_threads() if wish is None else wish


def call(operation: Callable[..., Any], *args: object) -> Any:
    """What an operation of the extension returns; what it refuses raises ``ArgumentError``."""
    try:
        return operation(*args)
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def operations(name: str | None) -> Any:
    """The operations of an instruction set; None: of the one in use."""
    return _operations_of(isa() if name is None else name)


@cache
def _operations_of(name: str) -> Any:
    return call(extension().Operations, name)


@cache
def _isa_in_use(wish: str | None) -> str:
    known = usable_isas()
    if wish is None:
        return known[0]
    if wish not in known:
        raise ArgumentError(f"{ISA_VARIABLE} is {wish!r}, which cannot run on this machine; it has {', '.join(known)}")
    return wish


@cache
def problem() -> str | None:
    """Why the extension does not load, or None."""
    try:
        importlib.import_module("loki_attention.kernels._native")
    except ImportError as error:
        return str(error)
    return None


@cache
def extension() -> ModuleType:
    """The extension module; raises ``ArgumentError`` where there is none."""
    why = problem()
    if why is not None:
        raise ArgumentError(f"the native kernels were not built or do not load ({why}); use backend 'torch'")
    return importlib.import_module("loki_attention.kernels._native")
