import math

import pytest
import torch

from loki_attention.errors import ArgumentError
from loki_attention.evaluation.perplexity import Perplexity
from loki_attention.evaluation.task import Score
from loki_attention.evaluation.variant import Variant
from models import BUDGET, VOCABULARY, tiny_model

DENSE = Variant(name="dense", method="dense", budget=None)
STREAMING = Variant(name="streaming", method="streaming", budget=BUDGET)
TEXT = " ".join(str(7 * i % 200 + 1) for i in range(700))


class Numbers:
    """A tokenizer of numbers: each is its own id, four characters long when decoded."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i:04d}" for i in ids)


def scores(task: Perplexity, variant: Variant) -> dict[str, Score]:
    outcomes = [task.measure(i, [DENSE, variant]) for i in range(task.items)]
    found = task.scores([o[variant.name] for o in outcomes], [o["dense"] for o in outcomes])
    return {score.metric: score for score in found}


def test_dense_perplexity_is_the_models_own() -> None:
    model, task = tiny_model(), Perplexity(tiny_model(), Numbers(), TEXT, length=200, prompt=150, stride=120)
    ids = torch.tensor([int(word) for word in TEXT.split()])
    losses = []
    for start in (0, 120, 240, 360, 480):
        window = ids[start : start + 200]
        with torch.inference_mode():
            logits = model(window[None]).logits[0, 150:-1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), window[151:]).item())
    found = scores(task, DENSE)
    assert task.items == 5
    assert found["log_loss"].items == pytest.approx(losses)
    mean = sum(losses) / 5
    assert found["perplexity"].value == pytest.approx(math.exp(mean))
    assert found["bits_per_byte"].value == pytest.approx(mean / math.log(2) / 4)
    assert (found["kl_from_dense"].value, found["next_token_agreement"].value) == (0, 1)
    assert found["perplexity_over_dense"].value == pytest.approx(0)
    assert math.log(VOCABULARY) / 2 < mean


def test_a_sparse_method_differs_and_its_intervals_hold_its_values() -> None:
    task = Perplexity(tiny_model(), Numbers(), TEXT, length=140)
    found = scores(task, STREAMING)
    assert found["kl_from_dense"].value > 0
    assert found["next_token_agreement"].value < 1
    for score in found.values():
        assert score.interval is not None
        assert score.interval.low <= score.value <= score.interval.high
        assert score.n == 5
    ratio = found["perplexity"].value / scores(task, DENSE)["perplexity"].value
    assert found["perplexity_over_dense"].value == pytest.approx(ratio - 1)


def test_the_digest_names_the_windows_and_the_prompt() -> None:
    def digest(**changes: int) -> str:
        return Perplexity(tiny_model(), Numbers(), TEXT, **{"length": 140, **changes}).digest

    assert digest() == digest(prompt=70) == digest(windows=5)
    assert len({digest(), digest(prompt=71), digest(windows=4), digest(stride=20), digest(length=141)}) == 5


@pytest.mark.parametrize("wrong", [{"prompt": 0}, {"prompt": 139}, {"stride": 0}, {"windows": 6}, {"length": 900}])
def test_windows_that_score_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match=r"prompt of|at least 1|asked for"):
        Perplexity(tiny_model(), Numbers(), TEXT, **{"length": 140, **wrong})
