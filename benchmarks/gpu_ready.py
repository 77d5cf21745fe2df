"""Say what a machine lacks for `make test-gpu` and `make bench-gpu`, and stop there; they set nothing up themselves."""

import importlib.util
import sys

NEEDED = ("torch", "triton", "transformers", "safetensors", "numpy", "jaxtyping", "typer", "rich")
FOR_TESTS = ("pytest", "hypothesis")


def main() -> None:
    """Exit with a message where anything is missing."""
    wanted = NEEDED + (FOR_TESTS if "tests" in sys.argv[1:] else ())
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"missing in {sys.executable}: {', '.join(missing)}; install them, or name another Python: make PYTHON=..."
        )
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} sees no GPU; the same tests run interpreted in `make test` and `make test-all`"
        )
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
