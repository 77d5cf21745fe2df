"""Families x ways of generating: dense at full budget, exactly the method at a small one, and sound caches after all."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cache_checks import check_twins_and_sums
from generate_operations import OPERATIONS, Generated
from loki_attention import Attached, Budget, KeyBasis, LokiWarning, attach
from loki_attention.core.tail import TAILS
from loki_attention.integrations.huggingface.families import FAMILIES
from models import BUDGET, FAMILY_SETTINGS, tiny_basis, tiny_model
from replay import replayed

SPARSE_LAYERS = (1, 2)
EAGER = [family for family, needs in FAMILIES.items() if needs.implementations == ("eager",)]
PADDED = ("left padding", "second turn")


def in_default_run(family: str, operation: str) -> bool:
    """All of llama, and of every other family one of the quicker operations in turn; the rest is slow."""
    quick = [name for name in OPERATIONS if name not in ("greedy", "beams")]
    return family == "llama" or operation == quick[list(FAMILIES).index(family) % len(quick)]


CELLS = [
    pytest.param(family, operation, marks=[] if in_default_run(family, operation) else [pytest.mark.slow])
    for family in FAMILIES
    for operation in OPERATIONS
]


class Cell:
    """A family's tiny model and what is compared. transformers' eager attention has no left padding in float64."""

    def __init__(self, family: str, operation: str) -> None:
        self.family, self.operation = family, operation
        single = family in EAGER and operation in PADDED
        self.dtype = torch.float32 if single else torch.float64
        self.tolerance = 2e-3 if single else 1e-5 if family in EAGER else 1e-8
        self.model: PreTrainedModel = tiny_model(family, dtype=self.dtype)
        self.basis: KeyBasis = tiny_basis(family)

    def run(self, cache: DynamicCache | None = None) -> Generated:
        return OPERATIONS[self.operation](self.model, self.new_cache() if cache is None else cache)

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def assert_same(self, ours: Generated, theirs: Generated) -> None:
        assert torch.equal(ours.sequences, theirs.sequences)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=self.tolerance)


@pytest.mark.parametrize(("family", "operation"), CELLS)
def test_cell(family: str, operation: str) -> None:
    cell = Cell(family, operation)
    dense = cell.run()
    if operation == "greedy":
        assert min(len(set(row[-24:].tolist())) for row in dense.sequences) >= 8, "the model repeats itself"
    with (
        pytest.warns(LokiWarning, match="every step stayed dense"),
        attach(cell.model, cell.basis, budget=Budget(tokens=500), backend="torch"),
    ):
        cell.assert_same(cell.run(), dense)
    more_steps = goes_on(cell)
    for tail in TAILS:
        cache = cell.new_cache()
        with attach(cell.model, cell.basis, budget=BUDGET, tail=tail, backend="torch") as handle:
            with handle.trace() as trace:
                ours = cell.run(cache)
            check_layers(handle, least=1 if operation == "prompt lookup" else 5)
            if operation == "beams":
                assert_score_is_the_sequences_own(cell, ours)
            if tail == "none" and more_steps:
                assert_unread_rows_do_not_matter(cell, handle, cache, ours.mask)
        encoders = {layer: cell.basis.encoder(layer) for layer in SPARSE_LAYERS}
        with replayed(cell.model, trace, encoders, BUDGET, tail):
            cell.assert_same(ours, cell.run())
        if tail == "linear":
            check_twins_and_sums(cache, set(SPARSE_LAYERS), cell.tolerance)
    assert (ours.logits - dense.logits).abs().max() > 1e-3, "nothing was sparse"


def check_layers(handle: Attached, *, least: int) -> None:
    """The sparse path ran, and each layer is accounted for. Verified drafts are dense."""
    report = handle.report()
    assert report.sparse_layers == SPARSE_LAYERS
    assert all(report.layers[i].sparse_steps >= least for i in range(-2, 0))
    assert set(report.other_layers) | {layer.layer for layer in report.layers} == {0, 1, 2}


@torch.inference_mode()
def assert_score_is_the_sequences_own(cell: Cell, ours: Generated) -> None:
    """A beam's score is the mean log-probability of its tokens when its sequence is decoded alone."""
    assert ours.scores is not None
    for b, sequence in enumerate(ours.sequences):
        cache, total, new = cell.new_cache(), 0.0, ours.logits.shape[0]
        prompt = sequence[None, :-new]
        logits = cell.model(prompt, past_key_values=cache).logits[:, -1]
        for token in sequence[-new:]:
            total += float(logits.double().log_softmax(-1)[0, token])
            logits = cell.model(token.reshape(1, 1), past_key_values=cache).logits[:, -1]
        assert float(ours.scores[b]) == pytest.approx(total / new, abs=1e-5)


@torch.inference_mode()
def goes_on(cell: Cell) -> bool:
    """Whether the plain model can take more steps: transformers 5.17 cannot once drafts were cropped from sliding layers."""
    if "layer_types" not in FAMILY_SETTINGS[cell.family] or cell.operation != "prompt lookup":
        return True
    cache = cell.new_cache()
    mask = cell.run(cache).mask
    try:
        for more in (1, 2):
            longer = torch.nn.functional.pad(mask, (0, more), value=1)
            cell.model(torch.full((1, 1), 5), past_key_values=cache, attention_mask=longer)
    except RuntimeError:
        return False
    return True


@torch.inference_mode()
def assert_unread_rows_do_not_matter(cell: Cell, handle: Attached, cache: DynamicCache, mask: Tensor) -> None:
    """NaN in every K/V row that a further step leaves out, in a copy of the cache, changes nothing."""
    clean, token = copy.deepcopy(cache), torch.full((len(mask), 1), 5)
    steps = [{"attention_mask": torch.nn.functional.pad(mask, (0, more), value=1)} for more in (1, 2)]
    # A sparse step first: what verified drafts left behind is read to be encoded.
    cell.model(token, past_key_values=clean, **steps[0])
    poisoned = copy.deepcopy(clean)
    with handle.trace() as trace:
        expected = cell.model(token, past_key_values=clean, **steps[1]).logits
    assert set(trace[0]) == set(SPARSE_LAYERS)
    for layer, chosen in trace[0].items():
        store = poisoned.layers[layer].store
        read = torch.zeros(*store.keys.shape[:2], store.length + 2, dtype=torch.bool)
        read.scatter_(2, chosen[:, :, 0].where(chosen[:, :, 0] >= 0, store.length + 1), True)
        unread = ~read[..., : store.length]
        assert bool(unread.any())
        for buffer in (store.keys, store.values):
            buffer[unread] = float("nan")
    again = cell.model(token, past_key_values=poisoned, **steps[1]).logits
    assert torch.equal(again, expected)


DOCS = Path(__file__).parents[2] / "docs" / "support.md"


def support_table() -> str:
    """Families x operations as docs/support.md shows them; every cell is a test above."""
    head = ["family", *OPERATIONS, "layers", "attention"]
    rows = [
        [family, *["yes"] * len(OPERATIONS), layers_of(family), ", ".join(needs.implementations)]
        for family, needs in FAMILIES.items()
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def layers_of(family: str) -> str:
    """What is special about a family's tiny model, as tested."""
    settings = FAMILY_SETTINGS[family]
    traits = {
        "sliding ones left alone": "layer_types" in settings,
        "soft-capped": "attn_logit_softcapping" in settings,
        "learned sinks": family == "gpt_oss",
        "experts": "num_experts_per_tok" in settings,
        "partial rotary": "partial_rotary_factor" in repr(settings),
        "no RoPE": FAMILIES[family].rotary_function is None,
        "some without RoPE": "no_rope_layers" in settings or family == "cohere2",
    }
    return ", ".join(name for name, holds in traits.items() if holds) or "full attention"


def test_the_docs_show_the_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    """The table is printed, and stands in the docs as it is printed."""
    table = support_table()
    with capsys.disabled():
        print(f"\n{table}")
    assert table in DOCS.read_text(encoding="utf-8"), "copy the printed table into docs/support.md"
    assert {(cell.values[0], cell.values[1]) for cell in CELLS} == {(f, o) for f in FAMILIES for o in OPERATIONS}
