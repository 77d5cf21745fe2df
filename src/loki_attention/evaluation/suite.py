"""What ``loki evaluate`` runs: tasks by name with their options, and the variants that each of them gets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loki_attention.core.basis import KeyBasis
from loki_attention.data import haystack_text
from loki_attention.errors import ArgumentError, CorpusError, check_tokens, unknown_name
from loki_attention.evaluation.families import FAMILIES
from loki_attention.evaluation.fidelity import Fidelity
from loki_attention.evaluation.method_grammar import BudgetSpec, Floors, MethodSpec, variant_of
from loki_attention.evaluation.needles import NOUNS
from loki_attention.evaluation.perplexity import Perplexity
from loki_attention.evaluation.retrieval import Retrieval
from loki_attention.evaluation.task import Task
from loki_attention.evaluation.text import detokenize_wikitext, text_windows, tokenize
from loki_attention.evaluation.text_files import BLANK_LINE, read_records, read_text, text_files
from loki_attention.evaluation.variant import DENSE, Variant
from loki_attention.integrations.huggingface.families import text_config

LM_EVAL = "lm-eval"
TASKS = ("perplexity", "retrieval", "fidelity", LM_EVAL)
_LONGEST_WINDOW = 2048
_RETRIEVAL_LENGTHS = (2048, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What tasks are made of. None leaves a choice to the task or the model.

    ``text``: files of text or folders of them, by default the bundled haystack; ``wikitext``: they are WikiText as
    released. ``window``, ``prompt`` and ``stride`` in tokens; ``windows`` at most. ``task_data``: the folder of files for
    lm-eval tasks; ``limit`` their items at most.
    """

    text: Sequence[Path] = ()
    wikitext: bool = False
    field: str = "text"
    prompts: Path | None = None
    window: int | None = None
    prompt: int | None = None
    stride: int | None = None
    windows: int | None = 20
    lengths: Sequence[int] | None = None
    families: Sequence[str] = FAMILIES
    depths: int = 10
    questions: int = 100
    words: Path | None = None
    task_data: Path | None = None
    limit: int | None = None
    seed: int = 0


class Plan(NamedTuple):
    """Every task's variants, and the tasks for which a method and budget cannot read as little as was asked for."""

    tasks: list[tuple[Task, list[Variant]]]
    left_out: dict[str, list[str]]


def check_names(names: Sequence[str], choices: Choices) -> None:
    """Raise ``ArgumentError`` for unknown tasks and families and for counts below 1, before anything is loaded."""
    for name in names:
        kind, colon, rest = name.partition(":")
        if kind not in TASKS or (colon and kind in ("perplexity", "fidelity")):
            raise unknown_name("task", name, (*TASKS[:-1], f"{LM_EVAL}:TASK"))
        if kind == LM_EVAL and not rest:
            raise ArgumentError("lm-eval needs the name of a task; write lm-eval:hellaswag")
        if kind == "retrieval" and rest and rest not in FAMILIES:
            raise unknown_name("family", rest, FAMILIES)
    for family in choices.families:
        if family not in FAMILIES:
            raise unknown_name("family", family, FAMILIES)
    for number, unit in (("windows", "windows"), ("limit", "items")):
        if getattr(choices, number) is not None:
            check_tokens(number, getattr(choices, number), least=1, unit=unit)


def make_tasks(names: Sequence[str], model: Any, tokenizer: Any, choices: Choices) -> list[Task]:
    """The tasks of ``names``: ``perplexity``, ``retrieval``, ``retrieval:FAMILY``, ``fidelity``, ``lm-eval:TASK``.

    Raises a ``LokiError`` for unknown names, files that cannot be read, and lengths beyond the model's.
    """
    check_names(names, choices)
    text = _text(choices)
    tasks: list[Task] = []
    for name in names:
        kind, _, rest = name.partition(":")
        if kind == "perplexity":
            tasks.append(_perplexity(model, tokenizer, text, choices))
        elif kind == "fidelity":
            tasks.append(_fidelity(model, tokenizer, text, choices))
        elif kind == "retrieval":
            tasks += _retrieval(model, tokenizer, text, choices, [rest] if rest else choices.families)
        else:
            from loki_attention.evaluation.lm_eval_task import LmEvalTask

            tasks.append(
                LmEvalTask(model, tokenizer, rest, data=choices.task_data, limit=choices.limit, seed=choices.seed)
            )
    return tasks


def plan(
    model: Any,
    basis: KeyBasis | None,
    tasks: Sequence[Task],
    methods: Sequence[MethodSpec],
    budgets: Sequence[BudgetSpec],
    floors: Floors,
) -> Plan:
    """Every method at every budget on every task; dense attention, which every task measures, is left to it."""
    planned: list[tuple[Task, list[Variant]]] = []
    left_out: dict[str, list[str]] = {}
    for task in tasks:
        variants = []
        for spec in (spec for spec in methods if spec.method != DENSE):
            for budget in budgets:
                found = variant_of(model, basis, spec, budget, floors=floors, steps=task.steps)
                if found is None:
                    left_out.setdefault(f"{spec} @ {budget.text}", []).append(task.name)
                else:
                    variants.append(found)
        planned.append((task, variants))
    return Plan(planned, left_out)


def _text(choices: Choices) -> str:
    files = [file for path in choices.text for file, _ in text_files(path)] or [haystack_text()]
    text = BLANK_LINE.join(read_text(file, choices.field) for file in files)
    return detokenize_wikitext(text) if choices.wikitext else text


def _window(model: Any, choices: Choices) -> int:
    longest = text_config(model).max_position_embeddings
    _check_length(choices.window, longest)
    return choices.window or min(_LONGEST_WINDOW, longest)


def _check_length(length: int | None, longest: int) -> None:
    if length is not None and not 1 < length <= longest:
        raise ArgumentError(f"a length of {length} tokens; this model takes at least 2 and at most {longest}")


def _perplexity(model: Any, tokenizer: Any, text: str, choices: Choices) -> Task:
    return Perplexity(
        model,
        tokenizer,
        text,
        length=_window(model, choices),
        prompt=choices.prompt,
        stride=choices.stride,
        windows=_at_most(tokenizer, text, _window(model, choices), choices),
        seed=choices.seed,
    )


def _at_most(tokenizer: Any, text: str, length: int, choices: Choices) -> int | None:
    """So many windows as were asked for and the text has; at least one, which too short a text is refused for."""
    if choices.windows is None:
        return None
    return max(1, min(choices.windows, (len(tokenize(tokenizer, text)) - length) // (choices.stride or length) + 1))


def _fidelity(model: Any, tokenizer: Any, text: str, choices: Choices) -> Task:
    length = _window(model, choices)
    if choices.prompts is None:
        count = _at_most(tokenizer, text, length, choices)
        return Fidelity(model, text_windows(tokenizer, text, length=length, count=count), seed=choices.seed)
    ids = [tokenize(tokenizer, prompt)[:length] for prompt in _prompts(choices.prompts)[: choices.windows]]
    return Fidelity(model, [torch.tensor([row]) for row in ids], seed=choices.seed)


def _prompts(path: Path) -> list[str]:
    prompts = [record.get("prompt") for record in read_records(path)]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise CorpusError(f"{path} has a record without text in field 'prompt'; every record needs one")
    return [str(prompt) for prompt in prompts]


def _retrieval(model: Any, tokenizer: Any, text: str, choices: Choices, families: Sequence[str]) -> list[Task]:
    longest = text_config(model).max_position_embeddings
    for length in choices.lengths or ():
        _check_length(length, longest)
    lengths = choices.lengths or [length for length in _RETRIEVAL_LENGTHS if length <= longest] or [longest]
    words = NOUNS if choices.words is None else read_text(choices.words, choices.field).split()
    return [
        Retrieval(
            model,
            tokenizer,
            text,
            family=family,
            length=length,
            questions=choices.questions,
            depths=choices.depths,
            words=words,
            seed=choices.seed,
        )
        for family in families
        for length in lengths
    ]
