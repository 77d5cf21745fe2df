"""What the Triton kernels compile to, without a GPU: no spills, wide loads, tensor cores where they belong, no more
instructions a token than the design allows nor than were recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loki_attention.kernels.triton import availability
from loki_attention.kernels.triton.compiled import ARCHITECTURES, variants

if availability.version() is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "benchmarks" / "results" / "triton-compiled.json"
QUICK = [
    "score, 32@4+64@2@90",
    "compact@90",
    "dense, bf16, D 128@90",
]


def read(path: Path) -> dict[str, Any]:
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {f"{row['config']['kernel']}@{row['config']['architecture']}": row for row in rows}


def compiled(folder: Path, names: list[str]) -> dict[str, Any]:
    """The statistics of some variants, from a process of its own: here kernels are interpreted."""
    output = folder / "compiled.json"
    command = [sys.executable, "benchmarks/compiled.py", "-o", str(output)]
    command += [part for name in names for part in ("--only", name)]
    environment = {name: value for name, value in os.environ.items() if name != availability.INTERPRETER_VARIABLE}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return read(output)


def check(name: str, ours: Any, recorded: Any) -> None:
    now, then = ours["config"], recorded["config"]
    kernel = name.split(",")[0].split("@")[0]
    assert now["spilled_bytes"] == 0, name
    assert now["load_bytes"] == (8 if kernel == "select" else 16), name
    # Keys and queries are encoded in IEEE float32, which no tensor core has.
    assert (now["tensor_core"] > 0) == (kernel in ("attend", "dense")), name
    assert now["registers"] <= then["registers"] + 16, name
    assert ours["metric"] == recorded["metric"] and ours["value"] <= 1.05 * recorded["value"] + 0.05, name
    assert now["budget"] is None or ours["value"] <= now["budget"], name


def test_some_kernels_compile_as_recorded(tmp_path: Path) -> None:
    found, recorded = compiled(tmp_path, QUICK), read(RECORDED)
    assert sorted(found) == sorted(QUICK)
    for name, ours in found.items():
        check(name, ours, recorded[name])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_as_recorded(architecture: int, tmp_path: Path) -> None:
    names = [f"{variant.name}@{architecture}" for variant in variants()]
    found, recorded = compiled(tmp_path, names), read(RECORDED)
    assert sorted(found) == sorted(names)
    for name, ours in found.items():
        check(name, ours, recorded[name])


def test_the_record_holds_every_variant_and_no_other() -> None:
    names = [f"{variant.name}@{architecture}" for variant in variants() for architecture in ARCHITECTURES]
    assert sorted(read(RECORDED)) == sorted(names)
