"""Perplexity, KL from dense and next-token agreement on WikiText-2 test: the table of record.

Windows of 2048 tokens; the first half is a dense prompt, every row of the second half selects for itself (rule
``continuation``). Calibrates the bundled model first, on the text given. Resumable: run the same command again.

    python benchmarks/wikitext2.py --text wiki.test.raw --calibration-text wiki.train.raw -o benchmarks/results/wikitext2.json
"""

from loki_attention.benchmarking.resumable import run_items
from loki_attention.evaluation.continuation import Loss, compare_window
from loki_attention.evaluation.text import detokenize_wikitext, text_windows
from loki_attention.results import environment, save_results
from records import calibrated, command_line, loss_results, model_and_tokenizer
from variants import perplexity_variants

LENGTH = 2048


def main() -> None:
    """Measure and write the result file."""
    parser = command_line(__doc__)
    parser.add_argument("--windows", type=int, default=40, help="windows of 2048 tokens (default 40, at least 20)")
    arguments = parser.parse_args()
    made_by = environment(dtype="float32")
    model, tokenizer = model_and_tokenizer()
    basis = calibrated(model, tokenizer, arguments.calibration_text, length=LENGTH)
    text = detokenize_wikitext(arguments.text.read_text(encoding="utf-8"))
    windows = text_windows(tokenizer, text, length=LENGTH, count=arguments.windows)
    variants = perplexity_variants(basis)

    def measure(index: int) -> dict[str, list[float]]:
        return {name: list(loss) for name, loss in compare_window(model, windows[index], variants).items()}

    key = f"wikitext {basis.record['windows']} {basis.candidate} {[variant.config for variant in variants]}"
    items = run_items(arguments.output.with_suffix(".partial"), key, len(windows), measure)
    losses = {variant.name: [Loss(*item[variant.name]) for item in items] for variant in variants}
    save_results(arguments.output, loss_results(variants, losses), made_by)
    arguments.output.with_suffix(".partial").unlink()


if __name__ == "__main__":
    main()
