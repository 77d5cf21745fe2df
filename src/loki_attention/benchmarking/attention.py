"""The attention suite: one layer's decode step by every provider, right before it is fast.

All providers of a case are interleaved in one process, with the probes that judge them. No time is returned where one
of them is wrong.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import torch

from loki_attention.benchmarking.layers import SELECTIONS, Case, Heads, draw_layer
from loki_attention.benchmarking.providers import (
    PLAIN,
    LeftOut,
    Provider,
    Sparse,
    dense_providers,
    exact_topk,
    wrong_output,
)
from loki_attention.benchmarking.timing import MachineLoad, Timing, interleaved, machine, watched
from loki_attention.core.budget import Budget
from loki_attention.core.planes import Planes
from loki_attention.errors import check_tokens
from loki_attention.results import Result, Setting

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Over 65536 random values nearly all of an output cancels: plain bfloat16 is off by 5 % of what is left.
_LARGEST_ERROR = 0.2
FRACTIONS = ("1/8", "1/16", "1/32")
LENGTHS = tuple(1 << power for power in range(11, 18))
SHAPES = ("32/8/128", "40/40/128", "32/8/64")
PLANES = ("32@4+64@2", "16@4+32@2", "64@4", "32@8")
_MEMORY = 16 << 30
_OTHER_TOKENS = 512
_MOST_SLOW_BYTES = 1 << 28
_SHARED = ("heads", "batch", "tokens", "dtype", "selection")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """What to measure: every combination of shapes, batches, lengths and selections that fits in ``memory_bytes``."""

    shapes: Sequence[Heads] = tuple(map(Heads.parse, SHAPES))
    batches: Sequence[int] = (1, 8)
    lengths: Sequence[int] = LENGTHS
    selections: Sequence[str] = SELECTIONS
    planes: Sequence[str] = PLANES
    fractions: Sequence[str] = FRACTIONS
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 15
    flex: bool = True
    memory_bytes: int = _MEMORY

    def __post_init__(self) -> None:
        check_tokens("rounds", self.rounds, least=1, unit="rounds")
        for planes in self.planes:
            Planes.parse(planes)

    @property
    def cases(self) -> list[Case]:
        """The cases whose K and V take at most a third of the memory: copies and references need room too."""
        made = [
            Case(heads=heads, batch=batch, tokens=tokens, dtype=self.dtype, selection=selection)
            for heads in self.shapes
            for batch in self.batches
            for tokens in self.lengths
            for selection in self.selections
        ]
        return [case for case in made if 3 * case.kv_bytes <= self.memory_bytes]


class Measured(NamedTuple):
    """A case's results, its load, and what was left out."""

    case: Case
    results: tuple[Result, ...]
    load: MachineLoad
    left_out: tuple[LeftOut, ...]


def measure(case: Case, suite: Suite) -> Measured:
    """Every provider's time on a case. Raises ``LokiError`` where one returns something wrong."""
    with torch.inference_mode():
        providers, left_out = _providers(case, suite)
        errors = _checked(case, providers)
        before, _ = _providers(replace(case, tokens=min(case.tokens, _OTHER_TOKENS)), suite)
        calls, others = ({_identity(one): one.run for one in some} for some in (providers, before))
        assert calls.keys() <= others.keys()
        with watched() as load:
            timings = interleaved(calls, rounds=_rounds(case, suite.rounds), before=others)
    common: dict[str, Setting] = {**_settings(case), **machine(), **load.settings}
    timed = [(one, timings[_identity(one)], error) for one, error in zip(providers, errors, strict=True)]
    fastest = _fastest_probes((provider, timing) for provider, timing, _ in timed)
    results = [_result(*one, fastest, common) for one in timed]
    return Measured(case, tuple(results), load, tuple(left_out))


def _providers(case: Case, suite: Suite) -> tuple[list[Provider], list[LeftOut]]:
    budgets = {name: Budget(fraction=float(Fraction(name))) for name in suite.fractions}
    first = next(iter(budgets.values()))
    # Compiling takes half a minute: once a shape and length, since dense attention knows no selection.
    flex = suite.flex and case.batch == suite.batches[0] and case.selection == suite.selections[0]
    layer = draw_layer(case, list(budgets.values()))
    providers, left_out = dense_providers(layer, flex=flex, repeats_bytes=4 * _MOST_SLOW_BYTES)
    name, budget = next(iter(budgets.items()))
    if case.kv_bytes <= _MOST_SLOW_BYTES:
        providers.append(exact_topk(layer, budget, name))
    else:
        left_out.append(LeftOut("exact top-k (torch)", "takes seconds a step"))
    fitting = [planes for planes in suite.planes if _fits(planes, case.heads.head_dim)]
    for i, planes in enumerate(fitting):
        sparse = Sparse(layer, planes)
        providers += sparse.scan(first)
        for name, budget in budgets.items():
            providers.append(sparse.step(budget, name, "linear"))
            providers.append(sparse.step(budget, name, "none"))
            if i == 0:
                providers += sparse.attend(budget, name)
        if i == 0:
            providers += sparse.append()
    return providers, left_out


def _rounds(case: Case, rounds: int) -> int:
    """Fewer rounds where a call takes a second: it varies less."""
    return rounds if case.kv_bytes < _MOST_SLOW_BYTES else min(rounds, 9 if case.kv_bytes < 4 * _MOST_SLOW_BYTES else 5)


def _identity(provider: Provider) -> str:
    """What tells a provider from the others of its case; K, which depends on the length, left out."""
    return str((provider.name, *(f"{name}={value}" for name, value in provider.config.items() if name != "k")))


def _fits(planes: str, head_dim: int) -> bool:
    return Planes.parse(planes).rank <= head_dim


def _checked(case: Case, providers: Sequence[Provider]) -> list[float | None]:
    """Each output's relative error in mean square, None where there is none to check; raises where one is too large.

    Allowed is twice the error of plain matmul and softmax in the same dtype.
    """
    errors = [_error(provider) for provider in providers]
    (plain,) = (error for provider, error in zip(providers, errors, strict=True) if provider.name == PLAIN)
    assert plain is not None
    allowed = min(2 * plain + 1e-5, _LARGEST_ERROR)
    for provider, error in zip(providers, errors, strict=True):
        if error is not None and not error <= allowed:
            name = ", ".join(map(str, (provider.name, *provider.config.values())))
            raise wrong_output(name, case, error, allowed)
    return errors


def _error(provider: Provider) -> float | None:
    if provider.expected is None:
        return None
    expected, output = provider.expected().double(), provider.run()
    assert isinstance(output, torch.Tensor)
    return float((output.double() - expected).norm() / expected.norm())


def _settings(case: Case) -> dict[str, Setting]:
    values = (str(case.heads), case.batch, case.tokens, str(case.dtype).removeprefix("torch."), case.selection)
    return dict(zip(_SHARED, values, strict=True))


def _fastest_probes(timed: Iterator[tuple[Provider, Timing]]) -> dict[str, float]:
    """Each probe's median at its best distance."""
    fastest: dict[str, float] = {}
    for provider, timing in timed:
        if provider.kind == "probe":
            fastest[provider.name] = min(timing.median, fastest.get(provider.name, timing.median))
    return fastest


def _result(
    provider: Provider, timing: Timing, error: float | None, probes: dict[str, float], common: dict[str, Setting]
) -> Result:
    share = sum(probes[name] for name in provider.probe) / timing.median if provider.probe else None
    config: dict[str, Setting] = {
        "provider": provider.name,
        "kind": provider.kind,
        **provider.config,
        "p20": timing.p20,
        "p80": timing.p80,
        "probe": " + ".join(provider.probe) or None,
        "share_of_probe": share,
        "error": error,
        **common,
    }
    return Result(
        metric="decode_step_time",
        value=timing.median,
        unit="s",
        n=timing.rounds,
        seed=0,
        read_bytes=provider.read_bytes,
        config=config,
    )
