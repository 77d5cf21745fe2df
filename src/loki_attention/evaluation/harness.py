"""Tasks times variants to a results file: each a unit that is measured once, whatever kills the run in between."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from loki_attention.core.basis import KeyBasis
from loki_attention.core.spec import ModelSpec
from loki_attention.errors import ArgumentError
from loki_attention.evaluation.reading import StepBytes, step_bytes
from loki_attention.evaluation.task import RULE, Score, Task, digest_of
from loki_attention.evaluation.variant import DENSE, Variant
from loki_attention.ledger import Ledger
from loki_attention.results import Environment, Result, Setting, load_results, save_results

_SAME = ("hardware", "dtype", "versions")
_DENSE = Variant(name=DENSE, method=DENSE, budget=None)


class Unit(NamedTuple):
    """One variant on one task. ``key`` names everything its outcomes depend on but the code's version."""

    task: Task
    variant: Variant
    key: str


@dataclass(kw_only=True)
class Evaluation:
    """Measures units and writes their results to ``output`` (None: nowhere) after every task.

    A run with the same output goes on where the last one was: units in the file are done, and items of others are
    kept beside it until all are. ``seed`` is what the tasks drew their items by. ``on_item`` is told the task's name and
    how many of its items are done. Raises ``ArgumentError`` where the file holds units that this run does not have, or was
    made on other hardware, versions or dtype.
    """

    model: Any
    output: Path | None
    made_by: Environment
    seed: int = 0
    on_item: Callable[[str, int], None] = lambda task, done: None
    _identity: str = field(init=False)
    _done: dict[str, list[Result]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        spec = ModelSpec.of(self.model)
        self._identity = digest_of(spec.to_dict(), str(self.model.dtype))
        if self.output is not None and self.output.exists():
            self._done = _units_of(self.output, self.made_by)

    def run(self, planned: Sequence[tuple[Task, Sequence[Variant]]]) -> list[Result]:
        """The rows of every task's variants and of dense attention, task by task."""
        units = [
            [Unit(task, variant, self._key(task, variant)) for variant in (_DENSE, *variants)]
            for task, variants in planned
        ]
        self._refuse_others({unit.key for group in units for unit in group})
        ledger = Ledger(None if self.output is None else self.output.with_name(f"{self.output.name}.partial"))
        for group in units:
            if any(unit.key not in self._done for unit in group):
                self._measure(group, ledger)
                self._save(units)
            else:
                self.on_item(group[0].task.name, group[0].task.items)
        ledger.discard()
        return self._rows(units)

    def _measure(self, group: Sequence[Unit], ledger: Ledger) -> None:
        task, wanted = group[0].task, [unit for unit in group if unit.key not in self._done or unit.variant is _DENSE]
        for item in range(task.items):
            missing = [unit for unit in wanted if ledger.get(unit.key, item) is None]
            for part in [missing] if task.together else [[unit] for unit in missing]:
                found = task.measure(item, [unit.variant for unit in part]) if part else {}
                for unit in part:
                    ledger.add(unit.key, item, found[unit.variant.name])
            self.on_item(task.name, item + 1)
        outcomes = {unit.key: [ledger.get(unit.key, item) for item in range(task.items)] for unit in wanted}
        dense = outcomes[group[0].key]
        for unit in wanted:
            read = step_bytes(self.model, unit.variant, task.steps)
            scores = task.scores(outcomes[unit.key], dense)
            self._done[unit.key] = [self._row(unit, score, read) for score in scores]

    def _row(self, unit: Unit, score: Score, read: StepBytes) -> Result:
        config: dict[str, Setting] = {
            "task": unit.task.name,
            "items": unit.task.digest,
            "unit": unit.key,
            "rule": RULE,
            "model": ModelSpec.of(self.model, weights=False).model_id,
            "commit": self.made_by.commit,
            "read_fraction": read.fraction,
        }
        return Result(
            metric=score.metric,
            value=score.value,
            unit=score.unit,
            n=score.n,
            seed=self.seed,
            interval=score.interval,
            read_bytes=read.read,
            config={**unit.variant.config, **config, **score.config},
            items=score.items,
        )

    def _key(self, task: Task, variant: Variant) -> str:
        settings = json.dumps(dict(variant.config), sort_keys=True)
        return digest_of(self._identity, _digest_of_basis(variant.basis), task.name, task.digest, settings)

    def _rows(self, units: Iterable[Sequence[Unit]]) -> list[Result]:
        return [row for group in units for unit in group for row in self._done.get(unit.key, [])]

    def _save(self, units: Iterable[Sequence[Unit]]) -> None:
        if self.output is not None:
            save_results(self.output, self._rows(units), self.made_by)

    def _refuse_others(self, asked: set[str]) -> None:
        others = {
            f"{row.config['variant']} on {row.config['task']}"
            for key in self._done.keys() - asked
            for row in self._done[key]
        }
        if others:
            raise ArgumentError(
                f"{self.output} holds results that this run would drop: {', '.join(sorted(others)[:3])}"
                f"{' and others' if len(others) > 3 else ''}; ask for them too, or name another output"
            )


def _units_of(path: Path, made_by: Environment) -> dict[str, list[Result]]:
    """The rows of an earlier run by unit."""
    saved = load_results(path)
    for name in _SAME:
        before, now = getattr(saved.environment, name), getattr(made_by, name)
        if before != now:
            raise ArgumentError(
                f"{path} was measured with {name} {_plain(before)}, and this run has {_plain(now)}; name another output"
            )
    units: dict[str, list[Result]] = {}
    for row in saved.results:
        if "unit" not in row.config:
            raise ArgumentError(f"{path} holds results of another command; name another output")
        units.setdefault(str(row.config["unit"]), []).append(row)
    return units


def _plain(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


def _digest_of_basis(basis: KeyBasis | None) -> str:
    if basis is None:
        return "none"
    tensors = (part for layer in basis.layers.values() for part in (layer.mean, layer.query_map, layer.key_map))
    return digest_of(str(basis.planes), basis.tail, basis.dense_layers, *(t.numpy().tobytes() for t in tensors))
