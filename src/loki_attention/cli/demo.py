"""``loki demo``: the main job on the bundled model: calibrate, then find facts hidden thousands of tokens back."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table
from rich.text import Text

from loki_attention.cli.output import AsJson, describe, examples, messages, print_json, results
from loki_attention.files import written_whole

if TYPE_CHECKING:
    from loki_attention.core.basis import KeyBasis
    from loki_attention.evaluation.answers import Answer, Score
    from loki_attention.evaluation.haystack import Question

DEMO_EXAMPLES = examples("loki demo", "loki demo -o my-folder", "loki demo --json > demo.json")
METHODS = ("dense", "loki", "exact-topk", "streaming")

_LENGTH, _FIT_TOKENS, _HELD_OUT_TOKENS = 2048, 32768, 4096
# The context stays within 1.5 times the calibrated length, and no recent window reaches back to the facts.
_CONTEXT_TOKENS, _LEAST_TOKENS_BACK = 3000, 2000
_QUESTIONS_PER_KIND = 2

Output = Annotated[Path, typer.Option("--output", "-o", help="The folder for the basis, the answers and the pictures.")]


class _Asked(NamedTuple):
    """A question in words, how far back its fact stands, and every method's answer."""

    question: str
    expected: str
    tokens_back: int
    answers: "list[Answer]"


class _Demo(NamedTuple):
    """All that the demo found: what ``--json`` prints and ``answers.json`` holds."""

    basis: "KeyBasis"
    path: Path
    asked: list[_Asked]
    scores: "list[Score]"


def demo_command(output: Output = Path("demo-output"), as_json: AsJson = False) -> None:
    """Calibrate the bundled model and ask it for hidden facts, dense and sparse side by side. No download; a minute."""
    from loki_attention.analysis.rank import rank_table
    from loki_attention.analysis.report import rank_report
    from loki_attention.data import reference_model_path
    from loki_attention.integrations.huggingface.loading import load_model, load_tokenizer

    messages().rule("1  Calibrate the bundled model on bundled novels")
    folder = str(reference_model_path())
    model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
    basis = _calibrate(model, tokenizer)
    path = basis.save(output / "basis")
    if not as_json:
        results().print(rank_report(rank_table(basis)))
    messages().rule(f"2  Ask for facts hidden in a novel of {_CONTEXT_TOKENS:,} tokens")
    asked = _ask(model, tokenizer, basis)
    demo = _Demo(basis, path, asked, _scores(asked))
    document = _document(demo)
    with written_whole(output / "answers.json") as draft:
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    pictures = _draw(demo, output / "plots")
    if as_json:
        print_json(document | {"figures": [str(picture) for picture in pictures]})
    else:
        _print(demo, pictures)


def _calibrate(model: Any, tokenizer: Any) -> "KeyBasis":
    from loki_attention import Budget, calibrate
    from loki_attention.data import sample_texts

    return calibrate(
        model,
        tokenizer,
        sample_texts(),
        length=_LENGTH,
        budget=Budget(fraction=1 / 16, minimum=48, sinks=4, recent=16),
        fit_tokens=_FIT_TOKENS,
        held_out_tokens=_HELD_OUT_TOKENS,
        progress=True,
    )


def _ask(model: Any, tokenizer: Any, basis: "KeyBasis") -> list[_Asked]:
    """Every question, answered by every method; nothing is left out because of how it was answered."""
    from loki_attention.evaluation.answering import generate_answers
    from loki_attention.evaluation.needles import KINDS
    from loki_attention.evaluation.variant import Variant

    variants = [Variant(name=name, method=name, budget=basis.budget, basis=basis) for name in METHODS]
    questions = [question for kind in KINDS for question in _questions(tokenizer, kind)]
    return [_in_words(tokenizer, one, generate_answers(model, tokenizer, one, variants)) for one in questions]


def _questions(tokenizer: Any, kind: str) -> "list[Question]":
    """The first few questions drawn whose fact stands far enough back."""
    from loki_attention.data import haystack_text
    from loki_attention.evaluation.needles import needle_questions

    prose = haystack_text().read_text(encoding="utf-8")
    drawn = needle_questions(tokenizer, prose, kind=kind, length=_CONTEXT_TOKENS, count=16 * _QUESTIONS_PER_KIND)
    return [question for question in drawn if _tokens_back(question) >= _LEAST_TOKENS_BACK][:_QUESTIONS_PER_KIND]


def _tokens_back(question: "Question") -> int:
    return round((1 - question.depth) * len(question.prompt))


def _in_words(tokenizer: Any, question: "Question", answers: "list[Answer]") -> _Asked:
    ending = tokenizer.decode(question.prompt[-64:])
    return _Asked(
        question=ending[ending.rindex("The ") :],
        expected=tokenizer.decode(question.answer).strip(),
        tokens_back=_tokens_back(question),
        answers=answers,
    )


def _scores(asked: list[_Asked]) -> "list[Score]":
    from loki_attention.evaluation.answers import score

    sparse = asked[0].answers[METHODS.index("loki")]
    return [score([one.answers[i] for one in asked], dense=sparse) for i in range(len(METHODS))]


def _document(demo: _Demo) -> dict[str, Any]:
    from loki_attention.analysis.rank import rank_table

    return {
        **describe(demo.basis, demo.path),
        "ranks": rank_table(demo.basis).to_dict(),
        "questions": [
            {
                "question": one.question,
                "expected": one.expected,
                "tokens_back": one.tokens_back,
                "answers": {answer.variant: {"text": answer.text, "right": answer.right} for answer in one.answers},
            }
            for one in demo.asked
        ],
        "scores": [score.to_dict() for score in demo.scores],
    }


def _draw(demo: _Demo, folder: Path) -> list[Path]:
    """The pictures written, none without matplotlib."""
    from loki_attention.analysis.figures import can_draw, write_answers_figure, write_figures

    if not can_draw():
        return []
    return [*write_figures(demo.basis, folder), write_answers_figure(demo.scores, folder)]


def _print(demo: _Demo, pictures: list[Path]) -> None:
    from loki_attention.analysis import report
    from loki_attention.analysis.rank import rank_table, spectra

    out = results()
    ranks = rank_table(demo.basis)
    tables = [_answers_table(demo), _scores_table(demo)]
    if not pictures:
        tables += [report.rank_drawing(ranks), report.spectra_drawing(spectra(demo.basis))]
    for table in tables:
        out.print(table)
        out.print()
    if pictures:
        names = " ".join(picture.name for picture in pictures)
        out.print(f"Pictures in {pictures[0].parent}: {names}", highlight=False, markup=False)
    else:
        out.print("For pictures: pip install 'loki-attention[plots]', then run this again.", markup=False)
    print(f"""
Next, your own model (Llama, Qwen, Mistral ...) and text like it will read:
  loki inspect {demo.path}
  loki calibrate MODEL --text FILES -o my-basis
  loki generate MODEL --basis my-basis --prompt-file FILE --tokens 12.5%""")


def _answers_table(demo: _Demo) -> Table:
    ours, dense = (METHODS.index(name) for name in ("loki", "dense"))
    same = sum(one.answers[ours].text == one.answers[dense].text for one in demo.asked)
    table = Table(
        title=f"Facts hidden in {_CONTEXT_TOKENS:,} tokens of prose: what the model answers",
        caption=f"loki gave dense attention's answer {same} of {len(demo.asked)} times, from "
        f"{demo.scores[ours].read_fraction:.1%} of the bytes.",
        show_lines=True,
    )
    table.add_column("asked for", no_wrap=True)
    for name in METHODS:
        table.add_column(name)
    for one in demo.asked:
        subject = re.sub(r"^The (special )?| (is|are):?$", "", one.question)
        marks = [Text(f"✓ {a.text}", "green") if a.right else Text(f"✗ {a.text}", "red") for a in one.answers]
        table.add_row(Text(f"{subject}\n{one.tokens_back:,} tokens back"), *marks)
    return table


def _scores_table(demo: _Demo) -> Table:
    layers = ", ".join(str(i) for i in demo.basis.spec.layers if i and i not in demo.basis.dense_layers)
    table = Table(
        title=f"What was read for it, at {demo.basis.budget}",
        caption=f"Means of a decode step in one of the sparse layers ({layers}; the rest stay dense), keys and values in "
        "float32. exact-topk scores with every key: it is the bound, not a fast method.",
    )
    table.add_column("method")
    for name in ("right", "tokens attended", "KiB read", "of dense"):
        table.add_column(name, justify="right")
    for score in demo.scores:
        table.add_row(
            score.variant,
            f"{score.right} of {score.asked}",
            f"{score.tokens_read:,.0f}",
            f"{score.bytes_read / 1024:,.0f}",
            f"{score.read_fraction:.1%}",
        )
    return table
