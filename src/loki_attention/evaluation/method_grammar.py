"""Methods and budgets as a command line names them, and the variants they stand for on a model.

    loki                                    a method as it comes
    loki:planes=16@4+32@2,tail=none         with settings of its own
    loki,exact-topk:tail=mean,streaming     several

Budgets: ``1/8`` or ``12.5%`` of the tokens, ``512`` tokens, ``bytes=1/8``: as many as read an eighth of dense's bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from loki_attention.core.basis import KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.core.candidates import CANDIDATES
from loki_attention.core.planes import Planes
from loki_attention.core.spec import HeadLayout, full_attention_layers
from loki_attention.errors import ArgumentError, unknown_name
from loki_attention.evaluation.reading import DecodeStep, budget_within, ranking_share, sums_share
from loki_attention.evaluation.variant import DENSE, Variant
from loki_attention.integrations.huggingface.families import text_config
from loki_attention.methods import METHOD_NAMES, Method, method_class

BYTES = "bytes="
SETTINGS = ("planes", "tail", "per", "candidate", "dense", "minimum", "sinks", "recent")
_COUNTS = ("minimum", "sinks", "recent")
_WHOLE = Budget(tokens=1, sinks=0, recent=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """A method's name and its settings as text; ``str`` gives them back."""

    method: str
    settings: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = ",".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.method}:{settings}" if settings else self.method


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSpec:
    """A budget as asked for: tokens, a fraction of them, or a share of dense attention's bytes."""

    text: str
    tokens: int | None = None
    fraction: float | None = None
    bytes: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """What budgets take unless a method's settings say otherwise."""

    minimum: int = 64
    sinks: int = 4
    recent: int = 32


def parse_methods(text: str) -> tuple[MethodSpec, ...]:
    """The methods that ``text`` names, in order; raises ``ArgumentError`` for unknown methods and settings.

    >>> [str(spec) for spec in parse_methods("loki:planes=8@4,tail=none,streaming")]
    ['loki:planes=8@4,tail=none', 'streaming']
    """
    specs: list[MethodSpec] = []
    for part in (part.strip() for part in text.split(",")):
        name, colon, first = part.partition(":")
        setting = first if colon else part
        if colon or "=" not in part:
            if name not in METHOD_NAMES:
                raise unknown_name("method", name, METHOD_NAMES)
            specs.append(MethodSpec(method=name))
        elif not specs:
            raise ArgumentError(f"{part!r} is a setting without a method; write loki:planes=8@4,tail=none")
        if colon or "=" in part:
            specs[-1] = _with_setting(specs[-1], setting)
    return tuple(specs)


def parse_budgets(text: str) -> tuple[BudgetSpec, ...]:
    """The budgets that ``text`` names; raises ``ArgumentError`` for what is none.

    >>> [(spec.text, spec.fraction, spec.tokens, spec.bytes) for spec in parse_budgets("1/8,25%,512,bytes=1/8")]
    [('1/8', 0.125, None, None), ('25%', 0.25, None, None), ('512', None, 512, None), ('bytes=1/8', None, None, 0.125)]
    """
    return tuple(_budget(part.strip()) for part in text.split(","))


def variant_of(
    model: Any,
    basis: KeyBasis | None,
    spec: MethodSpec,
    budget: BudgetSpec,
    *,
    floors: Floors,
    steps: Sequence[DecodeStep],
) -> Variant | None:
    """The variant of a method at a budget; one in bytes is solved for ``steps``.

    None where the method cannot read as little as a budget in bytes allows. Raises a ``LokiError`` for settings that
    the method or the model does not take.
    """
    if spec.method == DENSE:
        return Variant(name=DENSE, method=DENSE, budget=None)
    counts = {name: int(spec.settings.get(name, getattr(floors, name))) for name in _COUNTS}
    chosen = _variant(model, basis, spec, name=f"{spec} @ {budget.text}", label=budget.text)
    if budget.bytes is None:
        return replace(chosen, budget=Budget(tokens=budget.tokens, fraction=budget.fraction, **counts))
    start = Budget(fraction=1.0, **{**counts, "minimum": 0})
    return _within(model, replace(chosen, budget=start), budget.bytes, steps)


def _within(model: Any, variant: Variant, share: float, steps: Sequence[DecodeStep]) -> Variant | None:
    """The variant at the largest budget that reads at most ``share``, with planes that take at most half of it.

    Planes that the variant names stay; else the method's largest that small are taken, or its smallest. So does a tail
    that it names; else a linear one whose sums take more than an eighth of ``share`` gives way to a mean.
    """
    layout, kind = HeadLayout.of(text_config(model)), method_class(variant.method)
    assert kind is not None
    sizes = kind.planes_by_size(layout.head_dim) if variant.planes is None else (None,)
    for planes in sizes:
        tried = variant if planes is None else replace(variant, planes=str(planes))
        methods = _methods_of(model, tried)
        if ranking_share(methods, layout) > share / 2 and planes is not sizes[-1]:
            continue
        linear = tried.tail is None and any(method.tail == "linear" for method in methods.values())
        if linear and sums_share(methods, layout, steps) > share / 8:
            tried = replace(tried, tail="mean")
            methods = _methods_of(model, tried)
        found = budget_within(methods, layout, share, steps)
        if found is not None:
            return replace(tried, budget=found)
    return None


def _methods_of(model: Any, variant: Variant) -> Mapping[int, Method]:
    with variant.attach(model) as attached:
        return attached.methods


def _variant(model: Any, basis: KeyBasis | None, spec: MethodSpec, *, name: str, label: str) -> Variant:
    settings, kind = spec.settings, method_class(spec.method)
    assert kind is not None
    if kind.needs_basis and basis is None:
        raise ArgumentError(
            f"method {spec.method!r} needs a basis, got none; give --basis DIR (loki calibrate writes one)"
        )
    served = basis if kind.needs_basis or settings.get("tail") == "linear" else None
    if served is not None and "candidate" in settings:
        served = replace(served.with_candidate(settings["candidate"]), record=served.record)
    return Variant(
        name=name,
        method=spec.method,
        budget=_WHOLE,
        basis=served,
        planes=settings.get("planes"),
        tail=settings.get("tail"),
        per=settings.get("per", "kv-head"),
        layers=_layers(model, settings.get("dense")),
        label=label,
    )


def _layers(model: Any, dense: str | None) -> dict[int, str]:
    """Every layer's choice where ``dense`` names the dense ones: ``none``, or numbers joined by ``+``."""
    if dense is None:
        return {}
    known = full_attention_layers(text_config(model))
    names = [] if dense == "none" else dense.split("+")
    for name in names:
        if name not in map(str, known):
            raise unknown_name("layer", name, ("none", *map(str, known)))
    return {layer: "dense" if str(layer) in names else "sparse" for layer in known}


def _with_setting(spec: MethodSpec, text: str) -> MethodSpec:
    name, equals, value = (part.strip() for part in text.partition("="))
    if name not in SETTINGS:
        raise unknown_name(f"setting of {spec.method}", name, SETTINGS)
    if not equals or not value:
        raise ArgumentError(f"setting {name!r} of {spec.method} has no value; write {name}=...")
    if name in _COUNTS and not value.isdecimal():
        raise ArgumentError(f"setting {name!r} of {spec.method} must be a whole number of tokens; got {value!r}")
    if name == "candidate" and value not in CANDIDATES:
        raise unknown_name("candidate", value, CANDIDATES)
    if name == "planes":
        Planes.parse(value)
    if spec.method == DENSE:
        raise ArgumentError(f"method 'dense' has no settings; got {text!r}")
    return replace(spec, settings={**spec.settings, name: value})


def _budget(text: str) -> BudgetSpec:
    if text.startswith(BYTES):
        share = _share(text.removeprefix(BYTES))
        if share is None:
            raise ArgumentError(f"a budget of {text!r} is no share of dense attention's bytes; write bytes=1/8")
        return BudgetSpec(text=text, bytes=share)
    if "/" in text:
        share = _share(text)
        if share is None:
            raise ArgumentError(f"a budget of {text!r} is no fraction of the tokens; write 1/8, 12.5% or 512")
        return BudgetSpec(text=text, fraction=share)
    parsed = Budget.parse(text, minimum=0, sinks=0, recent=0)
    return BudgetSpec(text=text, tokens=parsed.tokens, fraction=parsed.fraction)


def _share(text: str) -> float | None:
    """A number above 0 and at most 1, written 1/8, 0.125 or 12.5%; None for anything else."""
    try:
        share = Fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        return None
    return float(share) if 0 < share <= 1 else None
