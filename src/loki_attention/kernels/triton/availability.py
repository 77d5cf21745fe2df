"""Whether the Triton kernels can run, and on what. Imports no triton, which takes a second."""

import os
from functools import cache
from importlib import metadata

import torch

INTERPRETER_VARIABLE = "TRITON_INTERPRET"
"""Environment variable that makes Triton interpret kernels on the CPU: for tests, thousands of times as slow."""
LEAST_CAPABILITY = (8, 0)
_TRUE = ("1", "true", "on", "yes", "y")
_LEAST_VERSION = (3, 6)


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on CPU tensors: what Triton itself makes of its variable."""
    return os.environ.get(INTERPRETER_VARIABLE, "").lower() in _TRUE


def problem(device: str | None = None) -> str | None:
    """Why the kernels cannot run (on tensors of this type of device, where it is known), None where they can."""
    if (missing := _problem_with_triton()) is not None:
        return missing
    if interpreted():
        return f"the model is on {device} and Triton interprets on the CPU" if device not in (None, "cpu") else None
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if device not in (None, "cuda"):
        return f"the model is on {device}"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, below {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
    return None


def description() -> str:
    """What the kernels run on."""
    if interpreted():
        return "Triton kernels for decode steps, interpreted on the CPU"
    return f"Triton kernels for decode steps on {torch.cuda.get_device_name()}"


@cache
def version() -> str | None:
    """The version of triton that is installed, None where there is none."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _problem_with_triton() -> str | None:
    found = version()
    if found is None:
        return "triton is not installed"
    if tuple(int(part) for part in found.split(".")[:2]) < _LEAST_VERSION:
        return f"triton {found} is older than {_LEAST_VERSION[0]}.{_LEAST_VERSION[1]}"
    return None
