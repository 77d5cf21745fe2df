"""One layer's decode step on a GPU: dense attention in torch's forms and ours, Loki's step, and Loki's stages.

Right before it is fast: every output is compared with a float32 reference, and the kept attention mass stands beside every
time. Providers of a case are interleaved; each runs as a CUDA graph over copies of the layer.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from loki_attention.benchmarking.flashinfer_decode import FlashInferDecode
from loki_attention.benchmarking.gpu_layers import ROTATED_BYTES, GpuLayer, GpuTwins, draw_copies, encoder_of, twins_of
from loki_attention.benchmarking.layers import Case, Heads
from loki_attention.benchmarking.providers import LeftOut
from loki_attention.core.budget import Budget
from loki_attention.errors import LokiError
from loki_attention.kernels.gpu_clock import interleaved
from loki_attention.kernels.stopwatch import Timing
from loki_attention.kernels.triton import arguments, launch
from loki_attention.kernels.triton.stages import StepInputs, StepKernels
from loki_attention.kernels.triton.workspace import Needs, Workspace
from loki_attention.results import Result, Setting

OUR_DENSE = "dense (ours)"
FRACTIONS = ("1/8", "1/16", "1/32")
PLANES = ("32@8", "64@4", "32@4+64@2")
STAGES = ("open", "score", "select", "attend")
_LARGEST_ERROR = 0.05
_FLEX_TOKENS = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSuite:
    """What to measure: cases, planes, fractions, and how often."""

    cases: Sequence[Case]
    planes: Sequence[str] = PLANES
    fractions: Sequence[str] = FRACTIONS
    tail: str = "linear"
    rounds: int = 20
    rotated_bytes: int = ROTATED_BYTES
    flex: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A provider: a call for each copy of the layer, the cache bytes that it reads, and its first output's error."""

    name: str
    kind: str
    calls: Sequence[Callable[[], Tensor]]
    read_bytes: int
    error: float | None = None
    kept_mass: float | None = None
    config: dict[str, Setting] = field(default_factory=dict)


class GpuMeasured(NamedTuple):
    """A case's results, and what was left out."""

    case: Case
    results: tuple[Result, ...]
    left_out: tuple[LeftOut, ...]


def cases_of_record(largest_bytes: int) -> list[Case]:
    """The matrix: Llama 3 8B's heads at batches 1, 8 and 32, Llama 2 13B's at 8, where K and V fit."""
    made = [
        Case(heads=Heads.parse("32/8/128"), batch=batch, tokens=tokens)
        for batch in (1, 8, 32)
        for tokens in (8192, 32768, 131072)
    ]
    made += [Case(heads=Heads.parse("40/40/128"), batch=8, tokens=tokens) for tokens in (8192, 32768)]
    return [case for case in made if 2 * case.kv_bytes <= largest_bytes]


def measure(case: Case, suite: GpuSuite, device: torch.device) -> GpuMeasured:
    """Every provider's time on a case. Raises ``LokiError`` where one returns something wrong."""
    with torch.inference_mode():
        copies = draw_copies(case, device, rotated_bytes=suite.rotated_bytes)
        # Compiling it takes half a minute: at one length is enough.
        dense, left_out = _dense(case, copies, flex=suite.flex and case.tokens == _FLEX_TOKENS and case.batch < 32)
        timed = [*dense, *(one for planes in suite.planes for one in _sparse(case, copies, planes, suite))]
        _check(case, timed)
        names = {f"{i}": one for i, one in enumerate(timed)}
        timings = interleaved({name: one.calls for name, one in names.items()}, device, rounds=suite.rounds)
    best = min(timings[name].median for name, one in names.items() if one.kind == "dense")
    results = tuple(_result(case, one, timings[name], best, len(copies)) for name, one in names.items())
    return GpuMeasured(case, results, tuple(left_out))


def _dense(case: Case, copies: Sequence[GpuLayer], *, flex: bool) -> tuple[list[Timed], list[LeftOut]]:
    group, kv_heads = case.heads.group, case.heads.kv_heads
    expected = _reference(copies[0], case.scale)
    made: list[Timed] = []
    left_out: list[LeftOut] = []

    def packed(layer: GpuLayer) -> Tensor:
        query = layer.query.view(case.batch, kv_heads, group, -1)
        return scaled_dot_product_attention(query, layer.keys, layer.values, scale=case.scale).view_as(layer.query)

    def plain(layer: GpuLayer) -> Tensor:
        return scaled_dot_product_attention(*layer[:3], scale=case.scale, enable_gqa=group > 1)

    attempts: dict[str, Callable[[GpuLayer], Tensor]] = {"sdpa": plain}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, backend in backends.items():
        attempts[f"sdpa, {name}"] = partial(_within, backend, plain)
        attempts[f"sdpa, {name}, packed"] = partial(_within, backend, packed)
    if flex:
        attempts["flex attention"] = partial(_flex, case)
    if importlib.util.find_spec("flashinfer") is None:
        left_out.append(LeftOut("flashinfer", "not installed"))
    else:
        attempts["flashinfer"] = FlashInferDecode(case, tensor_cores=False)
        attempts["flashinfer, tensor cores"] = FlashInferDecode(case, tensor_cores=True)
    spaces = [_space(case, layer) for layer in copies[:1]]
    attempts[OUR_DENSE] = lambda layer: launch.dense_decode(
        *layer[:3], layer.visible, case.scale, workspace=spaces[0], out=torch.empty_like(layer.query)
    )
    for name, attempt in attempts.items():
        try:
            found = attempt(copies[0])
        except Exception as error:
            # A provider that this GPU, shape or version of torch does not have is no failure of ours.
            if name == OUR_DENSE:
                raise
            left_out.append(LeftOut(name, (str(error).strip().splitlines() or [type(error).__name__])[0][:200]))
            continue
        calls = [partial(attempt, layer) for layer in copies]
        made.append(Timed(name=name, kind="dense", calls=calls, read_bytes=case.kv_bytes,
                          error=_error(found, expected), kept_mass=1.0))  # fmt: skip
    return made, left_out


def _within(backend: SDPBackend, attempt: Callable[[GpuLayer], Tensor], layer: GpuLayer) -> Tensor:
    with sdpa_kernel(backend):
        return attempt(layer)


def _flex(case: Case, layer: GpuLayer) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return compiled(*layer[:3], scale=case.scale, enable_gqa=case.heads.group > 1)


class _Sparse:
    """Loki on the copies of a layer in some planes at one budget."""

    def __init__(
        self, case: Case, copies: Sequence[GpuLayer], twins: Sequence[GpuTwins], budget: Budget, tail: str
    ) -> None:
        self.case, self.copies, self.twins, self.budget, self.tail = case, copies, twins, budget, tail
        self.k = budget.of_each(copies[0].stop)
        self.space = _space(case, copies[0], twins[0].encoder.rank)

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
    for fraction in suite.fractions:
        ours = _Sparse(case, copies, twins, Budget(fraction=float(Fraction(fraction))), suite.tail)
        k = int(ours.k[0])
        found = ours.step(0, wants_indices=True, wants_mass=True)
        scores = _scores(copies[0], case.scale)
        taken = torch.zeros(case.batch, case.heads.kv_heads, case.tokens, dtype=torch.bool, device=scores.device)
        taken.scatter_(-1, found.indices[:, :, 0].long(), True)
        mass = float((scores.softmax(-1) * taken[:, :, None]).sum(-1).mean())
        plain = _Sparse(case, copies[:1], twins[:1], ours.budget, "none").step(0, wants_indices=True)
        alike = torch.zeros_like(taken).scatter_(-1, plain.indices[:, :, 0].long(), True)
        expected = _attention(scores.masked_fill(~alike[:, :, None], -torch.inf), copies[0])
        config: dict[str, Setting] = {"planes": planes, "fraction": fraction, "k": k, "tail": suite.tail}
        gathered = 2 * rows * k * case.row_bytes
        calls = [lambda i=i, ours=ours: ours.step(i).output for i in range(len(copies))]
        error = _error(plain.output, expected)
        yield Timed(name="loki", kind="sparse", calls=calls, read_bytes=scanned + gathered + summed,
                    error=error, kept_mass=mass, config=config)  # fmt: skip
        if fraction == suite.fractions[0]:
            for name in STAGES:
                calls = [partial(ours.stage, name, i) for i in range(len(copies))]
                yield Timed(name=name, kind="stage", calls=calls, config=config,
                            read_bytes={"score": scanned, "attend": gathered}.get(name, 0))  # fmt: skip


def _space(case: Case, layer: GpuLayer, rank: int = 4) -> Workspace:
    rows, slots = case.batch * case.heads.kv_heads, max(4096, 1 << (case.tokens - 1).bit_length())
    needs = Needs(rows=rows, group=case.heads.group, dim=case.heads.head_dim, rank=rank, slots=slots,
                  chunks=slots // 512, splits=64)  # fmt: skip
    return Workspace(needs, layer.keys.device)


def _scores(layer: GpuLayer, scale: float) -> Tensor:
    """Exact scores (B, Hkv, G, S) in float32."""
    kv_heads = layer.keys.shape[1]
    return scale * (layer.query.unflatten(1, (kv_heads, -1))[:, :, :, 0].float() @ layer.keys.float().mT)


def _attention(scores: Tensor, layer: GpuLayer) -> Tensor:
    return (scores.softmax(-1) @ layer.values.float()).flatten(1, 2)[:, :, None]


def _reference(layer: GpuLayer, scale: float) -> Tensor:
    return _attention(_scores(layer, scale), layer)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def _check(case: Case, timed: Sequence[Timed]) -> None:
    """Raise unless every output is as right as torch's own, within a factor of two."""
    own = min(one.error for one in timed if one.name == "sdpa" and one.error is not None)
    allowed = min(2 * own + 1e-5, _LARGEST_ERROR)
    for one in timed:
        if one.error is not None and not one.error <= allowed:
            raise LokiError(
                f"{one.name} {one.config} is wrong on {case}: its output differs from the reference by {one.error:.2g}, "
                f"where {allowed:.2g} is allowed; nothing is timed. Report this with the output of `loki info`"
            )


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
