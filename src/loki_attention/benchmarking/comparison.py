"""What the attention suite's times say: cases, and how often each provider goes into the baselines of its case.

Works on saved results alone, so that a table of a file and one of a fresh run are the same.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from loki_attention.results import Result, Setting

BASELINE = "sdpa"
CASE = ("heads", "batch", "tokens", "dtype", "selection")


class Compared(NamedTuple):
    """A result and how many times faster it is than torch's SDPA and than the fastest dense attention of its case."""

    result: Result
    over_sdpa: float | None
    over_dense: float | None


def by_case(results: Iterable[Result]) -> dict[tuple[Setting, ...], list[Result]]:
    """The results of every case, in their order."""
    cases: dict[tuple[Setting, ...], list[Result]] = {}
    for result in results:
        cases.setdefault(tuple(result.config[name] for name in CASE), []).append(result)
    return cases


def compared(case: Sequence[Result]) -> list[Compared]:
    """One case's results beside its baselines; of a probe at several distances the fastest alone is kept."""
    sdpa = [one.value for one in case if one.config["provider"] == BASELINE]
    dense = [one.value for one in case if one.config["kind"] == "dense"]
    rows = []
    for one in _fastest_probes(case):
        judged = one.config["kind"] in ("dense", "sparse")
        rows.append(
            Compared(
                one,
                sdpa[0] / one.value if judged and sdpa else None,
                min(dense) / one.value if judged and dense else None,
            )
        )
    return rows


def named(result: Result) -> str:
    """A result's provider with its planes, budget and tail."""
    config = result.config
    parts = [str(config["provider"])]
    if config["kind"] != "probe":
        parts += [str(config[name]) for name in ("planes", "fraction") if config.get(name)]
    if config["provider"] == "loki" and config["tail"] == "none":
        parts.append("no tail")
    return " ".join(parts)


def _fastest_probes(case: Sequence[Result]) -> list[Result]:
    best: dict[str, float] = {}
    for one in case:
        if one.config["kind"] == "probe":
            name = str(one.config["provider"])
            best[name] = min(one.value, best.get(name, one.value))
    return [one for one in case if one.config["kind"] != "probe" or one.value == best[str(one.config["provider"])]]
