"""The attention suite on tiny shapes: everything is measured, checked first, and saved whole."""

from dataclasses import replace

import pytest
import torch

from loki_attention.benchmarking import attention, timing
from loki_attention.benchmarking.attention import Suite
from loki_attention.benchmarking.comparison import by_case, compared, named
from loki_attention.benchmarking.layers import Case, Heads, draw_layer
from loki_attention.benchmarking.providers import Sparse
from loki_attention.benchmarking.selections import Forced, real_selection
from loki_attention.core.budget import Budget
from loki_attention.errors import ArgumentError, LokiError
from loki_attention.kernels import native
from loki_attention.results import Result, environment, load_results, save_results

if not native.available():
    pytest.skip("the native extension is not built", allow_module_level=True)

HEADS = Heads(4, 2, 64)
SMALL = Suite(
    shapes=[HEADS], batches=[2], lengths=[600], selections=["random"], planes=["16@4+32@2", "128@2"],
    fractions=["1/4", "1/8"], rounds=1, flex=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _not_alone(monkeypatch):
    """Other tests run meanwhile, and need the caches too."""
    monkeypatch.setattr(timing, "_BUSY_SHARE", 2.0)
    monkeypatch.setattr("loki_attention.kernels.stopwatch.empty_caches", lambda threads=None: None)


@pytest.mark.parametrize("selection", ["random", "recorded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_provider_is_right_and_timed(selection, dtype):
    suite = replace(SMALL, selections=[selection], dtype=dtype)
    (case,) = suite.cases
    measured = attention.measure(case, suite)
    names = {named(result) for result in measured.results}
    assert {
        "sdpa",
        "sdpa, packed",
        "sdpa, repeated",
        "grouped matmul",
        "dense (ours)",
        "exact top-k (torch) 1/4",
    } <= names
    assert {"loki 16@4+32@2 1/4", "loki 16@4+32@2 1/8 no tail", "attend 1/8", "gather 1/8", "select 16@4+32@2"} <= names
    assert {"append 16@4+32@2", "absorb 64 16@4+32@2", "stream K and V"} <= names
    assert not any("128@2" in name for name in names)
    for result in measured.results:
        assert result.value > 0
        assert result.config["kind"] in ("dense", "sparse", "stage", "probe")
        assert (result.config["error"] is None) == (
            result.config["kind"] == "probe"
            or str(result.config["provider"]).split()[0] in ("select", "append", "absorb")
        )
        assert (result.config["share_of_probe"] is not None) == (result.config["probe"] is not None)


def test_bytes_are_those_that_are_read():
    (case,) = SMALL.cases
    rows = {named(one): one for one in attention.measure(case, SMALL).results}
    heads, k = 2 * 2, 150
    assert rows["sdpa"].read_bytes == rows["stream K and V"].read_bytes == 2 * heads * 600 * 64 * 2
    assert rows["attend 1/4"].read_bytes == rows["gather 1/4"].read_bytes == 2 * heads * k * 64 * 2
    assert rows["loki 16@4+32@2 1/4 no tail"].read_bytes == heads * (600 * 16 + 2 * k * 64 * 2)
    assert rows["loki 16@4+32@2 1/4"].read_bytes - rows["loki 16@4+32@2 1/4 no tail"].read_bytes == (
        4 * heads * (64 + 16 + 16 * 64)
    )


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    dense = native.dense_decode
    monkeypatch.setattr(native, "dense_decode", lambda *args, **options: 1.2 * dense(*args, **options))
    monkeypatch.setattr(attention, "interleaved", lambda *args, **options: pytest.fail("something was timed"))
    with pytest.raises(LokiError, match=r"dense \(ours\) is wrong on 4/2/64.*nothing is timed"):
        attention.measure(SMALL.cases[0], SMALL)


def test_a_recorded_selection_is_what_the_step_selects():
    case = Case(heads=HEADS, batch=1, tokens=4096, selection="recorded")
    budget = Budget(fraction=1 / 8)
    step = Sparse(draw_layer(case, [budget]), "16@4+32@2")._run(budget, "none", wants=True)()
    assert step.indices is not None
    planted = real_selection(4096, 512, 2, Forced(4, 32), seed=0)
    found = [len(set(a) & set(b)) for a, b in zip(step.indices[0, :, 0].tolist(), planted.tolist(), strict=True)]
    assert min(found) > 0.85 * 512


def test_what_does_not_fit_is_no_case():
    suite = Suite(memory_bytes=1 << 30)
    assert suite.cases
    assert all(3 * case.kv_bytes <= 1 << 30 for case in suite.cases)
    assert {case.tokens for case in Suite().cases} == set(attention.LENGTHS)


@pytest.mark.parametrize(
    ("text", "message"), [("32/8", "is not query heads"), ("a/b/c", "is not query"), ("6/4/64", "do not share")]
)
def test_other_shapes_are_refused(text, message):
    with pytest.raises(ArgumentError, match=message):
        Heads.parse(text)
    with pytest.raises(ArgumentError, match="selection"):
        Case(heads=HEADS, batch=1, tokens=512, selection="rand")


def result(provider, kind, value, **config):
    case = {"heads": "4/2/64", "batch": 1, "tokens": 512, "dtype": "bfloat16", "selection": "random"}
    config = {**case, "provider": provider, "kind": kind, **config}
    return Result(metric="decode_step_time", value=value, unit="s", n=3, config=config)


def test_ratios_are_to_sdpa_and_to_the_fastest_dense(tmp_path):
    rows = [
        result("sdpa", "dense", 8.0),
        result("dense (ours)", "dense", 2.0),
        result("stream", "probe", 1.5, ahead_bytes=1024),
        result("stream", "probe", 1.0, ahead_bytes=4096),
        result("loki", "sparse", 0.5, planes="64@4", fraction="1/8", tail="linear"),
        result("select", "stage", 0.25, planes="64@4"),
    ]
    save_results(tmp_path / "r.json", rows, environment("loki bench attention"))
    (case,) = by_case(load_results(tmp_path / "r.json").results).values()
    found = {named(one.result): one for one in compared(case)}
    assert list(found) == ["sdpa", "dense (ours)", "stream", "loki 64@4 1/8", "select 64@4"]
    assert (found["loki 64@4 1/8"].over_sdpa, found["loki 64@4 1/8"].over_dense) == (16.0, 4.0)
    assert found["stream"].result.value == 1.0
    assert found["select 64@4"].over_sdpa is None
