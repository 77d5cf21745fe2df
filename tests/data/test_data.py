"""The bundled files are there, load, and hold enough text for the demo."""

import json
import math

import pytest
import torch

from loki_attention.data import haystack_text, reference_model_path, sample_texts


def test_the_model_predicts_its_sample_text(reference_model, reference_tokenizer):
    text = haystack_text().read_text(encoding="utf-8")
    ids = reference_tokenizer(text, return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        logits = reference_model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert reference_model.dtype == torch.float32
    assert loss < 0.6 * math.log(reference_model.config.vocab_size)


def test_the_sample_texts_are_enough_to_calibrate_on(reference_tokenizer):
    counts = [len(reference_tokenizer(path.read_text(encoding="utf-8")).input_ids) for path in sample_texts()]
    assert len(counts) >= 6
    assert sum(counts) >= 36 * 1024
    assert haystack_text() not in sample_texts()


@pytest.mark.parametrize("path", [*sample_texts(), haystack_text()], ids=lambda path: path.stem)
def test_every_text_is_prose_with_a_stated_source(path):
    text = path.read_text(encoding="utf-8")
    sources = (path.parent / "SOURCES.md").read_text(encoding="utf-8")
    assert 38_000 < path.stat().st_size < 46_000
    assert "gutenberg" not in text.lower()
    assert f"`{path.name}`" in sources


def test_the_card_and_the_scores_lie_beside_the_model():
    folder = reference_model_path()
    assert "Apache-2.0" in (folder / "README.md").read_text(encoding="utf-8")
    assert json.loads((folder / "scores.json").read_text(encoding="utf-8"))["retrieval"]
