"""Tiny made-up files of known tasks, for tests of their formats."""

import csv
import gzip
import json
from pathlib import Path

WORDS = ["river", "lamp", "stone", "cloud", "wheel", "garden"]
_NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn"]


def _text(i: int) -> str:
    return f"The {WORDS[i]} of {_NAMES[i]} stood beside the {WORDS[(i + 1) % 6]} for many years, and nobody asked why."


RECORDS = {
    "hellaswag_val": [
        {"ctx": _text(i), "endings": [f"It was the {word}." for word in WORDS[:4]], "label": i % 4} for i in range(6)
    ],
    "arc_easy_test": [
        {"query": f"Question: What of {_text(i)}\nAnswer:", "choices": WORDS[:3], "gold": i % 3} for i in range(6)
    ],
    "arc_challenge_val": [
        {"question": _text(i), "choices": {"text": WORDS[:4], "label": list("ABCD")}, "answerKey": "ABCD"[i % 4]}
        for i in range(6)
    ],
    "winogrande_xl_val": [
        {"sentence": f"{_text(i)} So _ went home.", "option1": _NAMES[i], "option2": "Gus", "answer": str(1 + i % 2)}
        for i in range(6)
    ],
    "piqa_val": [{"goal": _text(i), "sol1": WORDS[i], "sol2": WORDS[i - 1], "label": i % 2} for i in range(6)],
    "mmlu_test": [
        {"question": _text(i), "subject": "old_gardens", "choices": WORDS[:4], "answer": i % 4} for i in range(6)
    ],
    "boolq_val": [{"question": "is it so", "passage": _text(i), "answer": bool(i % 2)} for i in range(6)],
    "lambada_test": [{"text": _text(i).rstrip(".")} for i in range(6)],
    "gsm8k_train": [{"question": _text(i), "answer": f"So it is.\n#### {i}"} for i in range(6)],
    "gsm8k_test": [{"question": _text(i), "answer": f"So it is.\n#### {i}"} for i in range(2)],
    "20_lines": [{"prompt": f"{_text(i)} What is the number?", "expected_number": 7 * i} for i in range(3)],
    "5_topics": [{"prompt": f"{_text(i)} What is the topic?", "topics": [WORDS[i], "other"]} for i in range(3)],
}


def write_task_data(folder: Path) -> Path:
    """One file of every known format, some of them compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, records) in enumerate(RECORDS.items()):
        text = "".join(json.dumps(record) + "\n" for record in records)
        if number % 2:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    with (folder / "TruthfulQA.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["Type", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        writer.writerows(["Plain", _text(i), WORDS[i], WORDS[i], f"{WORDS[i - 1]}; {WORDS[i - 2]};"] for i in range(4))
    return folder
