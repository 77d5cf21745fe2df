"""Files of known tasks as they are found in the wild, brought to a few plain forms. Knows formats; no models, no lm-eval."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loki_attention.errors import ArgumentError, CorpusError, unknown_name
from loki_attention.evaluation.text_files import read_records

Record = Mapping[str, Any]
_SUFFIXES = r"\.(jsonl|csv)(\.gz)?"
_LETTERS = "ABCDEFGHIJ"
_TRUTHFUL = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTask:
    """A task's items in one of four forms, each item a record with the keys named here.

    ``choices``: after ``query`` the likeliest of ``choices``, right is number ``gold``. ``contexts``: of ``contexts`` the
    one after which ``target`` is likeliest, right is ``gold``. ``word``: ``target`` follows ``query``. ``number``: the
    generated answer to ``query`` ends in ``#### target``. ``mention``: the generated answer to ``query`` has ``target`` in
    it. ``shots`` are the examples before each question.
    """

    name: str
    form: str
    items: Sequence[Record]
    examples: Sequence[Record] = ()
    shots: int = 0


@dataclass(frozen=True, slots=True)
class _Format:
    """How a task's files are named (the first pattern that matches is taken), its form, and how a record is read."""

    files: tuple[str, ...]
    form: str
    read: Callable[[Record], Record]
    examples: str | None = None
    shots: int = 0


def file_task(name: str, folder: Path) -> FileTask:
    """The task of this name from the files of a folder; ``N_lines`` and ``N_topics`` are LongEval's.

    Raises ``ArgumentError`` for a name without a format or without a file, ``CorpusError`` for records of another form.
    """
    if not folder.is_dir():
        raise ArgumentError(f"there is no folder {folder}; give --task-data a folder with files of tasks")
    found = _format(name)
    if found is None:
        raise unknown_name("task file", name, FILE_TASKS)
    path = _file(folder, found.files)
    if path is None:
        raise ArgumentError(f"{folder} has no file for {name!r}; expected {found.files[0]}.jsonl, say")
    examples = None if found.examples is None else _file(folder, (found.examples,))
    return FileTask(
        name=name,
        form=found.form,
        items=_read(path, found.read),
        examples=() if examples is None else _read(examples, found.read),
        shots=0 if examples is None else found.shots,
    )


def has_format(name: str) -> bool:
    """Whether files of a task of this name can be read."""
    return _format(name) is not None


def _format(name: str) -> _Format | None:
    if re.fullmatch(r"\d+_lines", name):
        return _Format((name,), "mention", _line)
    if re.fullmatch(r"\d+_topics", name):
        return _Format((name,), "mention", _topic)
    return _FORMATS.get(name)


def _file(folder: Path, patterns: Sequence[str]) -> Path | None:
    files = sorted(folder.iterdir())
    matches = (file for pattern in patterns for file in files if re.fullmatch(pattern + _SUFFIXES, file.name))
    return next(matches, None)


def _read(path: Path, read: Callable[[Record], Record]) -> list[Record]:
    items = []
    for number, record in enumerate(read_records(path), start=1):
        try:
            items.append(read(record))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise CorpusError(
                f"{path}, record {number}, is not in this task's form ({type(error).__name__}: {error}); it has "
                f"{', '.join(record)}"
            ) from None
    if not items:
        raise CorpusError(f"{path} has no records")
    return items


def _hellaswag(record: Record) -> Record:
    return {"query": record["ctx"], "choices": list(record["endings"]), "gold": int(record["label"])}


def _arc(record: Record) -> Record:
    if "query" in record:
        return {"query": record["query"], "choices": list(record["choices"]), "gold": int(record["gold"])}
    choices = record["choices"]
    gold = list(choices["label"]).index(record["answerKey"])
    return {"query": f"Question: {record['question']}\nAnswer:", "choices": list(choices["text"]), "gold": gold}


def _winogrande(record: Record) -> Record:
    before, after = record["sentence"].split("_", 1)
    contexts = [before + record["option1"], before + record["option2"]]
    return {"contexts": contexts, "target": after.strip(), "gold": int(record["answer"]) - 1}


def _piqa(record: Record) -> Record:
    query = f"Question: {record['goal']}\nAnswer:"
    return {"query": query, "choices": [record["sol1"], record["sol2"]], "gold": int(record["label"])}


def _mmlu(record: Record) -> Record:
    subject = str(record.get("subject", "")).replace("_", " ")
    about = f" about {subject}" if subject else ""
    lines = [f"The following are multiple choice questions (with answers){about}.\n", record["question"].strip()]
    lines += [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, record["choices"], strict=False)]
    letters = list(_LETTERS[: len(record["choices"])])
    return {"query": "\n".join([*lines, "Answer:"]), "choices": letters, "gold": int(record["answer"])}


def _truthfulqa(record: Record) -> Record:
    wrong = [answer.strip() for answer in record["Incorrect Answers"].split(";") if answer.strip()]
    query = f"{_TRUTHFUL}\n\nQ: {record['Question']}\nA:"
    return {"query": query, "choices": [record["Best Answer"].strip(), *wrong], "gold": 0}


def _boolq(record: Record) -> Record:
    query = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return {"query": query, "choices": ["no", "yes"], "gold": int(record["answer"])}


def _lambada(record: Record) -> Record:
    query, _, target = record["text"].rpartition(" ")
    return {"query": query, "target": f" {target}"}


def _gsm8k(record: Record) -> Record:
    return {"query": f"Question: {record['question']}\nAnswer:", "target": record["answer"]}


def _line(record: Record) -> Record:
    return {"query": record["prompt"], "target": str(record["expected_number"])}


def _topic(record: Record) -> Record:
    return {"query": record["prompt"], "target": record["topics"][0]}


_FORMATS = {
    "hellaswag": _Format((r"hellaswag.*",), "choices", _hellaswag),
    "arc_easy": _Format((r"arc_easy_test", r"arc_easy.*"), "choices", _arc),
    "arc_challenge": _Format((r"arc_challenge_test", r"arc_challenge.*"), "choices", _arc),
    "winogrande": _Format((r"winogrande.*",), "contexts", _winogrande),
    "piqa": _Format((r"piqa.*",), "choices", _piqa),
    "mmlu": _Format((r"mmlu_test", r"mmlu.*"), "choices", _mmlu),
    "truthfulqa": _Format((r"[Tt]ruthful_?(qa|QA).*",), "choices", _truthfulqa),
    "boolq": _Format((r"boolq.*",), "choices", _boolq),
    "lambada": _Format((r"lambada.*",), "word", _lambada),
    "gsm8k": _Format((r"gsm8k_test", r"gsm8k.*"), "number", _gsm8k, examples=r"gsm8k_train", shots=5),
}
FILE_TASKS = (*_FORMATS, "200_lines", "5_topics")
