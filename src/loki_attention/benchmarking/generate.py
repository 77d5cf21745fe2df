"""Decoding end to end: tokens/s of ``generate()`` on a random model of a real one's shape, over a cache filled beforehand.

The model is as large as Llama 3.2 1B but for its vocabulary; its weights, and the cached keys and values, are random: what
is timed depends on sizes alone. Rounds of the variants are interleaved, but for those of an attachment whose steps may be
compiled, which come last; each decodes from the same length.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loki_attention.benchmarking.random_model import ModelShape, moments_of, random_model
from loki_attention.benchmarking.timing import MachineLoad, Timing, machine, watched
from loki_attention.core.basis import KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.core.candidates import build
from loki_attention.core.planes import Planes
from loki_attention.core.spec import ModelSpec
from loki_attention.errors import LokiError, LokiWarning
from loki_attention.integrations.huggingface import attach
from loki_attention.integrations.huggingface.loading import new_cache, new_static_cache, shorten
from loki_attention.results import Result, Setting

DEFAULT, OUR_CACHE, LOKI, BREAK_EVEN = "transformers", "dense, our cache", "loki", "loki, break-even"
VARIANTS = (DEFAULT, OUR_CACHE, LOKI, BREAK_EVEN)
STATIC, LOKI_STATIC = "transformers, static cache", "loki, static cache"
"""What ``cache_implementation="static"`` gives; on a GPU ``generate()`` compiles decode steps into CUDA graphs, ours whole."""
_BUDGET = Budget(fraction=1 / 8)
_LARGEST_ERROR = 0.05
_GATE_TOKENS, _GATE_STEPS = 512, 4
_STATIC_ALIGNMENT = 64
# A compiled step runs once to warm up and once to be captured before it is replayed; the first token is prefill's.
_WARM_TOKENS, _WARM_TOKENS_COMPILED = 2, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """What to measure: cached lengths, tokens that each round generates, rounds, Loki's budget."""

    shape: ModelShape = field(default_factory=ModelShape)
    lengths: Sequence[int] = (4096, 8192, 16384, 32768)
    new_tokens: int = 16
    rounds: int = 7
    budget: Budget = _BUDGET
    variants: Sequence[str] = VARIANTS
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    device: str = "cpu"
    backend: str = "auto"

    @property
    def compiles(self) -> bool:
        """Whether decode steps of a variant may be compiled."""
        return STATIC in self.variants or LOKI_STATIC in self.variants

    def cache_bytes(self, tokens: int, variants: Sequence[str] | None = None) -> int:
        """Bytes of K and V that the caches of ``variants``, by default of all, hold together."""
        shape = self.shape
        each = 2 * shape.layers * shape.kv_heads * shape.head_dim * self.dtype.itemsize
        return len(self.variants if variants is None else variants) * self.batch * tokens * each


class Measured(NamedTuple):
    """A length's results and the load meanwhile."""

    tokens: int
    results: tuple[Result, ...]
    load: MachineLoad


class Generation:
    """A random model with a basis, checked to generate the same sparse and dense; then timed length by length."""

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        self._model = random_model(suite.shape, suite.dtype, suite.device)
        self._moments, self._value_deviation = moments_of(self._model)
        head_dim = suite.shape.head_dim
        self._basis = KeyBasis(
            spec=ModelSpec.of(self._model),
            layers={layer: build("balanced", moments) for layer, moments in self._moments.items()},
            planes=Planes.default(head_dim),
            budget=suite.budget,
            tail="linear",
        )
        self._check()

    def measure(self, tokens: int, variants: Sequence[str] | None = None) -> Measured:
        """Tokens/s over a cache of ``tokens`` tokens of ``variants``, by default of all: each has a cache of its own."""
        suite = self._suite
        names = suite.variants if variants is None else variants
        ids = self._ids(tokens + 1)
        caches = {name: self._filled(tokens, name) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        backends: dict[str, str] = {}
        # A compiled step knows the attachment it was made for: that of a static cache stays for all rounds.
        compiled = [name for name in names if name == LOKI_STATIC]
        with watched() as load, torch.inference_mode():
            for _ in range(suite.rounds):
                for name in names:
                    if name not in compiled:
                        with self._attached(name) as attached:
                            seconds[name].append(self._seconds(name, ids, caches[name]))
                        backends[name] = "" if attached is None else attached.report().backend.name
            for name in compiled:
                with self._attached(name) as attached:
                    seconds[name] = [self._seconds(name, ids, caches[name]) for _ in range(suite.rounds)]
                backends[name] = attached.report().backend.name
        if suite.compiles:
            # Else the next length would be compiled for shapes that change.
            torch.compiler.reset()
        results = [self._result(name, tokens, seconds[name], backends[name], load) for name in names]
        return Measured(tokens, tuple(results), load)

    def _seconds(self, name: str, ids: Tensor, cache: Any) -> float:
        """How long a variant's new tokens take."""
        # What is done once, encoding the whole cache or compiling say, is not part of decoding.
        self._generate(ids, cache, _WARM_TOKENS_COMPILED if name in (STATIC, LOKI_STATIC) else _WARM_TOKENS)
        return self._generate(ids, cache, self._suite.new_tokens)

    @contextmanager
    def _attached(self, name: str, budget: Budget | None = None) -> Iterator[Any]:
        """The model as a variant has it; the handle, None where nothing is attached."""
        if name in (DEFAULT, STATIC):
            yield None
            return
        below: Any = "break-even" if name == BREAK_EVEN else 0
        backend = self._suite.backend
        sparse: dict[str, Any] = {"budget": budget or self._suite.budget, "dense_below": below, "backend": backend}
        with warnings.catch_warnings():
            # Below the break-even, and in the check of a whole budget, that is what is wanted.
            warnings.filterwarnings("ignore", "every step stayed dense", LokiWarning)
            dense = attach(self._model, method="dense", backend=backend) if name == OUR_CACHE else None
            with dense or attach(self._model, self._basis, **sparse) as attached:
                yield attached

    def _generate(self, ids: Tensor, cache: Any, new_tokens: int) -> float:
        """Seconds of decoding ``new_tokens`` tokens, which are then taken off the cache again."""
        held = int(cache.get_seq_length())
        if ids.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self._model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        if ids.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        shorten(cache, held)
        return seconds

    def _empty(self, tokens: int, name: str) -> Any:
        """A variant's cache without tokens, for as many and those that rounds generate."""
        if name not in (STATIC, LOKI_STATIC):
            return new_cache(self._model)
        room = tokens + max(self._suite.new_tokens, _WARM_TOKENS_COMPILED, _GATE_STEPS) + 1
        return new_static_cache(self._model, -(-room // _STATIC_ALIGNMENT) * _STATIC_ALIGNMENT)

    def _filled(self, tokens: int, name: str) -> Any:
        """A variant's cache of random keys, spread as the model's own are, and values."""
        cache, (kv_heads, dim) = self._empty(tokens, name), (self._suite.shape.kv_heads, self._suite.shape.head_dim)
        device = self._suite.device
        generator = torch.Generator(device).manual_seed(tokens)
        for layer, moments in self._moments.items():
            mean = moments.post_keys.mean.float()[:, None].to(device)
            deviation = moments.post_keys.covariance.diagonal(dim1=-2, dim2=-1).sqrt().float()[:, None].to(device)
            drawn = [torch.randn(kv_heads, tokens, dim, generator=generator, device=device) for _ in "kv"]
            one = (
                tensor[None].to(self._suite.dtype)
                for tensor in (mean + deviation * drawn[0], self._value_deviation[layer] * drawn[1])
            )
            cache.update(*(tensor.expand(self._suite.batch, -1, -1, -1) for tensor in one), layer)
        return cache

    def _ids(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(count)
        ids = torch.randint(1, self._suite.shape.vocabulary, (1, count), generator=generator)
        return ids.expand(self._suite.batch, -1).to(self._suite.device)

    def _check(self) -> None:
        """Raise unless sparse steps over all tokens, or all but one or two, give dense logits in this dtype."""
        nearly_all = replace(self._suite.budget, tokens=None, fraction=1 - 1 / 256)
        dense = self._logits(DEFAULT, nearly_all)
        gates = [(STATIC, None), (OUR_CACHE, None), (LOKI, Budget(fraction=1.0)), (LOKI, nearly_all)]
        for name, budget in gates + [(LOKI_STATIC, nearly_all)] * (LOKI_STATIC in self._suite.variants):
            error = float((self._logits(name, budget) - dense).norm() / dense.norm())
            if not error <= _LARGEST_ERROR:
                raise LokiError(
                    f"{name} with a budget of {budget} gives logits that differ from dense ones by {error:.2g}, where "
                    f"{_LARGEST_ERROR} is allowed; nothing is timed. Report this with the output of `loki info`"
                )

    def _logits(self, name: str, budget: Budget | None) -> Tensor:
        """Logits of some decode steps over a short cache."""
        ids, cache = self._ids(_GATE_STEPS), self._filled(_GATE_TOKENS, name)
        with torch.inference_mode(), self._attached(name, budget):
            steps = [self._model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(_GATE_STEPS)]
        return torch.cat(steps).double()

    def _result(self, name: str, tokens: int, seconds: list[float], backend: str, load: MachineLoad) -> Result:
        timing, suite, sparse = Timing.of(seconds), self._suite, name in (LOKI, BREAK_EVEN, LOKI_STATIC)
        config: dict[str, Setting] = {
            "variant": name,
            "tokens": tokens,
            "batch": suite.batch,
            "model": str(suite.shape),
            "vocabulary": suite.shape.vocabulary,
            "new_tokens": suite.new_tokens,
            "budget": str(suite.budget) if sparse else None,
            "planes": str(self._basis.planes) if sparse else None,
            "tail": self._basis.tail if sparse else None,
            "backend": backend or None,
            "p20": suite.batch * suite.new_tokens / timing.p80,
            "p80": suite.batch * suite.new_tokens / timing.p20,
            **machine(),
            **load.settings,
        }
        return Result(
            metric="decode_speed",
            value=suite.batch * suite.new_tokens / timing.median,
            unit="tokens/s",
            n=timing.rounds,
            seed=0,
            config=config,
        )
