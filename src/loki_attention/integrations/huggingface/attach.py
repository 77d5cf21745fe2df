"""``attach``: check what is asked, decide what each layer does, and hand over to :class:`Attached`."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from loki_attention.core.basis import KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.core.planes import Planes
from loki_attention.core.spec import HeadLayout, ModelSpec
from loki_attention.core.tail import check_tail
from loki_attention.errors import ArgumentError, LokiWarning, check_tokens, unknown_name
from loki_attention.integrations.huggingface.attached import Attached
from loki_attention.integrations.huggingface.families import attention_modules, text_config
from loki_attention.integrations.huggingface.monitor import monitor_settings
from loki_attention.integrations.huggingface.settings import LayerPlan, Settings
from loki_attention.kernels.break_even import BreakEvenShape, break_even
from loki_attention.kernels.ops import Backend, Work, choose_backend
from loki_attention.methods import PER, Method, method_class

BREAK_EVEN = "break-even"
LayerChoice = str | Budget


def attach(
    model: Any,
    basis: Any = None,
    *,
    method: str = "loki",
    budget: Any = None,
    planes: Any = None,
    tail: str | None = None,
    per: str = "kv-head",
    layers: Any = None,
    dense_below: Any = 0,
    monitor_every: Any = None,
    on_low_mass: Any = None,
    backend: str = "auto",
) -> Attached:
    """The handle of ``model`` with its decode steps run by ``method``; use it in a ``with`` block or ``detach()`` it.

    ``model`` is a transformers model, ``basis`` a ``KeyBasis``, ``budget`` a ``Budget``, ``planes`` text or ``Planes``.
    ``budget`` and ``planes`` default to what the basis was chosen for; without a basis a budget is needed. ``tail`` is
    ``"none"``, ``"mean"`` or ``"linear"``, by default the basis's choice for loki and none for others. ``per`` is
    ``"kv-head"`` or, for research, ``"query-head"`` (paper-loki's rule). ``layers`` maps single layers' numbers to
    ``"dense"``, ``"sparse"`` or a ``Budget``; by default layer 0 and what calibration marked stay dense, and with the
    paper's own methods none. Sequences shorter than ``dense_below`` tokens stay dense; ``"break-even"`` is where this
    machine's sparse steps overtake its dense ones, measured once and kept (native and triton backends; else a number is needed).
    ``monitor_every=n`` checks every n-th decode step, on one layer in turn, against dense attention; ``report()`` says
    what it found. ``on_low_mass=(0.5, "warn")`` warns where a checked layer kept less than half of the attention mass,
    ``(0.5, "dense")`` leaves it dense from then on. Under ``backend="auto"`` the report says what was chosen and why.
    Raises a ``LokiError`` kind for every misuse, and ``MismatchError`` for a basis of another layout.
    """
    choose_backend(backend)
    kind = method_class(method)
    modules = attention_modules(model)
    if basis is not None:
        _check_basis(model, basis)
    if dense_below != BREAK_EVEN:
        check_tokens("dense_below", dense_below, least=0)
    monitor = monitor_settings(monitor_every, on_low_mass)
    choices = _checked_layers({} if layers is None else layers, modules)
    if kind is None:
        if monitor is not None:
            raise ArgumentError("method 'dense' keeps all attention mass: nothing to monitor; leave monitor_every out")
        plans = dict.fromkeys(modules, LayerPlan(None, "method dense"))
        return Attached(model, plans, Settings(method=method, backend=choose_backend(backend, _work(model))))
    head_dim = HeadLayout.of(text_config(model)).head_dim
    request = _resolve(kind, basis, budget, planes, tail, per, head_dim)
    plans = {index: _plan(index, head_dim, request, choices.get(index)) for index in modules}
    if all(plan.method is None for plan in plans.values()):
        warnings.warn("every layer stays dense: nothing will be sparse", LokiWarning, stacklevel=2)
    chosen = choose_backend(backend, _work(model, kind.problem_with_native(request.planes, request.per)))
    below, below_static = (
        _break_even(model, request, chosen) if dense_below == BREAK_EVEN else (dense_below, dense_below)
    )
    return Attached(
        model,
        plans,
        Settings(
            method=method,
            backend=chosen,
            budget=str(request.budget),
            planes=None if request.planes is None else str(request.planes),
            tail=request.tail,
            simulated=kind.why_simulated(request.tail),
            dense_below=below,
            dense_below_static=below_static,
            monitor=monitor,
            calibrated_length=basis.record.get("length") if basis is not None and kind.needs_basis else None,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What all sparse layers share."""

    kind: type[Method]
    basis: KeyBasis | None
    budget: Budget
    planes: Planes | None
    tail: str
    per: str


def _resolve(
    kind: type[Method],
    basis: KeyBasis | None,
    budget: Any,
    planes: Any,
    tail: str | None,
    per: str,
    head_dim: int,
) -> _Request:
    """The request with every default filled in; raises for what the method cannot do."""
    if per not in PER:
        raise unknown_name("per", per, PER)
    if kind.needs_basis and basis is None:
        raise ArgumentError(
            f"method {kind.name!r} needs a basis, got none; give calibrate(model, ...) or KeyBasis.load(path, model=model)"
        )
    if budget is None:
        if basis is None:
            raise ArgumentError(
                f"method {kind.name!r} without a basis needs a budget, got none; give Budget(tokens=512), say"
            )
        budget = basis.budget
    budget = Budget.checked(budget)
    tail = _tail_for(kind, basis, tail)
    if basis is not None:
        basis = kind.basis_for(basis)
    chosen = _planes_for(kind, basis, planes, head_dim, tail)
    per = "query-head" if kind.principal_components else per
    return _Request(kind=kind, basis=basis, budget=budget, planes=chosen, tail=tail, per=per)


def _plan(index: int, head_dim: int, request: _Request, choice: LayerChoice | None) -> LayerPlan:
    """What a layer does: its own choice, else dense where the method or calibration says so, else sparse."""
    kind, basis = request.kind, request.basis
    if choice == "dense":
        return LayerPlan(None, "asked for")
    reason = kind.reason_dense(index, () if basis is None else basis.dense_layers)
    if choice is None and reason is not None:
        return LayerPlan(None, reason)
    encoder = None
    if basis is not None and (kind.needs_basis or request.tail == "linear"):
        encoder = basis.encoder(index, request.planes)
    return LayerPlan(
        kind(
            budget=choice if isinstance(choice, Budget) else request.budget,
            head_dim=head_dim,
            encoder=encoder,
            tail=request.tail,
            per=request.per,
            planes=request.planes if encoder is None else None,
        )
    )


def _tail_for(kind: type[Method], basis: KeyBasis | None, tail: str | None) -> str:
    if tail is None:
        return basis.tail if basis is not None and kind.name == "loki" else "none"
    check_tail(tail)
    if tail not in kind.tails:
        raise ArgumentError(f"method {kind.name!r} has no tail {tail!r}; give one of {', '.join(kind.tails)}")
    if tail == "linear" and basis is None:
        raise ArgumentError("tail='linear' needs a basis; give one, or use tail='mean'")
    return tail


def _planes_for(kind: type[Method], basis: KeyBasis | None, planes: Any, head_dim: int, tail: str) -> Planes | None:
    """The planes that the method and its tail read, None where they read none."""
    calibrated = None if basis is None else basis.planes
    default = calibrated if tail == "linear" else kind.default_planes(head_dim, calibrated)
    if planes is None:
        return default
    chosen = Planes.of(planes)
    chosen.check_fits(head_dim)
    problem = kind.problem_with_planes(chosen)
    if problem is not None:
        raise ArgumentError(f"method {kind.name!r} {problem}")
    return None if default is None else chosen


def _work(model: PreTrainedModel, missing: str | None = None) -> Work:
    """What a backend would have to run; ``missing`` is what the method lacks for native kernels."""
    layout = HeadLayout.of(text_config(model))
    return Work(model.dtype, model.device.type, layout.head_dim, layout.heads // layout.kv_heads, missing)


def _break_even(model: PreTrainedModel, request: _Request, backend: Backend) -> tuple[int, int]:
    """The lengths from which on this machine's sparse steps are faster than its dense ones, for one sequence.

    Over a growing cache, and over a static one: a GPU's steps over that are captured.
    """
    if backend.name == "torch":
        raise ArgumentError(
            "dense_below='break-even' is measured on the native or Triton kernels, and this attachment runs on torch "
            f"({backend.reason}); give a number of tokens"
        )
    layout = HeadLayout.of(text_config(model))
    shape = BreakEvenShape(
        heads=layout.heads,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        dtype=model.dtype,
        planes=str(request.planes),
        budget=request.budget,
        tail=request.tail,
        backend=backend.name,
    )
    launched = break_even(shape)
    return launched, break_even(replace(shape, captured=True)) if backend.name == "triton" else launched


def _check_basis(model: PreTrainedModel, basis: Any) -> None:
    """Layout alone: weights were compared when the basis was loaded, and a fine-tune may be wanted."""
    if not isinstance(basis, KeyBasis):
        raise ArgumentError(f"basis must be a KeyBasis, got {basis!r}; KeyBasis.load(path, model=model) reads one")
    basis.spec.check_serves(ModelSpec.of(model, weights=False), other_weights=True)


def _checked_layers(layers: Any, modules: Mapping[int, Any]) -> dict[int, LayerChoice]:
    if not isinstance(layers, Mapping):
        raise ArgumentError(f"layers must map layer numbers to what they do, {{1: 'dense'}} say; got {layers!r}")
    for index, choice in layers.items():
        if index not in modules:
            raise unknown_name("layer", index, tuple(str(i) for i in modules))
        if not isinstance(choice, Budget) and choice not in ("dense", "sparse"):
            raise ArgumentError(f"layer {index}: expected 'dense', 'sparse' or a Budget, got {choice!r}")
    return dict(layers)
