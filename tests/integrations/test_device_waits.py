"""How often a decode step waits for its device: operations that hand a tensor's content to Python, counted on the CPU."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from loki_attention import attach
from loki_attention.core.attention import Softmax
from loki_attention.core.budget import Budget
from loki_attention.integrations.huggingface.forward import Forward
from loki_attention.integrations.huggingface.sparse_rows import Tensors
from loki_attention.kernels import native
from loki_attention.kernels.triton import availability
from models import basis_of, random_ids, tiny_model
from waits import Waits

MISSING = {
    "native": None if native.available() else "the native extension is not built",
    "triton": None if availability.interpreted() and availability.problem() is None else "needs Triton's interpreter",
}


def waits_of_a_step(layers: int, backend: str, tail: str, padding: int) -> Counter[str]:
    model, ids = tiny_model(dtype=torch.float32, layers=layers), random_ids(2, 151)
    mask = torch.ones(2, 151, dtype=torch.long)
    mask[0, :padding] = 0
    arguments = {"budget": Budget(fraction=1 / 8, minimum=24, sinks=2, recent=8), "tail": tail, "backend": backend}
    cache, basis = DynamicCache(config=model.config), basis_of(model)
    with torch.inference_mode(), attach(model, basis, **arguments) as handle:
        for start, stop in ((0, 149), (149, 150)):
            model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        before = handle.report().sparse_steps
        with Waits() as waits:
            model(ids[:, 150:], attention_mask=mask, past_key_values=cache)
        assert handle.report().sparse_steps == before + layers - 1
    return waits.found


@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("tail", ["linear", "none"])
@pytest.mark.parametrize("backend", ["native", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_step_waits_as_often_however_many_layers_there_are(backend: str, tail: str, padding: int) -> None:
    if MISSING[backend] is not None:
        pytest.skip(str(MISSING[backend]))
    few, many = (waits_of_a_step(layers, backend, tail, padding) for layers in (2, 4))
    assert few == many
    assert 0 < few.total() <= 8


def test_layers_on_another_device_have_rows_of_their_own() -> None:
    def tensors(device: str) -> Tensors:
        query, keys = (torch.zeros(1, 2, count, 16, device=device) for count in (1, 40))
        return Tensors(query, keys, keys, None, 1.0, None, Softmax())

    forward = Forward(None, None, 0)
    first: Tensor = forward.rows(tensors("cpu")).rank
    assert forward.rows(tensors("cpu")).rank is first
    assert forward.rows(tensors("meta")).rank.device.type == "meta"
