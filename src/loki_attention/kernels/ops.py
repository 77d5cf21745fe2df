"""The backends of the decode step, the choice among them, and how many rows go through at once."""

from typing import NamedTuple

import torch

from loki_attention.errors import ArgumentError, unknown_name
from loki_attention.kernels import native_extension
from loki_attention.kernels.native_arguments import ELEMENT_TYPES, LARGEST_GROUP, LARGEST_HEAD_DIM
from loki_attention.kernels.triton import availability

BACKENDS = ("auto", "native", "triton", "torch")
_ELEMENTS_AT_ONCE = 1 << 24


class Backend(NamedTuple):
    """The backend in use and why."""

    name: str
    reason: str


class Work(NamedTuple):
    """What a backend would have to run: tensors' type and place, heads, and what a method finds missing if anything."""

    dtype: torch.dtype
    device: str
    head_dim: int
    group_size: int
    missing: str | None = None


def choose_backend(name: str, work: Work | None = None) -> Backend:
    """The backend for a wish and, where it is known, the work; raises ``ArgumentError`` for one that cannot run.

    ``auto`` takes the Triton kernels on a GPU, the native ones on a CPU, where they can run.
    """
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    if name == "torch":
        return Backend("torch", "asked for")
    # Triton's interpreter is for tests: nobody gets it without asking.
    on_gpu = work is not None and work.device == "cuda"
    kind = name if name != "auto" else "triton" if on_gpu else "native"
    problem = _problem_with_triton(work) if kind == "triton" else _problem_with_native(work)
    if problem is not None:
        if name != "auto":
            raise ArgumentError(f"backend {name!r} cannot run here: {problem}; use 'auto' or 'torch'")
        return Backend("torch", f"no {kind} kernels here: {problem}")
    what = availability.description() if kind == "triton" else f"{native_extension.isa()} kernels for decode steps"
    return Backend(kind, what if name == "auto" else f"asked for, {what}")


def _problem_with_native(work: Work | None) -> str | None:
    """Why the native kernels cannot run, None where they can."""
    missing = native_extension.problem()
    if missing is not None or work is None:
        return missing
    if work.device != "cpu":
        return f"the model is on {work.device}"
    return _problem_with_work(work)


def _problem_with_triton(work: Work | None) -> str | None:
    """Why the Triton kernels cannot run, None where they can."""
    missing = availability.problem(None if work is None else work.device)
    return missing if missing is not None or work is None else _problem_with_work(work)


def _problem_with_work(work: Work) -> str | None:
    """What neither set of kernels can run."""
    if work.dtype not in ELEMENT_TYPES:
        return f"the model is in {str(work.dtype).removeprefix('torch.')}"
    if work.head_dim > LARGEST_HEAD_DIM or work.group_size > LARGEST_GROUP:
        return (
            f"head dim {work.head_dim} and {work.group_size} query heads a key head are beyond {LARGEST_HEAD_DIM} and "
            f"{LARGEST_GROUP}"
        )
    return work.missing


def rows_at_once(heads: int, slots: int, tokens: int, head_dim: int) -> int:
    """How many query rows of a sequence fit in a chunk: about 16M score and gathered elements."""
    return max(1, _ELEMENTS_AT_ONCE // (heads * (slots + 2 * tokens * head_dim)))
