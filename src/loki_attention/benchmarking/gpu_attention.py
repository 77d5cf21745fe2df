"""One layer's decode step on a GPU: dense attention in torch's forms and ours, Loki's step, and Loki's stages.

Right before it is fast: every output is compared with a float32 reference, and the kept attention mass stands beside every
time. Providers of a case are interleaved; each runs as a CUDA graph over copies of the layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loki_attention.benchmarking.gpu_dense import OUR_DENSE, Timed, dense_providers, space_for
from loki_attention.benchmarking.gpu_layers import ROTATED_BYTES, GpuLayer, GpuTwins, draw_copies, encoder_of, twins_of
from loki_attention.benchmarking.gpu_reference import attention, error_of, exact_scores, tail_reference
from loki_attention.benchmarking.layers import Case, Heads
from loki_attention.benchmarking.providers import LeftOut, wrong_output
from loki_attention.core.budget import Budget
from loki_attention.kernels.gpu_clock import interleaved
from loki_attention.kernels.stopwatch import Timing
from loki_attention.kernels.triton import arguments, launch
from loki_attention.kernels.triton.stages import StepInputs, StepKernels
from loki_attention.results import Result, Setting

FRACTIONS = ("1/8", "1/16", "1/32")
PLANES = ("32@8", "64@4", "32@4+64@2")
STAGES = ("open", "score", "select", "attend")
_LARGEST_ERROR, _LARGEST_TAIL_ERROR = 0.05, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSuite:
    """What to measure of a case: planes, fractions, whether FlexAttention is among the rivals, and how often."""

    planes: Sequence[str] = PLANES
    fractions: Sequence[str] = FRACTIONS
    tail: str = "linear"
    rounds: int = 20
    rotated_bytes: int = ROTATED_BYTES
    flex: bool = True


class GpuMeasured(NamedTuple):
    """A case's results, and what was left out."""

    case: Case
    results: tuple[Result, ...]
    left_out: tuple[LeftOut, ...]


def turns_of_record() -> list[tuple[Case, bool]]:
    """The matrix, what matters most first: cases, and whether FlexAttention is among their rivals.

    Llama 3 8B's heads at 32K, then at other lengths, Llama 2 13B's, and larger batches of both. To compile FlexAttention for
    a shape takes long: but for the first, cases have it in a second turn, at the end, where all is measured again.
    """
    llama3, llama2, lengths = Heads.parse("32/8/128"), Heads.parse("40/40/128"), (32768, 131072, 8192)
    sizes = [(llama3, batch, tokens) for tokens in lengths for batch in (32, 8, 1)]
    sizes += [(llama2, 8, tokens) for tokens in (32768, 8192, 131072)]
    sizes += [(heads, batch, tokens) for heads, batch in ((llama3, 64), (llama2, 32)) for tokens in lengths]
    cases = [Case(heads=heads, batch=batch, tokens=tokens) for heads, batch, tokens in sizes]
    with_flex = [(case, True) for case in cases]
    return [*with_flex[:3], *((case, False) for case in cases[3:]), *with_flex[3:]]


def measure(case: Case, suite: GpuSuite, device: torch.device) -> GpuMeasured:
    """Every provider's time on a case. Raises ``LokiError`` where one of ours returns something wrong."""
    with torch.inference_mode():
        copies = draw_copies(case, device, rotated_bytes=suite.rotated_bytes)
        dense, left_out = dense_providers(case, copies, flex=suite.flex)
        timed = [*dense, *(one for planes in suite.planes for one in _sparse(case, copies, planes, suite))]
        timed, wrong = _right(case, timed)
        names = {f"{i}": one for i, one in enumerate(timed)}
        timings = interleaved({name: one.calls for name, one in names.items()}, device, rounds=suite.rounds)
    # Ours is always among them.
    best = min(timings[name].median for name, one in names.items() if one.kind == "dense")
    results = tuple(_result(case, one, timings[name], best, len(copies)) for name, one in names.items())
    return GpuMeasured(case, results, (*left_out, *wrong))


class _Sparse:
    """Loki on the copies of a layer in some planes at one budget."""

    def __init__(
        self, case: Case, copies: Sequence[GpuLayer], twins: Sequence[GpuTwins], budget: Budget, tail: str
    ) -> None:
        self.case, self.copies, self.twins, self.budget, self.tail = case, copies, twins, budget, tail
        self.k = budget.of_each(copies[0].stop)
        self.space = space_for(case, copies[0], twins[0].encoder.rank)

    def step(self, i: int, **options: Any) -> Any:
        """The step on one copy, with the newest token's low-rank key."""
        layer, twins = self.copies[i], self.twins[i]
        return launch.decode_step(
            twins.encoder, *layer[:3], twins.packed, layer.visible, self.k, self.case.scale, sinks=self.budget.sinks,
            recent=self.budget.recent, tail=self.tail, sums=twins.sums, newest=True, workspace=self.space,
            out=torch.empty_like(layer.query), **options,
        )  # fmt: skip

    def stage(self, name: str, i: int) -> Tensor:
        """One stage of the step alone, on what the stages before it left for another copy: its cost is the same."""
        layer, twins = self.copies[i], self.twins[i]
        shape = arguments.shape_of(*layer[:3])
        kernels = StepKernels(twins.encoder, shape, layer.keys.dtype, layer.keys.device, None, self.space)
        seen = arguments.seen(layer.visible, shape, layer.keys.device)
        inputs = StepInputs(
            *layer[:3], twins.packed.view(torch.int32), seen, self.k, self.case.scale, self.budget.sinks,
            self.budget.recent, twins.sums,
        )  # fmt: skip
        output = torch.empty_like(layer.query)
        if name == "open":
            kernels.open(inputs, append=True, absorb=self.tail != "none")
        elif name == "score":
            kernels.score(inputs, absorb=self.tail != "none")
        elif name == "select":
            kernels.select(inputs)
        else:
            kernels.attend(inputs, output, None, None, self.tail, self.tail != "none")
        return output


def _sparse(case: Case, copies: Sequence[GpuLayer], planes: str, suite: GpuSuite) -> Iterator[Timed]:
    source = encoder_of(case, planes, copies[0].keys.device)
    if source.planes.rank > case.heads.head_dim:
        return
    twins = [twins_of(layer, source) for layer in copies]
    rows = case.batch * case.heads.kv_heads
    scanned = rows * case.tokens * source.planes.bytes_per_token
    summed = 4 * rows * (case.heads.head_dim * (1 + source.tail_rank) + source.tail_rank)
    scores = exact_scores(copies[0], case.scale)
    for fraction in suite.fractions:
        ours = _Sparse(case, copies, twins, Budget(fraction=float(Fraction(fraction))), suite.tail)
        k = int(ours.k[0])
        found = ours.step(0, wants_indices=True, wants_mass=True)
        taken = torch.zeros(case.batch, case.heads.kv_heads, case.tokens, dtype=torch.bool, device=scores.device)
        taken.scatter_(-1, found.indices[:, :, 0].long(), True)
        mass = float((scores.softmax(-1) * taken[:, :, None]).sum(-1).mean())
        plain = _Sparse(case, copies[:1], twins[:1], ours.budget, "none").step(0, wants_indices=True)
        alike = torch.zeros_like(taken).scatter_(-1, plain.indices[:, :, 0].long(), True)
        expected = attention(scores.masked_fill(~alike[:, :, None], -torch.inf), copies[0])
        config: dict[str, Setting] = {"planes": planes, "fraction": fraction, "k": k, "tail": suite.tail}
        gathered = 2 * rows * k * case.row_bytes
        calls = [lambda i=i, ours=ours: ours.step(i).output for i in range(len(copies))]
        error = error_of(plain.output, expected)
        _check_tail(ours, found, planes, fraction)
        yield Timed(name="loki", kind="sparse", calls=calls, read_bytes=scanned + gathered + summed,
                    error=error, kept_mass=mass, config=config)  # fmt: skip
        if fraction == suite.fractions[0]:
            for name in STAGES:
                calls = [partial(ours.stage, name, i) for i in range(len(copies))]
                yield Timed(name=name, kind="stage", calls=calls, config=config,
                            read_bytes={"score": scanned, "attend": gathered}.get(name, 0))  # fmt: skip


def _check_tail(ours: _Sparse, found: Any, planes: str, fraction: str) -> None:
    """Raise unless the very step that is timed gives what the torch backend's tail gives over the same slots."""
    if ours.tail == "none":
        return
    expected = tail_reference(ours.copies[0], ours.twins[0], found.indices, ours.case.scale, ours.tail)
    error = error_of(found.output[:1], expected)
    if not error <= _LARGEST_TAIL_ERROR:
        name = f"loki {planes} {fraction} with tail {ours.tail}"
        raise wrong_output(name, ours.case, error, _LARGEST_TAIL_ERROR, reference="the torch backend's")


def _right(case: Case, timed: Sequence[Timed]) -> tuple[list[Timed], list[LeftOut]]:
    """Those as right as torch's own attention, within a factor of two, and wrong rivals; a wrong one of ours raises."""
    own = min((one.error for one in timed if one.name == "sdpa" and one.error is not None), default=_LARGEST_ERROR)
    allowed = min(2 * own + 1e-5, _LARGEST_ERROR)
    right, wrong = list[Timed](), list[LeftOut]()
    for one in timed:
        if one.error is None or one.error <= allowed:
            right.append(one)
        elif one.kind == "dense" and one.name != OUR_DENSE:
            wrong.append(LeftOut(one.name, f"its output differs from the reference by {one.error:.2g}"))
        else:
            raise wrong_output(f"{one.name} {one.config}", case, one.error, allowed)
    return right, wrong


def _result(case: Case, one: Timed, timing: Timing, best_dense: float, copies: int) -> Result:
    config: dict[str, Setting] = {
        "provider": one.name, "kind": one.kind, **one.config, "heads": str(case.heads), "batch": case.batch,
        "tokens": case.tokens, "dtype": str(case.dtype).removeprefix("torch."), "p20": timing.p20, "p80": timing.p80,
        "over_best_dense": best_dense / timing.median if one.kind != "stage" else None, "kept_mass": one.kept_mass,
        "byte_ideal": case.kv_bytes / one.read_bytes if one.kind == "sparse" else None, "error": one.error, "copies": copies,
    }  # fmt: skip
    return Result(
        metric="decode_step_time", value=timing.median, unit="s", n=timing.rounds, seed=0, read_bytes=one.read_bytes,
        config=config,
    )  # fmt: skip
