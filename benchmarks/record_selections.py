"""Record which tokens the bundled model selects at 4096 tokens, for ``loki bench attention --selection recorded``.

Calibrates on the bundled novels, prefills another one and lets the model go on for some steps, each of whose sets is
kept: one a sparse layer and KV head, at each budget. Needed again only where the rule of selection changes.

    python benchmarks/record_selections.py -o src/loki_attention/data/selections.npz
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from loki_attention import Budget, attach, calibrate
from loki_attention.benchmarking.selections import RECORDED_TOKENS
from loki_attention.data import haystack_text, reference_model_path, sample_texts
from loki_attention.integrations.huggingface.loading import load_model, load_tokenizer, new_cache

FRACTIONS = (1 / 8, 1 / 16, 1 / 32)
STEPS = 12


def main() -> None:
    """Write the file: for each budget a bit a token, a row a set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    folder = str(reference_model_path())
    model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
    basis = calibrate(model, tokenizer, sample_texts(), length=RECORDED_TOKENS, fit_tokens=32768, held_out_tokens=4096,
                      candidate="balanced", tail="linear", progress=True)  # fmt: skip
    prose = tokenizer(haystack_text().read_text(encoding="utf-8"), return_tensors="pt").input_ids
    sets = {}
    for fraction in FRACTIONS:
        cache, prompt = new_cache(model), prose[:, : RECORDED_TOKENS - STEPS]
        with torch.inference_mode(), attach(model, basis, budget=Budget(fraction=fraction)) as attached:
            model(prompt, past_key_values=cache, logits_to_keep=1)
            with attached.trace() as trace:
                for i in range(prompt.shape[1], RECORDED_TOKENS):
                    model(prose[:, i : i + 1], past_key_values=cache)
        bits = []
        for forward in trace:
            for indices in forward.values():
                for slots in indices[0, :, 0].tolist():
                    row = np.zeros(RECORDED_TOKENS, dtype=bool)
                    row[[slot for slot in slots if slot >= 0]] = True
                    bits.append(row)
        sets[str(fraction)] = np.packbits(np.stack(bits), axis=1)
    np.savez_compressed(arguments.output, **sets)


if __name__ == "__main__":
    main()
