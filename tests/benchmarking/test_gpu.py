"""The GPU benchmark on tiny shapes in the interpreter: everything runs, is checked and is written; no time means anything."""

import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from loki_attention.benchmarking import gpu_attention, gpu_dense, gpu_hardware
from loki_attention.benchmarking.gpu_attention import GpuSuite, measure, turns_of_record
from loki_attention.benchmarking.gpu_hardware import hardware_questions
from loki_attention.benchmarking.layers import Case, Heads
from loki_attention.errors import LokiError
from loki_attention.kernels.triton import availability, launch
from loki_attention.kernels.triton.probes import read_rows, room_for
from loki_attention.results import load_results

if not availability.interpreted() or availability.problem() is not None:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
CASE = Case(heads=Heads(2, 1, 64), batch=1, tokens=128)
SUITE = GpuSuite(planes=("16@4",), fractions=("1/2",), rounds=1, rotated_bytes=1, flex=False)


@pytest.mark.slow
def test_a_case_is_checked_and_has_its_stages() -> None:
    found = measure(CASE, SUITE, CPU)
    by_name = {one.config["provider"]: one for one in found.results}
    assert {"sdpa", "dense (ours)", "loki", "open", "score", "select", "attend"} <= by_name.keys()
    loki = by_name["loki"]
    assert 0 < loki.config["kept_mass"] <= 1 and loki.config["error"] < 0.01
    assert loki.read_bytes is not None and loki.config["byte_ideal"] == CASE.kv_bytes / loki.read_bytes
    assert {one.name for one in found.left_out} >= {"flashinfer"}


class PagedDecode:
    """FlashInfer's batch decode as its documentation has it, in plain torch; it records how it was made and planned."""

    made: ClassVar[list["PagedDecode"]] = []

    def __init__(self, space: Tensor, kv_layout: str, *, use_tensor_cores: bool) -> None:
        assert kv_layout == "HND" and space.dtype == torch.uint8
        self.use_tensor_cores, self.plans = use_tensor_cores, 0
        self.made.append(self)

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, *, q_data_type: torch.dtype, kv_data_type: torch.dtype, sm_scale: float,
    ) -> None:  # fmt: skip
        assert all(table.dtype == torch.int32 for table in (indptr, indices, last_page_len))
        self.tables = [indices[start:stop].long() for start, stop in pairwise(indptr.tolist())]
        self.last, self.scale = last_page_len, sm_scale
        self.shape, self.plans = (num_qo_heads, num_kv_heads, head_dim, page_size), self.plans + 1

    def run(self, query: Tensor, paged: tuple[Tensor, Tensor]) -> Tensor:
        heads, kv_heads, dim, page = self.shape
        assert query.shape == (len(self.tables), heads, dim) and (self.last == page).all() and page == 16
        assert all(pages.shape[1:] == (kv_heads, page, dim) for pages in paged)
        keys, values = (
            torch.stack([pages[table].transpose(0, 1).flatten(1, 2) for table in self.tables]) for pages in paged
        )
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query[:, :, None], keys, values, scale=self.scale, enable_gqa=True)[:, :, 0]


def test_flashinfer_decodes_batches_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned once for all copies; what it cannot do is left out with its reason."""
    module = ModuleType("flashinfer")
    module.__spec__ = ModuleSpec("flashinfer", None)
    module.BatchDecodeWithPagedKVCacheWrapper = PagedDecode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(PagedDecode, "made", [])
    case = Case(heads=Heads(4, 2, 64), batch=3, tokens=128)
    copies = gpu_attention.draw_copies(case, CPU, rotated_bytes=1)
    made, _ = gpu_dense.dense_providers(case, copies, flex=False)
    by_name = {one.name: one for one in made}
    for name in ("flashinfer", "flashinfer, tensor cores"):
        assert by_name[name].error is not None and by_name[name].error < 0.01
        for call, layer in zip(by_name[name].calls, copies, strict=True):
            assert call().shape == layer.query.shape
    assert [(one.use_tensor_cores, one.plans) for one in PagedDecode.made] == [(False, 1), (True, 1)]
    monkeypatch.setattr(PagedDecode, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("no such head dim")))
    _, left_out = gpu_dense.dense_providers(case, copies, flex=False)
    assert {one.name: one.reason for one in left_out}["flashinfer"] == "RuntimeError: no such head dim"


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong step of ours ends the case, with a tail too; a wrong rival is left out."""
    decode_step = launch.decode_step
    with (
        monkeypatch.context() as patched,
        pytest.raises(LokiError, match=r"with tail linear is wrong .* nothing is timed"),
    ):
        patched.setattr(launch, "decode_step", lambda *_, tail, **options: decode_step(*_, tail="none", **options))
        measure(CASE, SUITE, CPU)
    rivals = gpu_dense._rivals

    def with_a_wrong_one(case: Case, *, flex: bool) -> object:
        attempts, left_out = rivals(case, flex=flex)
        return {**attempts, "wrong": lambda layer: torch.ones_like(layer.query)}, left_out

    monkeypatch.setattr(gpu_dense, "_rivals", with_a_wrong_one)
    made, _ = gpu_dense.dense_providers(CASE, gpu_attention.draw_copies(CASE, CPU, rotated_bytes=1), flex=False)
    right, wrong = gpu_attention._right(CASE, made)
    assert [one.name for one in wrong] == ["wrong"] and {one.name for one in right} >= {"sdpa", "dense (ours)"}
    with pytest.raises(LokiError, match=r"dense \(ours\) .* nothing is timed"):
        gpu_attention._right(CASE, [replace(one, error=1.0) for one in made])


def test_the_questions_to_a_chip_have_answers() -> None:
    found, left_out = hardware_questions(CPU, size_bytes=1 << 18, rounds=1)
    assert {str(one.config["question"])[:2] for one in found} == {"M1", "M2", "M3", "M4"}
    assert not left_out


def test_a_probe_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(gpu_hardware, "read_rows", no_kernel)
    found, left_out = hardware_questions(CPU, size_bytes=1 << 18, rounds=1)
    assert {str(one.config["question"])[:2] for one in found} == {"M1", "M4"}
    assert {one.reason for one in left_out} == {"RuntimeError: no kernel"} and len(left_out) == 5


def test_the_rows_that_a_probe_reads_are_those_asked_for() -> None:
    rows, order = torch.randn(200, 128).to(torch.bfloat16), torch.randperm(200)[:70]
    totals = room_for(200, CPU)
    read_rows(rows, 32, totals)
    torch.testing.assert_close(totals.sum(), rows[:, :32].float().sum(), atol=1e-3, rtol=1e-4)
    totals = room_for(70, CPU)
    read_rows(rows, 128, totals, order)
    torch.testing.assert_close(totals.sum(), rows[order].float().sum(), atol=1e-3, rtol=1e-4)


def test_the_matrix_begins_with_what_matters_most() -> None:
    """Every length at every batch, each case with FlexAttention once; what is measured twice comes last."""
    turns = turns_of_record()
    assert [(case.batch, case.tokens, flex) for case, flex in turns[:3]] == [(n, 32768, True) for n in (32, 8, 1)]
    with_flex = [case for case, flex in turns if flex]
    assert len(set(with_flex)) == len(with_flex) == 18
    batches = {"32/8/128": {1, 8, 32, 64}, "40/40/128": {8, 32}}
    expected = {(heads, batch, n) for heads, some in batches.items() for batch in some for n in (8192, 32768, 131072)}
    assert {(str(case.heads), case.batch, case.tokens) for case in with_flex} == expected
    assert [case for case, _ in turns[3:18]] == [case for case, _ in turns[18:]] and not any(f for _, f in turns[3:18])


@pytest.mark.slow
def test_the_whole_benchmark_runs_dry(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--dry-run", "-o", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in ("gpu-hardware", "gpu-attention", "gpu-generate"):
        assert load_results(tmp_path / f"{name}.json").results
    subprocess.run(
        [sys.executable, "benchmarks/tune_triton.py", "--dry-run"], cwd=ROOT, check=True, capture_output=True
    )
