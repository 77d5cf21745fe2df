"""Decode steps over a static cache under ``torch.compile``: one graph, no compiling anew, and nothing that a GPU waits for."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

from loki_attention import attach
from loki_attention.kernels import native
from models import basis_of, random_ids, tiny_basis, tiny_model
from static_caches import BUDGET, CAPACITY, compiling, padded_ids, ran, skip_without, static_cache, whole_mask
from waits import Waits

skip_without("native")


@pytest.fixture(autouse=True)
def _compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with compiling(monkeypatch):
        yield


def compiled_steps(
    model: Any, cache: StaticCache, run: Callable[..., Any], *, prompt: int, steps: int, padding: int = 0
) -> Tensor:
    """Logits of a prompt without, and of steps with ``run``; those after the second may not compile anything."""
    ids, mask = padded_ids(prompt + steps, padding)
    logits = [model(ids[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache).logits[:, -1]]
    for i in range(prompt, prompt + steps):
        given = {"attention_mask": whole_mask(mask[:, : i + 1]), "past_key_values": cache}
        stance = "fail_on_recompile" if i > prompt else "default"
        with torch.compiler.set_stance(stance):
            logits.append(run(ids[:, i : i + 1], **given).logits[:, -1].clone())
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("layers", "padding"), [(3, 20), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 0), (5, 0)))]
)
@torch.inference_mode()
def test_a_step_is_one_graph_whatever_the_layers_and_serves_all_steps(layers: int, padding: int) -> None:
    model = tiny_model(dtype=torch.float32, layers=layers)
    basis = basis_of(model)
    expected = ran(model, DynamicCache(config=model.config), basis=basis, padding=padding)
    run = torch.compile(model, fullgraph=True, backend="eager")
    with attach(model, basis, budget=BUDGET, tail="linear", backend="native") as handle:
        found = compiled_steps(model, static_cache(model), run, prompt=186, steps=9, padding=padding)
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
        report = handle.report()
    torch.testing.assert_close(found, expected.logits, rtol=0, atol=1e-4)
    assert torch.equal(found.argmax(-1), expected.logits.argmax(-1))
    assert (report.sparse_steps, report.read_fraction) == (9 * (layers - 1), expected.report.read_fraction)


@torch.inference_mode()
def test_all_that_a_graph_holds_stays_where_it_is() -> None:
    """Else ``mode="reduce-overhead"`` would copy it at every step, or give the graph up for what it writes."""
    moving: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        for node in graph.graph.find_nodes(op="placeholder"):
            if not node.meta["tensor_dict"].get("_dynamo_static_input_type"):
                moving.append(tuple(node.meta["example_value"].shape))
        return graph.forward

    model = tiny_model(dtype=torch.float32)
    run = torch.compile(model, fullgraph=True, backend=backend)
    with attach(model, tiny_basis(), budget=BUDGET, tail="linear", backend="native"):
        compiled_steps(model, static_cache(model), run, prompt=100, steps=2)
    assert sorted(moving) == [(2, 1), (2, 1, 1, CAPACITY)], "beside the token and its mask"


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "opt"))]
)
def test_generate_compiles_once_for_any_number_of_calls(family: str) -> None:
    """As it does by itself on a GPU; a second graph of Gemma 2's is that of windows that are full."""
    model, (ids, mask) = copy.deepcopy(tiny_model(family, dtype=torch.float32)), padded_ids(150, 20)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    with attach(model, tiny_basis(family), budget=BUDGET, tail="linear", backend="native") as handle:
        expected = model.generate(ids, **settings)
        for _ in range(2):
            found = model.generate(ids, cache_implementation="static", compile_config=config, **settings)
            assert torch.equal(found, expected)
        assert handle.report().sparse_steps == 3 * 11 * 2
    assert counters["stats"]["unique_graphs"] == (2 if family == "gemma2" else 1) and not counters["graph_break"]


@pytest.mark.slow
@torch.inference_mode()
def test_detached_and_attached_anew_a_compiled_model_follows() -> None:
    model, (ids, _) = tiny_model(dtype=torch.float32), padded_ids(110, 0)
    cache, run = static_cache(model), torch.compile(model, backend="eager")
    model(ids[:, :100], past_key_values=cache)
    for i, attached in ((100, True), (102, False), (104, True)):
        plain = copy.deepcopy(cache)
        with attach(model, tiny_basis(), budget=BUDGET, backend="native") if attached else nullcontext():
            for token in (ids[:, i : i + 1], ids[:, i + 1 : i + 2]):
                ours, theirs = (step(token, past_key_values=held) for step, held in ((run, cache), (model, plain)))
                torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.inference_mode()
def test_compiled_code_copies_no_cache_and_makes_encoders_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the code generator: K, V, low-rank keys and sums are written in place."""
    from torch._inductor.utils import run_and_get_code

    made, plain = [], native.NativeEncoder
    monkeypatch.setattr(native, "NativeEncoder", lambda encoder: made.append(1) or plain(encoder))
    model, ids = tiny_model(dtype=torch.float32, layers=2), random_ids(2, 130)
    cache, run = static_cache(model), torch.compile(model, fullgraph=True)
    with attach(model, basis_of(model), budget=BUDGET, tail="linear", backend="native"):
        model(ids[:, :120], past_key_values=cache)
        _, code = run_and_get_code(lambda: run(ids[:, 120:121], past_key_values=cache))
        for i in range(121, 130):
            run(ids[:, i : i + 1], past_key_values=cache)
    allocated = [
        line for part in code for line in part.splitlines() if "empty_strided" in line and str(CAPACITY) in line
    ]
    assert code and not allocated
    assert len(made) == 1


@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("tail", ["linear", "none"])
@pytest.mark.parametrize("backend", ["native", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_step_waits_for_nothing(backend: str, tail: str, padding: int) -> None:
    skip_without(backend)
    model, (ids, mask) = tiny_model(dtype=torch.float32), padded_ids(193, padding)
    cache, settings = static_cache(model), {"budget": BUDGET, "tail": tail, "backend": backend}
    with torch.inference_mode(), attach(model, tiny_basis(), **settings) as handle:
        for start, stop in ((0, 190), (190, 191)):
            model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        before = handle.report().sparse_steps
        for i in (191, 192):
            # The second is the one in which a block joins the tail's sums.
            with Waits() as waits:
                model(ids[:, i : i + 1], attention_mask=whole_mask(mask[:, : i + 1]), past_key_values=cache)
            assert not waits.found
        assert handle.report().sparse_steps == before + 4
