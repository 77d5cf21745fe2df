"""The break-even: where lines cross, what its file keeps, and when it is measured again. Never how long anything takes."""

import json
from dataclasses import replace

import pytest
import torch

from loki_attention.core.budget import Budget
from loki_attention.errors import ArgumentError, LokiWarning
from loki_attention.kernels import break_even as module
from loki_attention.kernels import native, stopwatch
from loki_attention.kernels.break_even import (
    NEVER,
    BreakEven,
    BreakEvenShape,
    Point,
    break_even,
    cache_file,
    crossing,
    curve,
    measure,
)
from loki_attention.kernels.triton import availability, workspace

if not native.available():
    pytest.skip("the native extension is not built", allow_module_level=True)

SHAPE = BreakEvenShape(
    heads=4, kv_heads=2, head_dim=32, dtype=torch.bfloat16, planes="8@4+16@2", budget=Budget(fraction=1 / 8)
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stopwatch, "empty_caches", lambda threads=None: None)
    return tmp_path


@pytest.fixture
def measured(monkeypatch):
    """Calls of ``measure``, which then takes no time."""
    calls = []

    def fake(shape, *, whole=False):
        calls.append((shape, whole))
        longest = module._lengths(shape)[-1]
        points = (Point(256, 1.0, 2.0), Point(longest if whole else 512, 2.0, 1.0))
        return BreakEven(100 * len(calls), points)

    monkeypatch.setattr(module, "measure", fake)
    return calls


def points(*ratios):
    """Points of doubling lengths whose dense step takes so many times as long as the sparse one."""
    return [Point(256 << i, ratio, 1.0) for i, ratio in enumerate(ratios)]


@pytest.mark.parametrize(
    ("ratios", "tokens"),
    [
        ((0.5, 1.5), 384),
        ((0.5, 0.9, 1.1, 2.0), 768),
        ((1.1, 0.9, 1.1), 768),
        ((1.2, 1.3), 256),
        ((0.5, 0.9), NEVER),
        ((2.0, 0.9), NEVER),
        ((0.999, 1.0), NEVER),
    ],
)
def test_the_crossing_is_where_sparse_wins_for_good(ratios, tokens):
    assert crossing(points(*ratios)) == tokens


def test_it_is_measured_once_and_again_when_told(folder, measured):
    assert break_even(SHAPE) == break_even(SHAPE) == 100
    assert len(measured) == 1
    assert break_even(SHAPE, refresh=True) == 200
    assert break_even(SHAPE) == 200
    assert cache_file() == folder / "loki-attention" / "break-even.json"
    assert [path.name for path in cache_file().parent.iterdir()] == ["break-even.json"]


def test_other_shapes_threads_and_machines_are_measured_on_their_own(measured, monkeypatch):
    changes = [
        {"heads": 8}, {"kv_heads": 4}, {"head_dim": 64}, {"dtype": torch.float32}, {"planes": "16@4"}, {"tail": "none"},
        {"budget": Budget(tokens=256)}, {"budget": Budget(fraction=1 / 8, recent=8)}, {"batch": 3}, {"threads": 7},
    ]  # fmt: skip
    for change in [{}, *changes]:
        break_even(replace(SHAPE, **change))
    assert len(measured) == 11
    break_even(replace(SHAPE, batch=4))
    assert len(measured) == 11
    for name, other in (("hardware", lambda: "another CPU"), ("installed_version", lambda name: "99.0")):
        monkeypatch.setattr(module, name, other)
        break_even(SHAPE)
    monkeypatch.setattr(native, "isa", lambda: "portable")
    break_even(SHAPE)
    assert len(measured) == 14


def test_a_whole_curve_is_kept_too(measured):
    assert curve(SHAPE).points[-1].tokens == 512
    longest = module._lengths(SHAPE)[-1]
    assert curve(SHAPE, whole=True).points[-1].tokens == longest
    assert curve(SHAPE, whole=True).points[-1].tokens == longest
    assert [whole for _, whole in measured] == [False, True]
    assert break_even(SHAPE) == 200


@pytest.mark.parametrize("content", ["", "no JSON", "[]", '{"version": 0, "measured": {}}', '{"version": 1}'])
def test_a_damaged_file_is_measured_and_written_anew(measured, content):
    cache_file().parent.mkdir()
    cache_file().write_text(content, encoding="utf-8")
    assert break_even(SHAPE) == 100
    kept = json.loads(cache_file().read_text(encoding="utf-8"))
    assert [entry["tokens"] for entry in kept["measured"].values()] == [100]
    assert list(kept["measured"]) == [SHAPE.key]


def test_a_folder_that_cannot_be_written_is_said(folder, measured):
    (folder / "loki-attention").write_text("a file", encoding="utf-8")
    with pytest.warns(LokiWarning, match="measured again the next time"):
        assert break_even(SHAPE) == 100


def test_the_home_folder_is_the_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file() == tmp_path / ".cache" / "loki-attention" / "break-even.json"


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, dtype=torch.float32, batch=2, tail="mean", planes="16@8")])
def test_measuring_runs_both_steps_at_doubling_lengths(shape, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST", 1024)
    found = measure(shape, whole=True, rounds=1)
    assert [point.tokens for point in found.points] == [256, 512, 1024]
    assert all(point.dense > 0 and point.sparse > 0 for point in found.points)
    assert found.tokens == crossing(found.points)


def test_measuring_stops_once_sparse_won_twice(monkeypatch):
    timing = {name: stopwatch.Timing(value, value, value, 1) for name, value in (("dense", 2.0), ("sparse", 1.0))}
    monkeypatch.setattr(module, "interleaved", lambda *args, **options: timing)
    assert [point.tokens for point in measure(SHAPE).points] == [256, 512]
    assert len(measure(SHAPE, whole=True).points) > 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "do not share"),
        ({"batch": 0}, "batch must be"),
        ({"planes": "16@5"}, "grammar"),
        ({"planes": "64@4"}, "head dim is 32"),
        ({"tail": "long"}, "tail"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ArgumentError, match=message):
        replace(SHAPE, **change)


def test_float_planes_have_no_native_step():
    with pytest.raises(ArgumentError, match="no native kernel"):
        break_even(replace(SHAPE, planes="16@16"))


@pytest.mark.skipif(availability.problem() is not None, reason="the Triton kernels cannot run")
def test_the_triton_kernels_have_a_break_even_of_their_own(monkeypatch):
    ours = replace(SHAPE, backend="triton", heads=2, kv_heads=1)
    assert "triton" in ours.key and ours.key != replace(ours, backend="native").key
    assert ours.key != replace(ours, captured=True).key
    with pytest.raises(ArgumentError, match="captured steps are those of the triton backend, got 'native'"):
        replace(ours, backend="native", captured=True)
    monkeypatch.setattr(module, "_lengths", lambda shape: [256])
    held = dict(workspace._held)
    for shape in (ours, replace(ours, captured=True)):
        found = measure(shape, rounds=1)
        assert [point.tokens for point in found.points] == [256]
        assert all(point.dense > 0 and point.sparse > 0 for point in found.points)
    assert workspace._held == held, "a graph would work in memory that the next longer step replaces"
