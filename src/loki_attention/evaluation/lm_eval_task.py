"""One task of lm-evaluation-harness: its own, or a local file in a known form. Needs the extra ``eval``."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loki_attention.errors import LokiError
from loki_attention.evaluation.reading import DecodeStep
from loki_attention.evaluation.task import Score, accuracy, digest_of
from loki_attention.evaluation.task_files import file_task, has_format
from loki_attention.evaluation.variant import DENSE, Variant
from loki_attention.integrations.huggingface.families import text_config
from loki_attention.intervals import Interval

_MOST_STEPS = 64


class LmEvalTask:
    """lm-eval's metrics on one task; items are its questions.

    From ``data``, a folder, where it has a file in a known form (``task_files``), or a YAML definition; else as lm-eval
    itself finds it. Where the interval of dense attention's accuracy holds ``chance``, ``near_chance`` is 1.
    Raises ``LokiError`` where lm-eval is not installed or the task cannot be had.
    """

    together = False
    items = 1

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        data: Path | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        if find_spec("lm_eval") is None:
            raise LokiError(f"task lm-eval:{name} needs lm-eval; pip install 'loki-attention[eval]'")
        from loki_attention.integrations import lm_eval

        self._harness, self._limit, self._seed, self.name = lm_eval, limit, seed, f"lm-eval:{name}"
        self._model, self._tokenizer = model, tokenizer
        self._longest = text_config(model).max_position_embeddings
        if data is not None and has_format(name):
            found = file_task(name, data)
            self._task = lm_eval.task_of_records(name, found.form, found.items, found.examples, found.shots)
        else:
            self._task = lm_eval.task_of_harness(name, None if data is None else str(data))
        dense = self._lm(Variant(name=DENSE, method=DENSE, budget=None))
        steps = [DecodeStep(*step) for step in lm_eval.request_steps(self._task, dense, limit)]
        self.steps: Sequence[DecodeStep] = steps[:: max(1, len(steps) // _MOST_STEPS)]
        self._chance = lm_eval.chance_of(self._task, limit)
        self.digest = digest_of(name, limit, seed, [str(request.args) for request in self._task.instances])

    def measure(self, index: int, variants: Sequence[Variant]) -> dict[str, list[Any]]:
        """Every metric of the task by variant."""
        return {
            variant.name: [
                list(metric)
                for metric in self._harness.run_task(self._task, self._lm(variant), limit=self._limit, seed=self._seed)
            ]
            for variant in variants
        }

    def scores(self, outcomes: Sequence[Any], dense: Sequence[Any]) -> list[Score]:
        """The metrics with their intervals, and whether dense attention is near chance."""
        near = self._near_chance(dense[0])
        return [self._score(metric, near) for metric in outcomes[0]]

    def _score(self, metric: Sequence[Any], near_chance: int) -> Score:
        name, value, low, high, count, items = metric
        config: dict[str, Any] = {"chance": self._chance, "near_chance": near_chance, "limit": self._limit}
        if items is not None and all(item in (0, 1) for item in items):
            return accuracy(name, items, config=config)
        return Score(
            metric=name,
            value=value,
            unit="",
            n=count,
            interval=Interval(low, high),
            items=None if items is None else tuple(items),
            config=config,
        )

    def _near_chance(self, dense: Sequence[Any]) -> int:
        """1 where dense attention's accuracy cannot be told from blind guessing."""
        answers = next(
            (score for score in (self._score(metric, 0) for metric in dense) if score.unit == "fraction"), None
        )
        return int(answers is not None and answers.interval is not None and answers.interval.low <= self._chance)

    def _lm(self, variant: Variant) -> Any:
        # Kernels round otherwise than the model's own attention does, and scores at a full budget are to be dense ones.
        on_torch = replace(variant, backend="torch")
        return self._harness.AttachedLM(self._model, self._tokenizer, on_torch, max_length=self._longest)
