"""A transformers pipeline on an attached model: ``attach`` is all that is added.

python examples/pipeline.py            # calibrates the bundled model first: some seconds
python examples/pipeline.py my-basis   # the same, but keeps the basis in that folder or takes it from there
"""

import sys

from transformers import pipeline

from bundled import ask, hide_fact, load_bundled
from loki_attention import Budget, attach


def main(basis_folder: str | None = None) -> None:
    """Asks for a number hidden 900 tokens back and prints the answer with what was read for it."""
    model, tokenizer, basis = load_bundled(basis_folder)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompt = hide_fact("lantern", 48213, 3000) + ask("lantern")
    with attach(model, basis, budget=Budget(fraction=1 / 16)) as attached:
        answers = generate(prompt, max_new_tokens=7, do_sample=False, return_full_text=False)
    print(f"The magic number for lantern is{answers[0]['generated_text']}\n")
    print(attached.report())


if __name__ == "__main__":
    main(*sys.argv[1:])
