"""The decorator of every kernel and of what kernels call."""

import inspect
from collections.abc import Callable
from typing import Any

import triton

CHANGING = ("first", "stop", "sinks", "recent")
"""Whole numbers that differ from call to call: a kernel is not compiled anew for those that happen to be round."""


def kernel(function: Callable[..., Any]) -> Any:
    """``function`` for Triton to compile or interpret: its very source, without what type checkers wrap around functions.

    Annotations of kernels are for Triton's compiler; nothing that it calls can be checked at run time.
    """
    plain = inspect.unwrap(function)
    changing = [name for name in CHANGING if name in inspect.signature(plain).parameters]
    return triton.jit(plain, do_not_specialize=changing)
