"""Medians, their order, and the machine's load: what is counted, never how long it takes."""

import warnings
from functools import partial

import pytest

from loki_attention.benchmarking import timing
from loki_attention.errors import ArgumentError, LokiWarning
from loki_attention.kernels import native, stopwatch

if not native.available():
    pytest.skip("the native extension is not built", allow_module_level=True)


def test_calls_take_turns_from_empty_caches(monkeypatch):
    seen = []
    monkeypatch.setattr(stopwatch, "empty_caches", lambda threads: seen.append("empty"))
    timings = timing.interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=3, warm_up=1)
    rounds = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert len(rounds) == 4 and all(one[::2] == ["empty"] * 2 and sorted(one[1::2]) == ["a", "b"] for one in rounds)
    assert {name: one.rounds for name, one in timings.items()} == {"a": 3, "b": 3}
    assert all(0 <= one.p20 <= one.median <= one.p80 for one in timings.values())


def test_no_call_always_follows_the_same_one(monkeypatch):
    seen = []
    monkeypatch.setattr(stopwatch, "empty_caches", lambda threads: None)
    calls = {name: partial(seen.append, name) for name in "abcd"}
    timing.interleaved(calls, rounds=16, warm_up=0)
    rounds = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert {one[one.index("b") - 1] for one in rounds if one[0] != "b"} == {"a", "c", "d"}


def test_code_is_brought_back_before_the_clock_starts(monkeypatch):
    seen = []
    monkeypatch.setattr(stopwatch, "empty_caches", lambda threads: seen.append("empty"))
    calls, before = (
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")},
        {"b": lambda: seen.append("before b")},
    )
    timing.interleaved(calls, rounds=1, before=before, warm_up=0)
    at = seen.index("b")
    assert seen[at - 2 : at] == ["empty", "before b"] and seen.count("empty") == 2 and seen.count("before b") == 1


def test_no_rounds_are_refused():
    with pytest.raises(ArgumentError, match="rounds must be"):
        timing.interleaved({}, rounds=0)


def test_emptying_reads_more_than_the_caches_hold():
    stopwatch.empty_caches()
    assert stopwatch._other_bytes().numel() >= 2 * (stopwatch.cache_bytes() or 0) or stopwatch.cache_bytes() > 256 << 20


@pytest.mark.parametrize(("busy", "share"), [(0.8, 0.75), (0.05, 0.0)])
def test_a_busy_machine_is_warned_of(monkeypatch, busy, share):
    used = iter([timing._Used(10.0, 100.0, 1.0), timing._Used(10.0 + 100 * busy, 200.0, 6.0)])
    monkeypatch.setattr(timing, "_used", lambda: next(used))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with timing.watched() as load:
            assert load.others is None
    assert load.others == pytest.approx(share)
    assert [one.category for one in caught] == [LokiWarning] * (share > 0.05)
    assert not caught or "took 75% of its CPU time" in str(caught[0].message)


def test_the_machine_is_named():
    here = timing.machine()
    assert here["isa"] == native.isa()
    assert set(here) == {"isa", "cpu_features", "threads", "cache_bytes"}
    used = timing._used()
    assert used is None or used.total > used.busy > 0
