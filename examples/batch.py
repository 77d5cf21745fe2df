"""Eight prompts of different lengths in one left-padded batch: each sequence has its own budget, padding is never read.

python examples/batch.py            # calibrates the bundled model first: some seconds
python examples/batch.py my-basis   # the same, but keeps the basis in that folder or takes it from there
"""

import sys

from bundled import ask, hide_fact, load_bundled
from loki_attention import Budget, attach

NAMES = ("lantern", "violin", "silver", "orchard", "garden", "engine", "coffee", "winter")


def main(basis_folder: str | None = None) -> None:
    """Asks each sequence for its own number and prints the answers with what was read for them."""
    model, tokenizer, basis = load_bundled(basis_folder)
    numbers = [10101 * (i + 1) + i for i in range(len(NAMES))]
    prompts = [hide_fact(name, numbers[i], 600 + 200 * i) + ask(name) for i, name in enumerate(NAMES)]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    with attach(model, basis, budget=Budget(fraction=1 / 8)) as attached:
        output = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :])
    for name, number, answer, mask in zip(NAMES, numbers, answers, inputs.attention_mask, strict=True):
        print(f"{name:>8} in {int(mask.sum()):4} tokens: {number} is answered{answer}")
    print(f"\n{attached.report()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
