"""Say what a machine lacks for `make test-gpu` and `make bench-gpu`, and stop there; they set nothing up themselves."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

NEEDED = ("torch", "triton", "transformers", "safetensors", "numpy", "jaxtyping", "typer", "rich")
FOR_TESTS = ("pytest", "hypothesis", "accelerate")
LEAST = {"torch": (2, 11), "transformers": (5, 17), "triton": (3, 6)}


def main() -> None:
    """Exit with a message that names everything that is missing."""
    wanted = NEEDED + (FOR_TESTS if "tests" in sys.argv[1:] else ())
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    missing += [problem for name, least in LEAST.items() if (problem := too_old(name, least)) is not None]
    missing += builds_nothing()
    if missing:
        sys.exit(
            f"missing for {sys.executable}: {'; '.join(missing)}. Install that, or name another Python: make PYTHON=..."
        )
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} sees no GPU; the same tests run interpreted in `make test` and `make test-all`"
        )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LEAST)
    print(f"{torch.cuda.get_device_name()}, {versions}, Python {sys.version.split()[0]}")


def too_old(name: str, least: tuple[int, int]) -> str | None:
    """What to say of a package that is installed in too old a version."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
    needed = ".".join(map(str, least))
    return f"{name} {needed} or newer, not {found}" if tuple(map(int, found.split(".")[:2])) < least else None


def builds_nothing() -> list[str]:
    """What Triton lacks to build its launcher: the C compiler and the header where it looks for them."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    missing = []
    if compiler is None or shutil.which(compiler) is None:
        missing.append(f"a C compiler (CC is {compiler!r})" if compiler else "a C compiler (gcc, clang or CC)")
    if not header.is_file():
        missing.append(f"Python's headers ({header}; Debian: python3-dev)")
    return missing


if __name__ == "__main__":
    main()
