"""A few random steps; ``make fuzz`` runs ten thousand."""

import pytest

import native_cases  # noqa: F401  (skips where the extension is not built)
from loki_attention.kernels import native
from native_fuzz import check_step


@pytest.mark.parametrize("isa", native.usable_isas() if native.available() else [])
@pytest.mark.parametrize("seed", range(20))
def test_random_steps(seed: int, isa: str) -> None:
    check_step(seed, (isa,))
