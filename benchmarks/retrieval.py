"""Needle retrieval in held-out prose: exact match of the answer, paired over methods and budgets.

The card's three kinds in turn, at 1K, 2K and 4K tokens. The dense prompt is computed once a question and shared; the
rows that predict the answer are sparse (rule ``continuation``). Resumable: run the same command again.

    python benchmarks/retrieval.py --text wiki.test.raw --calibration-text wiki.train.raw -o benchmarks/results/retrieval.json
"""

import hashlib
from typing import Any

from loki_attention.benchmarking.resumable import run_items
from loki_attention.evaluation.needles import KINDS, Question, needle_questions
from loki_attention.evaluation.retrieval import answer
from loki_attention.evaluation.text import detokenize_wikitext
from loki_attention.results import Result, environment, save_results
from records import calibrated, command_line, model_and_tokenizer, retrieval_results
from variants import retrieval_variants

LENGTHS = (1024, 2048, 4096)
CALIBRATION_LENGTH = 4096


def questions_of(tokenizer: Any, prose: str, length: int, count: int) -> list[Question]:
    """``count`` questions of ``length`` tokens, the kinds in turn."""
    each = -(-count // len(KINDS))
    by_kind = [needle_questions(tokenizer, prose, kind=kind, length=length, count=each) for kind in KINDS]
    return [by_kind[i % len(KINDS)][i // len(KINDS)] for i in range(count)]


def main() -> None:
    """Measure and write the result file."""
    parser = command_line(__doc__)
    parser.add_argument("--questions", type=int, default=400, help="questions a length (default 400)")
    arguments = parser.parse_args()
    made_by = environment(dtype="float32")
    model, tokenizer = model_and_tokenizer()
    basis = calibrated(model, tokenizer, arguments.calibration_text, length=CALIBRATION_LENGTH)
    prose = detokenize_wikitext(arguments.text.read_text(encoding="utf-8"))
    variants = retrieval_variants(basis)
    results: list[Result] = []
    for length in LENGTHS:
        questions = questions_of(tokenizer, prose, length, arguments.questions)

        def measure(index: int, questions: list[Question] = questions) -> dict[str, bool]:
            return answer(model, questions[index], variants)

        asked = hashlib.sha256(b"".join(question.prompt.numpy().tobytes() for question in questions[:10])).hexdigest()
        key = f"{asked} {basis.record['windows']} {basis.candidate} {[variant.config for variant in variants]}"
        partial = arguments.output.with_name(f"{arguments.output.stem}-{length}.partial")
        items = run_items(partial, key, len(questions), measure)
        results += retrieval_results(variants, items, length)
    save_results(arguments.output, results, made_by)
    for length in LENGTHS:
        arguments.output.with_name(f"{arguments.output.stem}-{length}.partial").unlink()


if __name__ == "__main__":
    main()
