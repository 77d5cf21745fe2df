import pytest

from loki_attention.errors import ArgumentError, LokiError
from loki_attention.evaluation.method_grammar import BudgetSpec, Floors, parse_budgets, parse_methods, variant_of
from loki_attention.evaluation.reading import DecodeStep, step_bytes
from loki_attention.evaluation.variant import Variant
from loki_attention.methods import METHOD_NAMES
from models import tiny_basis, tiny_model

FLOORS = Floors(minimum=8, sinks=2, recent=4)


STEPS = [DecodeStep(400, 400)]


def variant(text: str, budget: str = "1/4", steps: list[DecodeStep] = STEPS) -> Variant | None:
    (spec,), (asked,) = parse_methods(text), parse_budgets(budget)
    return variant_of(tiny_model(), tiny_basis(), spec, asked, floors=FLOORS, steps=steps)


def test_settings_belong_to_the_method_before_them() -> None:
    text = "loki:planes=8@4,tail=none,streaming,exact-topk:tail=mean"
    assert [str(spec) for spec in parse_methods(text)] == [
        "loki:planes=8@4,tail=none",
        "streaming",
        "exact-topk:tail=mean",
    ]
    assert [str(spec) for spec in parse_methods(",".join(METHOD_NAMES))] == list(METHOD_NAMES)


def test_a_variant_has_the_settings_and_the_floors() -> None:
    made = variant("loki:planes=16@2,tail=none,per=query-head,sinks=1,dense=none")
    assert made is not None and made.budget is not None
    assert (made.planes, made.tail, made.per) == ("16@2", "none", "query-head")
    assert (made.budget.fraction, made.budget.minimum, made.budget.sinks, made.budget.recent) == (0.25, 8, 1, 4)
    assert made.layers == dict.fromkeys(range(3), "sparse")
    assert made.name == "loki:planes=16@2,tail=none,per=query-head,sinks=1,dense=none @ 1/4"
    with made.attach(tiny_model()) as attached:
        assert sorted(attached.methods) == [0, 1, 2]
    marked = variant("streaming:dense=0+2")
    assert marked is not None
    assert marked.basis is None
    with marked.attach(tiny_model()) as attached:
        assert sorted(attached.methods) == [1]


def test_a_candidate_replaces_the_basis() -> None:
    made = variant("loki:candidate=pca-post")
    assert made is not None and made.basis is not None
    assert made.config["candidate"] == "pca-post"
    assert tiny_basis().candidate == "balanced"


@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if name != "dense"])
@pytest.mark.parametrize("share", ["1/2", "1/3", "1/4"])
def test_a_budget_in_bytes_reads_nearly_as_much_and_no_more(method: str, share: str) -> None:
    made, wanted = variant(method, f"bytes={share}"), parse_budgets(share)[0].fraction
    assert wanted is not None
    if made is None:
        with_one = variant(method, "7")
        assert with_one is not None
        assert step_bytes(tiny_model(), with_one, STEPS).fraction > wanted
        return
    read = step_bytes(tiny_model(), made, STEPS).fraction
    one_more_token = 4 / 400
    assert wanted - one_more_token < read <= wanted
    assert made.config["budget"] == f"bytes={share}"


def test_a_budget_in_bytes_holds_on_average_over_the_steps() -> None:
    steps = [DecodeStep(200, tokens) for tokens in range(201, 700, 7)]
    made = variant("loki:tail=none", "bytes=1/3", steps)
    assert made is not None and made.budget is not None and made.budget.fraction is not None
    assert 0.33 < step_bytes(tiny_model(), made, steps).fraction <= 1 / 3
    assert 200 * made.budget.fraction > 6


def test_a_linear_tail_that_takes_much_of_the_bytes_gives_way_to_a_mean() -> None:
    assert tiny_basis().tail == "linear"
    for text, tokens, tail in (
        ("loki", 400, None),
        ("loki", 100, "mean"),
        ("loki:tail=linear", 100, "linear"),
        ("loki:tail=none", 100, "none"),
        ("streaming", 100, None),
    ):
        made = variant(text, "bytes=1/4", [DecodeStep(tokens, tokens)])
        assert made is not None
        assert made.tail == tail
        assert step_bytes(tiny_model(), made, [DecodeStep(tokens, tokens)]).fraction <= 1 / 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lokki", r"unknown method 'lokki'.*did you mean 'loki'"),
        ("loki:plans=8@4", r"unknown setting of loki 'plans'.*did you mean 'planes'"),
        ("loki:planes", "has no value"),
        ("loki:planes=12@4", "multiple of 8"),
        ("loki:candidate=pca", "unknown candidate 'pca'"),
        ("streaming:sinks=few", "whole number of tokens; got 'few'"),
        ("dense:tail=none", "'dense' has no settings"),
        ("tail=none", "a setting without a method"),
    ],
)
def test_misspelt_methods_are_refused(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse_methods(text)


@pytest.mark.parametrize("text", ["0", "1/0", "bytes=2", "bytes=lots", "9/8", "150%", "some", ""])
def test_nonsense_is_no_budget(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"budget|whole number of tokens"):
        parse_budgets(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pca-attn:tail=mean", "has no tail"),
        ("loki:tail=long", "unknown tail"),
        ("loki:planes=24@4", "head dim is 16"),
        ("loki:dense=7", "unknown layer '7'"),
    ],
)
def test_what_the_method_or_model_does_not_take_is_refused(text: str, message: str) -> None:
    with pytest.raises(LokiError, match=message):
        made = variant(text, "bytes=1/2")
        assert made is not None


def test_a_method_without_its_basis_is_refused() -> None:
    spec, budget = parse_methods("loki")[0], BudgetSpec(text="64", tokens=64)
    with pytest.raises(ArgumentError, match="needs a basis"):
        variant_of(tiny_model(), None, spec, budget, floors=FLOORS, steps=STEPS)
