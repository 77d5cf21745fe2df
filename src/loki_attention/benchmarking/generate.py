"""Decoding end to end: tokens/s of ``generate()`` on a random model of a real one's shape, over a cache filled beforehand.

The model is as large as Llama 3.2 1B but for its vocabulary; its weights, and the cached keys and values, are random: what
is timed depends on sizes alone. Rounds of the variants are interleaved; each decodes from the same length.
"""

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loki_attention.benchmarking.timing import MachineLoad, Timing, machine, watched
from loki_attention.core.basis import KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.core.candidates import build
from loki_attention.core.moments import LayerMoments
from loki_attention.core.planes import Planes
from loki_attention.core.spec import ModelSpec
from loki_attention.errors import LokiError, LokiWarning
from loki_attention.integrations.huggingface import attach
from loki_attention.integrations.huggingface.families import causal_model_class
from loki_attention.integrations.huggingface.loading import load_config, new_cache, new_static_cache, shorten
from loki_attention.integrations.huggingface.observe import Observation, observe
from loki_attention.results import Result, Setting

DEFAULT, OUR_CACHE, LOKI, BREAK_EVEN = "transformers", "dense, our cache", "loki", "loki, break-even"
VARIANTS = (DEFAULT, OUR_CACHE, LOKI, BREAK_EVEN)
STATIC = "transformers, static cache"
"""What ``cache_implementation="static"`` gives; on a GPU ``generate()`` compiles its decode steps into CUDA graphs."""
_BUDGET = Budget(fraction=1 / 8)
_WINDOWS, _WINDOW_TOKENS = 2, 256
_LARGEST_ERROR = 0.05
_GATE_TOKENS, _GATE_STEPS = 512, 4
_STATIC_ALIGNMENT = 64
# A compiled step runs once to warm up and once to be captured before it is replayed; the first token is prefill's.
_WARM_TOKENS, _WARM_TOKENS_COMPILED = 2, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A Llama's sizes; by default those of Llama 3.2 1B with a vocabulary of 32000 instead of 128256."""

    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    hidden: int = 2048
    intermediate: int = 8192
    vocabulary: int = 32000

    @property
    def config(self) -> dict[str, Any]:
        """The fields of its config.json."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.heads}/{self.kv_heads}/{self.head_dim}, hidden {self.hidden}"


SMALL_MODEL = ModelShape(layers=2, heads=4, kv_heads=2, head_dim=32, hidden=128, intermediate=256, vocabulary=512)
"""A model of milliseconds, to try the benchmark out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """What to measure: cached lengths, tokens that each round generates, rounds, Loki's budget."""

    shape: ModelShape = ModelShape()
    lengths: Sequence[int] = (4096, 8192, 16384, 32768)
    new_tokens: int = 16
    rounds: int = 7
    budget: Budget = _BUDGET
    variants: Sequence[str] = VARIANTS
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    device: str = "cpu"

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of K and V that the variants' caches hold together."""
        shape = self.shape
        each = 2 * shape.layers * shape.kv_heads * shape.head_dim * self.dtype.itemsize
        return len(self.variants) * self.batch * tokens * each


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
        self._moments, self._value_deviation = _moments(self._model)
        head_dim = suite.shape.head_dim
        self._basis = KeyBasis(
            spec=ModelSpec.of(self._model),
            layers={layer: build("balanced", moments) for layer, moments in self._moments.items()},
            planes=Planes.default(head_dim),
            budget=suite.budget,
            tail="linear",
        )
        self._check()

    def measure(self, tokens: int) -> Measured:
        """Tokens/s of every variant over a cache of ``tokens`` tokens."""
        suite = self._suite
        ids = self._ids(tokens + 1)
        caches = {name: self._filled(tokens, name) for name in suite.variants}
        seconds: dict[str, list[float]] = {name: [] for name in suite.variants}
        backends: dict[str, str] = {}
        with watched() as load, torch.inference_mode():
            for _ in range(suite.rounds):
                for name, cache in caches.items():
                    with self._attached(name) as attached:
                        # What is done once, encoding the whole cache or compiling say, is not part of decoding.
                        self._generate(ids, cache, _WARM_TOKENS_COMPILED if name == STATIC else _WARM_TOKENS)
                        if ids.is_cuda:
                            torch.cuda.synchronize()
                        start = time.perf_counter()
                        self._generate(ids, cache, suite.new_tokens)
                        if ids.is_cuda:
                            torch.cuda.synchronize()
                        seconds[name].append(time.perf_counter() - start)
                        backends[name] = "" if attached is None else attached.report().backend.name
        if STATIC in suite.variants:
            # Else the next length would be compiled for shapes that change.
            torch.compiler.reset()
        results = [self._result(name, tokens, seconds[name], backends[name], load) for name in suite.variants]
        return Measured(tokens, tuple(results), load)

    @contextmanager
    def _attached(self, name: str, budget: Budget | None = None) -> Iterator[Any]:
        """The model as a variant has it; the handle, None where nothing is attached."""
        if name in (DEFAULT, STATIC):
            yield None
            return
        below: Any = "break-even" if name == BREAK_EVEN else 0
        sparse: dict[str, Any] = {"budget": budget or self._suite.budget, "dense_below": below}
        with warnings.catch_warnings():
            # Below the break-even, and in the check of a whole budget, that is what is wanted.
            warnings.filterwarnings("ignore", "every step stayed dense", LokiWarning)
            dense = name == OUR_CACHE
            with (
                attach(self._model, method="dense") if dense else attach(self._model, self._basis, **sparse) as attached
            ):
                yield attached

    def _generate(self, ids: Tensor, cache: Any, new_tokens: int) -> None:
        """Decode ``new_tokens`` tokens and take them off the cache again."""
        held = int(cache.get_seq_length())
        self._model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        shorten(cache, held)

    def _empty(self, tokens: int, name: str) -> Any:
        """A variant's cache without tokens, for as many and those that rounds generate."""
        if name != STATIC:
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
        for name, budget in ((STATIC, None), (OUR_CACHE, None), (LOKI, Budget(fraction=1.0)), (LOKI, nearly_all)):
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
        timing, suite = Timing.of(seconds), self._suite
        config: dict[str, Setting] = {
            "variant": name,
            "tokens": tokens,
            "batch": suite.batch,
            "model": str(suite.shape),
            "vocabulary": suite.shape.vocabulary,
            "new_tokens": suite.new_tokens,
            "budget": str(suite.budget) if name in (LOKI, BREAK_EVEN) else None,
            "planes": str(self._basis.planes) if name in (LOKI, BREAK_EVEN) else None,
            "tail": self._basis.tail if name in (LOKI, BREAK_EVEN) else None,
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


def random_model(shape: ModelShape, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A model of this shape with random weights on ``device``, in eval mode."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config), encoding="utf-8")
        config = load_config(folder)
    kind = causal_model_class(config)
    assert kind is not None
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def _moments(model: Any) -> tuple[dict[int, LayerMoments], dict[int, float]]:
    """Moments of keys and queries on windows of random tokens, and the deviation of values, of every layer."""
    found: dict[int, LayerMoments] = {}
    deviations: dict[int, float] = {}

    def add(seen: Observation) -> None:
        kv_heads, dim = seen.keys.shape[1], seen.keys.shape[3]
        layer = found.setdefault(seen.layer, LayerMoments.empty(kv_heads, dim))
        for b in range(len(seen.keys)):
            layer.pre_keys.add(seen.pre_keys[b].cpu())
            layer.post_keys.add(seen.keys[b].cpu())
            layer.queries.add(seen.query[b].reshape(kv_heads, -1, dim).cpu())
        deviations[seen.layer] = float(seen.values.float().std())

    ids = torch.randint(1, model.config.vocab_size, (_WINDOWS, _WINDOW_TOKENS)).to(model.device)
    with torch.inference_mode(), observe(model, add):
        model(ids, use_cache=False, logits_to_keep=1)
    return found, deviations
