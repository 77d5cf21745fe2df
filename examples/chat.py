"""A chat on one growing cache: every turn reads a sixteenth of it, and nothing is encoded twice.

python examples/chat.py            # calibrates the bundled model first: some seconds
python examples/chat.py my-basis   # the same, but keeps the basis in that folder or takes it from there
"""

import sys

import torch
from transformers import DynamicCache

from bundled import ask, hide_fact, load_bundled
from loki_attention import Budget, attach


def main(basis_folder: str | None = None) -> None:
    """Three turns, each told a number and asked for one; prints the answers and what had been read by then."""
    model, tokenizer, basis = load_bundled(basis_folder)
    cache, ids = DynamicCache(config=model.config), torch.empty(1, 0, dtype=torch.long)
    turns = [
        hide_fact("lantern", 48213, 1500) + ask("lantern"),
        hide_fact("violin", 70956, 900) + ask("violin"),
        ask("lantern"),
    ]
    with attach(model, basis, budget=Budget(fraction=1 / 16)) as attached:
        for said in turns:
            ids = torch.cat([ids, tokenizer(said, return_tensors="pt").input_ids], dim=1)
            prompt_tokens = ids.shape[1]
            ids = model.generate(ids, past_key_values=cache, max_new_tokens=7, do_sample=False)
            report = attached.report()
            print(f"{said.splitlines()[-1]}{tokenizer.decode(ids[0, prompt_tokens:])}")
            print(f"  {cache.get_seq_length()} tokens cached, {report.read_fraction:.1%} of their bytes read so far\n")
    print(attached.report())


if __name__ == "__main__":
    main(*sys.argv[1:])
