"""Rows of result files as the evaluation writes them, from values by item."""

import math
from collections.abc import Sequence
from typing import Any

from loki_attention.intervals import bootstrap_interval, wilson_interval
from loki_attention.results import Environment, Result

MADE_BY = Environment(
    command="benchmarks/evidence.py",
    hardware="a machine",
    threads=1,
    dtype="float32",
    versions={"python": "3.11"},
    commit="abc",
    date="2026-01-31T12:00:00Z",
)


def losses(variant: str, kl: Sequence[float], change: float = 0.0, **config: Any) -> list[Result]:
    """What the task of perplexity says of a variant whose log loss is ``change`` nats above dense attention's 3.0."""
    config = {"task": "perplexity", "items": "windows", **settings(variant), **config}
    nats = tuple(3 + change + 0.1 * (number % 2) for number in range(len(kl)))
    mean, over = sum(kl) / len(kl), math.exp(change) - 1
    ratio = {**config, "dense_perplexity": math.exp(3.05)}
    return [
        Result(metric="log_loss", value=sum(nats) / len(nats), unit="nats", n=len(nats), config=config, items=nats),
        Result(metric="kl_from_dense", value=mean, unit="nats", n=len(kl), interval=bootstrap_interval(kl, seed=0),
               config=config, items=tuple(kl)),
        Result(metric="next_token_agreement", value=0.9, unit="fraction", n=len(kl), config=config),
        Result(metric="perplexity_over_dense", value=over, unit="fraction", n=len(kl),
               interval=(over - 0.01, over + 0.01), config=ratio),
    ]  # fmt: skip


def answers(variant: str, right: str, *, family: str = "single", length: int = 2048, **config: Any) -> Result:
    """What a family at a length says of a variant; ``right``: 1 or 0 a question, where dense attention has all of them."""
    items = tuple(int(one) for one in right)
    found = {
        "task": f"retrieval:{family}:{length}",
        "items": f"{family}{length}",
        "family": family,
        "length": length,
        "depths": 2,
        "dense_value": 1.0,
        "of_record": 1,
        "lost_to_dense": items.count(0),
        "won_over_dense": 0,
    }
    return Result(
        metric="retrieval_accuracy",
        value=sum(items) / len(items),
        unit="fraction",
        n=len(items),
        interval=wilson_interval(sum(items), len(items)),
        config={**settings(variant), **found, **config},
        items=items,
    )


def settings(variant: str) -> dict[str, Any]:
    """The settings that a variant's name says: ``quest:tail=mean @ bytes=1/8``."""
    name, _, budget = variant.partition(" @ ")
    method, _, tail = name.partition(":tail=")
    share = 1.0 if not budget else 1 / int(budget.removeprefix("bytes=1/").removeprefix("1/"))
    return {
        "variant": variant,
        "method": method,
        "budget": budget or None,
        "planes": None,
        "tail": tail or None,
        "simulated": "more is read than counts" if method == "quest" or (tail and method != "loki") else None,
        "read_fraction": share,
    }
