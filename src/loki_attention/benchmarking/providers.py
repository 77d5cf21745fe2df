"""What is timed: torch's dense attention in its forms, ours, exact top-k, Loki's step and its stages, and the probes.

A provider is a call, the cache bytes it reads and what its output must equal. Baselines are given their best form; a
provider that cannot run here says why and is left out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loki_attention.benchmarking.layers import Case, Layer, Twins, no_sums, twins_of
from loki_attention.core.budget import Budget
from loki_attention.core.tail import BLOCK, tail_value
from loki_attention.errors import LokiError
from loki_attention.kernels import native, torch_backend
from loki_attention.kernels.rows import Rows
from loki_attention.results import Setting

STREAM_AHEAD_BYTES = (1024, 4096, 16384)
GATHER_AHEAD_TOKENS = (32, 64, 128)
OUR_DENSE, PLAIN = "dense (ours)", "grouped matmul"
_FLOAT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One thing to time. ``kind`` is dense, sparse, stage or probe; ``expected`` gives what ``run`` must return.

    ``probe`` names the probes that together read what this one reads.
    """

    name: str
    kind: str
    run: Callable[[], object]
    read_bytes: int
    config: dict[str, Setting] = field(default_factory=dict)
    expected: Callable[[], Tensor] | None = None
    probe: tuple[str, ...] = ()


class LeftOut(NamedTuple):
    """A provider that does not run here, and why."""

    name: str
    reason: str


def wrong_output(name: str, case: Case, error: float, allowed: float, reference: str = "the reference") -> LokiError:
    """The error for a provider of ours whose output is off by more than is allowed."""
    return LokiError(
        f"{name} is wrong on {case}: its output differs from {reference} by {error:.2g}, where {allowed:.2g} is allowed; "
        "nothing is timed. Report this with the output of `loki info`"
    )


def dense_providers(layer: Layer, *, flex: bool, repeats_bytes: int) -> tuple[list[Provider], list[LeftOut]]:
    """Dense attention by torch and by us, and the streaming probes of K and V."""
    case, left_out = layer.case, list[LeftOut]()
    query, keys, values, scale, group = layer.query, layer.keys, layer.values, case.scale, case.heads.group
    packed = query.view(case.batch, case.heads.kv_heads, group, -1)
    expected = Once(partial(dense_reference, layer))
    attention = partial(scaled_dot_product_attention, scale=scale)

    def repeated() -> Tensor:
        return attention(query, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1))

    def grouped() -> Tensor:
        return (torch.softmax((packed * scale) @ keys.mT, -1) @ values).view_as(query)

    calls: dict[str, Callable[[], object]] = {
        "sdpa": lambda: attention(query, keys, values, enable_gqa=True),
        "sdpa, packed": lambda: attention(packed, keys, values).view_as(query),
        "sdpa, repeated": repeated,
        PLAIN: grouped,
        OUR_DENSE: lambda: native.dense_decode(query, keys, values, layer.visible, scale),
    }
    if group == 1:
        del calls["sdpa, packed"], calls["sdpa, repeated"]
    elif case.kv_bytes * group > repeats_bytes:
        del calls["sdpa, repeated"]
        left_out.append(LeftOut("sdpa, repeated", f"{case.kv_bytes * group / 1e9:.1f} GB of repeated K and V"))
    if flex:
        found = _flex(layer)
        if isinstance(found, LeftOut):
            left_out.append(found)
        else:
            calls["flex attention"] = found
    providers = [
        Provider(
            name=name, kind="dense", run=run, read_bytes=case.kv_bytes, expected=expected, probe=("stream K and V",)
        )
        for name, run in calls.items()
    ]
    return [*providers, *_streams("stream K and V", (keys, values))], left_out


class Once:
    """A value that is computed when it is first asked for, and then kept."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._value: Tensor | None = None

    def __call__(self) -> Tensor:
        """The value."""
        if self._value is None:
            self._value = self._compute()
        return self._value


class Sparse:
    """Loki on one layer in some planes: the step at any budget, its stages and its probes."""

    def __init__(self, layer: Layer, planes: str) -> None:
        self._layer, self._planes = layer, planes
        self._twins = twins_of(layer, planes)
        case = layer.case
        self._rows = case.batch * case.heads.kv_heads
        self._scan_bytes = self._rows * case.tokens * self._twins.encoder.planes.bytes_per_token
        sums = case.heads.head_dim * (1 + self._twins.encoder.tail_rank) + self._twins.encoder.tail_rank
        self._sum_bytes = _FLOAT * self._rows * sums

    @property
    def _scan(self) -> str:
        return f"stream twins {self._planes}"

    def scan(self, budget: Budget) -> Iterator[Provider]:
        """Selection alone and the probe of its bytes: its cost does not depend on the budget."""
        layer, twins = self._layer, self._twins
        query = native.encode_query(twins.encoder, layer.query, layer.case.scale)
        k, visible = budget.of_each(layer.stop), layer.visible
        run = partial(native.select, twins.encoder, query, twins.packed, visible, k, slots=layer.case.tokens)
        yield Provider(
            name="select",
            kind="stage",
            run=partial(run, sinks=budget.sinks, recent=budget.recent),
            read_bytes=self._scan_bytes,
            config={"planes": self._planes},
            probe=(self._scan,),
        )
        yield from _streams(self._scan, (twins.packed,))

    def step(self, budget: Budget, fraction: str, tail: str) -> Provider:
        """The whole step at a budget, checked against attention over the indices and the tail it says it took."""
        layer, twins = self._layer, self._twins
        k = budget.of(layer.case.tokens)
        run = self._run(budget, tail)
        return Provider(
            name="loki",
            kind="sparse",
            run=lambda: run().output,
            read_bytes=self._scan_bytes + self._gathered(k) + (self._sum_bytes if tail == "linear" else 0),
            config={"planes": self._planes, "fraction": fraction, "k": k, "tail": tail},
            expected=lambda: sparse_reference(layer, twins, tail, self._run(budget, tail, wants=True)()),
            probe=(self._scan, f"gather {fraction}"),
        )

    def attend(self, budget: Budget, fraction: str) -> Iterator[Provider]:
        """Attention over the selected rows alone, and the probes that read those very rows."""
        layer, k = self._layer, budget.of(self._layer.case.tokens)
        indices = self._run(budget, "none", wants=True)().indices
        assert indices is not None
        tensors = (layer.query, layer.keys, layer.values, indices)
        config: dict[str, Setting] = {"fraction": fraction, "k": k}
        yield Provider(
            name="attend",
            kind="stage",
            read_bytes=self._gathered(k),
            run=lambda: native.attend(*tensors, layer.case.scale),
            config=config,
            expected=lambda: (
                torch_backend.attend(
                    layer.query.double(), layer.keys, layer.values, indices.long(), layer.case.scale
                ).output
            ),
            probe=(f"gather {fraction}",),
        )
        for ahead in GATHER_AHEAD_TOKENS:
            run = partial(native.gather_probe, *tensors, ahead_tokens=ahead)
            yield Provider(
                name=f"gather {fraction}",
                kind="probe",
                run=run,
                read_bytes=self._gathered(k),
                config={**config, "ahead_tokens": ahead},
            )

    def append(self) -> Iterator[Provider]:
        """One new token: K and V written and its low-rank key encoded; and the block that joins the sums every 64."""
        layer, twins, last = self._layer, self._twins, self._layer.case.tokens - 1
        new = (layer.keys[:, :, last:].clone(), layer.values[:, :, last:].clone())

        def append() -> None:
            layer.keys[:, :, last:], layer.values[:, :, last:] = new
            native.encode_keys(twins.encoder, layer.keys, twins.packed, last, last + 1)

        block = (layer.keys[:, :, -BLOCK:], layer.values[:, :, -BLOCK:])
        sign, sums = torch.ones(layer.case.batch, BLOCK, dtype=torch.int8), no_sums(layer, twins.encoder)
        row_bytes = 2 * self._rows * layer.case.row_bytes
        config: dict[str, Setting] = {"planes": self._planes}
        yield Provider(name="append", kind="stage", run=append, read_bytes=row_bytes, config=config)
        yield Provider(
            name=f"absorb {BLOCK}",
            kind="stage",
            run=lambda: native.absorb(twins.encoder, *block, sign, sums),
            read_bytes=BLOCK * row_bytes + self._sum_bytes,
            config=config,
        )

    def _gathered(self, k: int) -> int:
        return 2 * self._rows * k * self._layer.case.row_bytes

    def _run(self, budget: Budget, tail: str, *, wants: bool = False) -> Callable[[], native.NativeStep]:
        layer, twins = self._layer, self._twins
        return partial(
            native.decode_step, twins.encoder, layer.query, layer.keys, layer.values, twins.packed, layer.visible,
            budget.of_each(layer.stop), layer.case.scale, sinks=budget.sinks, recent=budget.recent, tail=tail,
            sums=twins.sums, wants_indices=wants, wants_mass=wants,
        )  # fmt: skip


def exact_topk(layer: Layer, budget: Budget, fraction: str) -> Provider:
    """Exact top-k in torch: scores with every key, so it cannot be faster than dense attention."""
    case, k = layer.case, budget.of(layer.case.tokens)
    rows = Rows.of_whole_prompts(case.batch, case.tokens, 1, torch.device("cpu"))
    forced, wanted = torch_backend.Forced(budget.sinks, budget.recent), budget.of_each(layer.stop)[:, None]

    def choose() -> Tensor:
        scores = torch_backend.score_exact(layer.query, layer.keys, case.scale, case.heads.kv_heads)
        mass = None if case.heads.group == 1 else scores.logsumexp(-1)
        return torch_backend.top_k(torch_backend.combine_group(scores, mass), rows, wanted, forced)

    def attend(query: Tensor) -> Tensor:
        return torch_backend.attend(query, layer.keys, layer.values, choose(), case.scale).output

    row_bytes = case.batch * case.heads.kv_heads * case.row_bytes
    return Provider(
        name="exact top-k (torch)",
        kind="sparse",
        run=lambda: attend(layer.query),
        read_bytes=row_bytes * (case.tokens + 2 * k),
        config={"fraction": fraction, "k": k, "tail": "none"},
        expected=lambda: attend(layer.query.double()),
    )


def dense_reference(layer: Layer) -> Tensor:
    """Attention over all slots in float64, a key head at a time."""
    case, output = layer.case, torch.empty(layer.query.shape, dtype=torch.float64)
    for b in range(case.batch):
        for h in range(case.heads.kv_heads):
            rows = slice(h * case.heads.group, (h + 1) * case.heads.group)
            scores = case.scale * layer.query[b, rows, 0].double() @ layer.keys[b, h].double().mT
            output[b, rows, 0] = scores.softmax(-1) @ layer.values[b, h].double()
    return output


def sparse_reference(layer: Layer, twins: Twins, tail: str, step: native.NativeStep) -> Tensor:
    """Attention in float64 over the slots that a step took, and over its tail."""
    assert step.indices is not None
    case, query, tail_values = layer.case, layer.query.double(), None
    if tail != "none" and bool(twins.sums.tokens.min() > 0):
        encoded = twins.reference.encode_query(layer.query, case.scale)
        each = (case.batch, case.heads.kv_heads, case.heads.group)
        tokens, *sums = twins.sums
        wide = twins.sums._replace(
            tokens=tokens[..., None].double(),
            **dict(zip(("values", "encoded", "products"), (one[:, :, None].double() for one in sums), strict=True)),
        )
        leading, deviation = encoded.leading.reshape(*each, -1).double(), encoded.deviation.reshape(each).double()
        tail_values = tail_value(tail, wide, leading, deviation, case.scale).reshape(query.shape)
    mass = step.log_mass if tail_values is not None else None
    indices = step.indices.long()
    return torch_backend.attend(query, layer.keys, layer.values, indices, case.scale, mass, tail_values).output


def _streams(name: str, tensors: Sequence[Tensor]) -> Iterator[Provider]:
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for ahead in STREAM_AHEAD_BYTES:
        run = partial(native.streaming_probe, *tensors, ahead_bytes=ahead)
        yield Provider(name=name, kind="probe", run=run, read_bytes=size, config={"ahead_bytes": ahead})


def _flex(layer: Layer) -> Callable[[], object] | LeftOut:
    """Compiled flex attention, once it ran; it needs a C++ compiler, and not every CPU or shape has it."""
    from torch.nn.attention.flex_attention import flex_attention

    run = partial(torch.compile(flex_attention, dynamic=False), layer.query, layer.keys, layer.values,
                  scale=layer.case.scale, enable_gqa=layer.case.heads.group > 1)  # fmt: skip
    try:
        # A function that was compiled for eight shapes is not compiled again by default, but runs slowly.
        with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=256):
            run()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return LeftOut("flex attention", lines[0][:200])
    return run
