"""``loki calibrate`` under ``torchrun``: one basis, one voice; and what it makes of the variables that torchrun sets."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed

from command_line import CALIBRATION, run, write_model
from loki_attention.calibration.ranks import ALONE, Ranks, launched_ranks
from loki_attention.cli.calibrate import _own_device
from loki_attention.data import sample_texts
from loki_attention.errors import ArgumentError

LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FILES = ("basis.safetensors", "moments.safetensors", "manifest.json")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_write_the_basis_of_one(tmp_path: Path) -> None:
    model, text = write_model(tmp_path / "model"), tmp_path / "short.txt"
    text.write_text(sample_texts()[0].read_text(encoding="utf-8")[:3000], encoding="utf-8")
    calibrate = ["calibrate", model, "--text", text, *CALIBRATION, "--json", "-o"]
    alone = run(*calibrate, tmp_path / "alone")
    assert alone.exit_code == 0, alone.stderr
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launch, Path(sys.executable).with_name("loki"), *calibrate, tmp_path / "both"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert both.returncode == 0, both.stderr[-4000:]
    for file in FILES:
        assert (tmp_path / "both" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file
    said, expected = json.loads(both.stdout), json.loads(alone.stdout)
    assert said | {"basis": None} == expected | {"basis": None}
    warned = [line for line in alone.stderr.splitlines() if line.startswith("warning: ")]
    assert warned
    assert [line for line in both.stderr.splitlines() if line.startswith("warning: ")] == warned
    assert both.stderr.count("Expected loss") == 1
    assert not (tmp_path / "both.partial").exists()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without the variables of torchrun, to set some of them in."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_joins_nothing(launched: pytest.MonkeyPatch) -> None:
    for size in (None, "1"):
        if size is not None:
            launched.setenv("WORLD_SIZE", size)
        with launched_ranks() as ranks:
            assert ranks is ALONE
            assert not distributed.is_initialized()


def test_a_group_of_the_callers_is_used_and_left_alone(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("WORLD_SIZE", "2")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with launched_ranks() as ranks:
            assert ranks == Ranks(0, 1)
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "there is no RANK and no MASTER_ADDR and no MASTER_PORT; start them with torchrun"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "but there is no RANK; start"),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "cannot join"),
    ],
)
def test_half_a_launch_is_refused(launched: pytest.MonkeyPatch, variables: dict[str, str], sentence: str) -> None:
    for name, value in variables.items():
        launched.setenv(name, value)
    with pytest.raises(ArgumentError, match=sentence), launched_ranks():
        pass
    assert not distributed.is_initialized()


def test_of_several_processes_each_has_its_own_gpu(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("LOCAL_RANK", "3")
    assert _own_device("cuda", Ranks(3, 4)) == "cuda:3"
    assert _own_device("cuda:1", Ranks(3, 4)) == "cuda:1"
    assert _own_device("cpu", Ranks(3, 4)) == "cpu"
    assert _own_device("cuda", ALONE) == "cuda"
