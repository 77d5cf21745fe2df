"""lm-evaluation-harness over an attached model: its tasks, or local files in the same forms, for any method.

The only module that imports ``lm_eval`` (extra ``eval``). A request's context is a dense prompt; the rows that score or
generate the rest select as decode would (rule ``continuation``).
"""

import difflib
import io
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, NamedTuple

import datasets
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from loki_attention.errors import ArgumentError, LokiError
from loki_attention.integrations.huggingface.dense_prompt import Attachable, DensePrompt
from loki_attention.integrations.lm_eval_forms import FORMS

_MOST_NEW_TOKENS = 256
_RESAMPLES = 1000


class Metric(NamedTuple):
    """One metric over a task's items: its value by lm-eval's own aggregation, and a 95 % bootstrap interval.

    ``items`` has a number for each of the ``n`` items, None where an item is not one number.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    items: list[float] | None


class AttachedLM(TemplateLM):
    """A model under a method, as lm-eval sees it: one sequence at a time, prompts cut at the front to ``max_length``."""

    def __init__(self, model: Any, tokenizer: Any, method: Attachable, *, max_length: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.method, self.max_length = model, tokenizer, method, max_length
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without a context: the end of a text, else its beginning, else token 0."""
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def max_gen_toks(self) -> int:
        """New tokens, where a task names no number."""
        return _MOST_NEW_TOKENS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids as the model's own tokenizer makes them, by default without special tokens."""
        return list(self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text: windows of ``max_length`` tokens whose first token alone is the prompt."""
        return [sum((value for value, _ in self._scores(self._windows(request.args[0]))), 0.0) for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text after each prompt up to its first stop string; greedy unless the task samples."""
        return [self._generated(*request.args) for request in requests]

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._scores([(context, rest) for _, context, rest in requests])

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        ids = self.tok_encode(text)
        if not ids:
            return []
        windows = get_rolling_token_windows(
            token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
        )
        return [make_disjoint_window(window) for window in windows]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Each continuation after its context; neighbours with the same context share its prompt."""
        found, prompt, before = [], None, None
        with torch.inference_mode():
            for context, rest in pairs:
                if len(rest) >= self.max_length:
                    raise LokiError(
                        f"a text of {len(rest)} tokens is to be scored after its context, and this model takes "
                        f"{self.max_length} in all; leave the task out, or take a model of longer context"
                    )
                context = context[max(0, len(context) + len(rest) - self.max_length) :]
                if prompt is None or context != before:
                    prompt, before = DensePrompt(self.model, torch.tensor([context[:-1]], dtype=torch.int64)), context
                rows = torch.tensor([context[-1:] + rest[:-1]])
                logits = prompt.logits(rows, self.method)[0].float().log_softmax(-1)
                wanted = torch.tensor(rest, device=logits.device)
                value = float(logits.gather(-1, wanted[:, None]).sum())
                found.append((value, bool((logits.argmax(-1) == wanted).all())))
        return found

    def _generated(self, context: str, options: Mapping[str, Any]) -> str:
        until = [options["until"]] if isinstance(options.get("until"), str) else list(options.get("until") or [])
        most = int(options.get("max_gen_toks", self.max_gen_toks))
        ids = self.tok_encode(context)[-max(1, self.max_length - most) :] or [self.prefix_token_id]
        sampling = {name: options[name] for name in ("temperature", "top_p", "top_k") if options.get("do_sample")}
        with torch.inference_mode():
            prompt = DensePrompt(self.model, torch.tensor([ids[:-1]], dtype=torch.int64))
            new, _ = prompt.generate(
                torch.tensor([ids[-1:]]),
                self.method,
                max_new_tokens=most,
                do_sample=bool(options.get("do_sample")),
                pad_token_id=self.eot_token_id,
                **({"stop_strings": until, "tokenizer": self.tokenizer} if until else {}),
                **sampling,
            )
        text = str(self.tokenizer.decode(new, skip_special_tokens=True))
        return min((text.partition(stop)[0] for stop in until), key=len, default=text)


def task_of_records(
    name: str, form: str, items: Sequence[Mapping[str, Any]], examples: Sequence[Mapping[str, Any]], shots: int
) -> Any:
    """An lm-eval task over records in one of the forms of ``evaluation.task_files``."""
    splits = {"test": items, **({"train": examples} if shots else {})}

    def dataset(**_: Any) -> dict[str, Any]:
        return {
            split: datasets.Dataset.from_list([dict(record) for record in records]) for split, records in splits.items()
        }

    with _quiet():
        return ConfigurableTask(
            config={
                "task": name,
                "dataset_path": "local",
                "custom_dataset": dataset,
                "test_split": "test",
                "fewshot_split": "train" if shots else None,
                "num_fewshot": shots,
                "metadata": {},
                **FORMS[form],
            }
        )


def task_of_harness(name: str, folder: str | None) -> Any:
    """A task that lm-eval knows, or that a YAML file in ``folder`` defines.

    Raises ``ArgumentError`` for an unknown name and a ``LokiError`` where its data cannot be had.
    """
    with _quiet():
        # lm-eval's own index takes seconds: it is looked into last.
        manager = TaskManager(include_path=folder, include_defaults=False)
        if name not in manager.all_tasks:
            manager = TaskManager(include_path=folder)
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ArgumentError(f"unknown task {name!r}; `lm-eval ls tasks` lists those that lm-eval knows{hint}")
        try:
            found = manager.load([name])["tasks"]
        except Exception as error:
            raise LokiError(
                f"lm-eval cannot load its task {name!r}: {(str(error).splitlines() or ['?'])[0]}; without a network put "
                "its file into the folder of --task-data"
            ) from error
    if len(found) != 1:
        raise ArgumentError(f"{name!r} is a group of tasks; name one of them: {', '.join(list(found)[:5])} ...")
    return next(iter(found.values()))


def request_steps(task: Any, lm: AttachedLM, limit: int | None) -> list[tuple[int, int]]:
    """Tokens of the prompt and in the cache for every scored row; of a request that generates, for its first."""
    _build(task, limit)
    steps: list[tuple[int, int]] = []
    for request in task.instances:
        if request.request_type == "generate_until":
            length = max(1, min(lm.max_length, len(lm.tok_encode(request.args[0]))))
            steps.append((length - 1, length))
        else:
            context, rest = (len(lm.tok_encode(text)) for text in ("", *request.args)[-2:])
            stop = max(1, min(lm.max_length, max(1, context) + rest - 1))
            start = max(1, stop - rest + 1)
            steps += [(start - 1, tokens) for tokens in range(start, stop + 1)]
    return steps


def chance_of(task: Any, limit: int | None) -> float:
    """The accuracy of blind guesses: one over the number of choices, mean over items; 0 where there are none to choose."""
    docs = [doc for _, doc in task.doc_iterator(rank=0, limit=limit, world_size=1)]
    if task.config.doc_to_choice is None:
        return 0.0
    return sum(1 / len(task.doc_to_choice(doc)) for doc in docs) / len(docs)


def run_task(task: Any, lm: AttachedLM, *, limit: int | None, seed: int) -> list[Metric]:
    """Every metric of a task, as lm-eval computes them."""
    with _quiet():
        name = task.config.task
        task.set_fewshot_seed(seed)
        found = evaluator.evaluate(lm, {name: task}, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = found["samples"][name]
    aggregations = task.aggregation()
    metrics = []
    for kind in dict.fromkeys(sample["filter"] for sample in samples):
        mine = sorted((sample for sample in samples if sample["filter"] == kind), key=lambda sample: sample["doc_id"])
        for metric in mine[0]["metrics"]:
            label = metric if kind == "none" else f"{metric} ({kind})"
            metrics.append(_metric(label, [sample[metric] for sample in mine], aggregations[metric], seed))
    return metrics


def _metric(name: str, items: list[Any], aggregate: Callable[[list[Any]], float], seed: int) -> Metric:
    drawn = random.Random(seed)
    resampled = sorted(float(aggregate(drawn.choices(items, k=len(items)))) for _ in range(_RESAMPLES))
    low, high = resampled[int(0.025 * _RESAMPLES)], resampled[int(0.975 * _RESAMPLES)]
    numbers = all(isinstance(item, int | float) for item in items)
    return Metric(
        name, float(aggregate(items)), low, high, len(items), [float(item) for item in items] if numbers else None
    )


def _build(task: Any, limit: int | None) -> None:
    with _quiet():
        task.build_all_requests(limit=limit, rank=0, world_size=1)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's notes and progress bars left out: the command has its own."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
