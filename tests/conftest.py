"""What every test stands on: no network, fixed seeds, checked shapes, and the bundled model loaded once."""

import os

# Read once, when these libraries are first imported: they must stand before any import below.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"
# Threads that wait for each other sleep: on a busy machine, spinning made small operations sixty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import importlib.util
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import settings

# Not a test: loads a sanitized build where `make sanitize` says so.
collect_ignore = ["sanitized.py"]

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

if importlib.util.find_spec("beartype") is not None:
    from jaxtyping import install_import_hook

    install_import_hook("loki_attention", "beartype.beartype")

# Without a GPU Triton's kernels are interpreted, which is decided when triton is first imported: not before here.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One thread in each process of a parallel run, two otherwise: the suite is made for two cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

# The same examples in every run, and no limit that a busy machine could break.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Marks are known here rather than in pyproject.toml, which `make test-gpu` does not read."""
    config.addinivalue_line(
        "markers", "slow: takes longer than a few seconds; run by `make test-all`, not by `make test`"
    )
    config.addinivalue_line("markers", "fuzz: thousands of random cases; run by `make fuzz`")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference_model() -> "PreTrainedModel":
    """The bundled model in float32, for reading: a test that changes it must put it back."""
    from transformers import AutoModelForCausalLM

    from loki_attention.data import reference_model_path

    return AutoModelForCausalLM.from_pretrained(reference_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def reference_tokenizer() -> "PreTrainedTokenizerBase":
    """The bundled model's tokenizer."""
    from transformers import AutoTokenizer

    from loki_attention.data import reference_model_path

    return AutoTokenizer.from_pretrained(reference_model_path())
