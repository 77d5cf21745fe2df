"""What the Triton kernels compile to, without a GPU: no spills, wide loads, tensor cores where they belong, no more
instructions a token than the design allows nor than were recorded."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from loki_attention.kernels.triton import availability
from loki_attention.kernels.triton.compiled import ARCHITECTURES, Variant, variants
from loki_attention.kernels.triton.tuning import tuning_for

if availability.version() is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "benchmarks" / "results" / "triton-compiled.json"
HOPPERS_SHARED_BYTES = 227 * 1024
COMPILE = """
import json, sys
from loki_attention.kernels.triton.compiled import Variant, compiled
print(json.dumps([compiled(Variant(**one), 90)._asdict() for one in json.loads(sys.argv[1])]))
"""
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
    run(command)
    return read(output)


def run(command: list[str]) -> str:
    """What a process prints in which kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != availability.INTERPRETER_VARIABLE}
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def statistics(made: list[Variant]) -> list[dict[str, Any]]:
    """The statistics of variants of our own for a Hopper."""
    return json.loads(run([sys.executable, "-c", COMPILE, json.dumps([asdict(one) for one in made])]))


def check(name: str, ours: Any, recorded: Any) -> None:
    now, then = ours["config"], recorded["config"]
    kernel = name.split(",")[0].split("@")[0]
    assert now["spilled_bytes"] == 0, name
    assert now["load_bytes"] == (16 if ours["metric"] == "instructions_per_token" else None), name
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


@pytest.mark.slow
def test_narrow_loads_of_what_is_streamed_are_seen() -> None:
    """Rows of 34 dims end within 16 bytes, so that K and V come 4 at a time; the query comes as wide as ever."""
    dense = next(one for one in variants() if one.name == "dense, bf16, D 64")
    found = statistics([dense, replace(dense, head_dim=34)])
    assert [one["load_bytes"] for one in found] == [16, 4]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "dim"), [("fp32", 256), ("fp32", 128), ("bf16", 256)])
def test_the_cuts_of_the_tests_fit_into_a_hoppers_shared_memory(dtype: str, dim: int) -> None:
    """The widest rows of each type; the first cut has the tuning table's own blocks."""
    from triton_cases import TUNINGS

    common = {"group": 4, "head_dim": dim, "dtype": dtype, "planes": "64@4+128@2" if dim == 256 else "32@4+64@2"}
    sizes = {"HEADS": 1, "VISIBLE": 1, "CAPPED": 0, "SINKS": 0, "SPLITS": 8}
    made = []
    for cut in TUNINGS.values():
        tuning = replace(tuning_for(90, dim, 4 if dtype == "fp32" else 2), **cut.changes)
        block, warps = {**sizes, "BLOCK": tuning.attend_block}, tuning.attend_warps
        tail = {"TAIL": 2, "MASS": 1, "SAMPLE_BLOCK": 128}
        made += [
            Variant(name="attend", kernel="attend", warps=warps, stages=tuning.attend_stages, constants={**block, **tail}, **common),
            Variant(name="dense", kernel="dense", warps=warps, stages=tuning.dense_stages, constants=block, **common),
        ]  # fmt: skip
    found = [one["shared_bytes"] for one in statistics(made)]
    assert len(found) == 4 and all(0 < bytes_ <= HOPPERS_SHARED_BYTES for bytes_ in found), found
