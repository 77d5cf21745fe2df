"""The GPU benchmark on tiny shapes in the interpreter: everything runs, is checked and is written; no time means anything."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loki_attention.benchmarking import gpu_attention
from loki_attention.benchmarking.gpu_attention import GpuSuite, cases_of_record, measure
from loki_attention.benchmarking.gpu_hardware import hardware_questions
from loki_attention.benchmarking.layers import Case, Heads
from loki_attention.errors import LokiError
from loki_attention.kernels.triton import availability
from loki_attention.results import load_results

if not availability.interpreted() or availability.problem() is not None:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
CASE = Case(heads=Heads(2, 1, 64), batch=1, tokens=128)
SUITE = GpuSuite(cases=[CASE], planes=("16@4",), fractions=("1/2",), rounds=1, rotated_bytes=1, flex=False)


@pytest.mark.slow
def test_a_case_is_checked_and_has_its_stages() -> None:
    found = measure(CASE, SUITE, CPU)
    by_name = {one.config["provider"]: one for one in found.results}
    assert {"sdpa", "dense (ours)", "loki", "open", "score", "select", "attend"} <= by_name.keys()
    loki = by_name["loki"]
    assert 0 < loki.config["kept_mass"] <= 1 and loki.config["error"] < 0.01
    assert loki.read_bytes is not None and loki.config["byte_ideal"] == CASE.kv_bytes / loki.read_bytes
    assert {one.name for one in found.left_out} >= {"flashinfer"}


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_attention, "_reference", lambda layer, scale: torch.ones_like(layer.query).float())
    with pytest.raises(LokiError, match="nothing is timed"):
        measure(CASE, SUITE, CPU)


def test_the_questions_to_a_chip_have_answers() -> None:
    found = hardware_questions(CPU, size_bytes=1 << 18, rounds=1)
    assert {str(one.config["question"])[:2] for one in found} == {"M1", "M2", "M3", "M4"}


def test_the_matrix_leaves_out_what_does_not_fit() -> None:
    every = cases_of_record(1 << 40)
    assert len(every) == 11
    assert all(2 * case.kv_bytes <= 1 << 30 for case in cases_of_record(1 << 30))


@pytest.mark.slow
def test_the_whole_benchmark_runs_dry(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--dry-run", "-o", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in ("gpu-hardware", "gpu-attention", "gpu-generate"):
        assert load_results(tmp_path / f"{name}.json").results
    subprocess.run(
        [sys.executable, "benchmarks/tune_triton.py", "--dry-run"], cwd=ROOT, check=True, capture_output=True
    )
