"""Assisted decoding: drafts looked up in the prompt, or made by a smaller model, and checked by the attached one.

    python examples/assisted.py            # calibrates the bundled model first: some seconds
    python examples/assisted.py my-basis   # the same, but keeps the basis in that folder or takes it from there

Many tokens at once are prefill to ``attach``: a step that checks a draft is dense, one without a draft is sparse. What
is rejected is cropped from the cache, low-rank keys and sums with it.
"""

import copy
import sys

from bundled import hide_fact, load_bundled
from loki_attention import Budget, attach


def main(basis_folder: str | None = None) -> None:
    """Goes on with a text both ways and prints what each step was."""
    model, tokenizer, basis = load_bundled(basis_folder)
    first_layers = copy.deepcopy(model)
    del first_layers.model.layers[2:]
    first_layers.config.num_hidden_layers = 2
    inputs = tokenizer(hide_fact("lantern", 48213, 2000), return_tensors="pt")
    for drafts in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": first_layers}):
        with attach(model, basis, budget=Budget(fraction=1 / 16)) as attached:
            output = model.generate(**inputs, **drafts, max_new_tokens=32, do_sample=False)
        report = attached.report()
        sparse, dense = report.layers[-1].sparse_steps, sum(report.layers[-1].dense_steps.values())
        print(f"{next(iter(drafts))}: {tokenizer.decode(output[0, inputs.input_ids.shape[1] :])!r}")
        print(f"32 tokens in {sparse + dense} steps: the prompt, {dense - 1} checks of a draft, {sparse} sparse steps")
        print(f"{report}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
