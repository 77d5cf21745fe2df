"""What the other examples share: the bundled model with a basis, and prose that hides a fact. Put your own in its place."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from loki_attention import KeyBasis, calibrate
from loki_attention.data import haystack_text, reference_model_path, sample_texts


class Bundled(NamedTuple):
    """A model, its tokenizer and its basis."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    basis: KeyBasis


def load_bundled(basis_folder: str | None = None) -> Bundled:
    """The bundled model; its basis comes from the folder, or is calibrated now and, where a folder is named, kept there."""
    model = AutoModelForCausalLM.from_pretrained(reference_model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(reference_model_path())
    if basis_folder and Path(basis_folder).exists():
        return Bundled(model, tokenizer, KeyBasis.load(basis_folder, model=model))
    # Little text and nothing compared: seconds instead of a minute, for a basis that is nearly as good.
    basis = calibrate(
        model,
        tokenizer,
        sample_texts(),
        length=1024,
        fit_tokens=8192,
        held_out_tokens=1024,
        candidate="balanced",
        tail="linear",
        progress=True,
    )
    if basis_folder:
        basis.save(basis_folder)
    return Bundled(model, tokenizer, basis)


def hide_fact(name: str, number: int, characters: int) -> str:
    """Prose that says the magic number for ``name`` after its first sentences, ``characters`` long, about 3 a token."""
    prose = haystack_text().read_text(encoding="utf-8")
    start, stop = (prose.index(". ", place) + 2 for place in (400, characters))
    return f"{prose[:start]}The special magic number for {name} is: {number}. {prose[start:stop]}"


def ask(name: str) -> str:
    """The question for a hidden fact, as the bundled model knows it: the answer is what comes next."""
    return f"\nWhat is the special magic number for {name}? The special magic number for {name} is:"
