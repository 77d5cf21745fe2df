"""What `torchrun` runs on two processes for ``integrations/test_tensor_parallel.py``; answers go to one file a rank."""

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, PreTrainedModel

from loki_attention import Budget, KeyBasis, LokiError, attach, calibrate
from models import BUDGET, random_ids

NEW = 24
CASES: dict[str, dict[str, Any]] = {
    "whole": {"budget": Budget(tokens=1000)},
    "no tail": {"budget": BUDGET, "tail": "none"},
    "linear": {"budget": BUDGET, "tail": "linear"},
    "query heads": {"budget": BUDGET, "tail": "linear", "per": "query-head"},
    "paper": {"budget": BUDGET, "method": "paper-loki"},
    "exact": {"budget": BUDGET, "method": "exact-topk", "tail": "linear"},
}
CALIBRATION: dict[str, Any] = {"token_ids": [random_ids(9, 160, seed=3)], "budget": BUDGET, "dense_if_mass_below": 0}


def load(path: Path, **settings: Any) -> PreTrainedModel:
    """The float64 model in a folder."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **settings).eval()


def prompt() -> torch.Tensor:
    """Two sequences, the first padded on the left; long enough for tails, which sum whole blocks."""
    ids = random_ids(2, 220, seed=11)
    ids[0, :19] = 0
    return ids


def generate(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens (B, NEW) and their logits (B, NEW, V), greedy."""
    ids = prompt()
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=(ids != 0).long(), **settings)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def run_cases(model: PreTrainedModel, basis: KeyBasis) -> dict[str, dict[str, Any]]:
    """Tokens, logits, the last step's trace, sparse steps, bytes read and held of every case."""
    answers = {}
    for name, settings in CASES.items():
        with attach(model, basis, **settings) as handle, handle.trace() as trace:
            tokens, logits = generate(model)
            report = handle.report()
        answers[name] = {
            "tokens": tokens,
            "logits": logits,
            "trace": trace[-1],
            "sparse_steps": report.sparse_steps,
            "bytes_read": sum(layer.bytes_read for layer in report.layers),
            "memory": report.memory.total,
        }
    return answers


def refusal(model: PreTrainedModel, **arguments: Any) -> str:
    """What ``calibrate`` says against these arguments."""
    try:
        calibrate(model, **arguments)
    except LokiError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@contextlib.contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """The tokens of every forward within the block."""
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    yield lengths
    hook.remove()


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """Every family's answers on a model split over the processes, and what calibration says of it."""
    from transformers.distributed import DistributedConfig

    answers: dict[str, Any] = {}
    for path in sorted(folder.glob("model-*")):
        model = load(path, distributed_config=DistributedConfig(tp_plan="auto"))
        basis = KeyBasis.load(path / "basis", model=model)
        answers[path.name] = run_cases(model, basis)
        answers["refusal"] = refusal(model, **CALIBRATION)
    return answers


def calibration(folder: Path) -> dict[str, Any]:
    """A basis from shared text, going on from a killed run of one process; the forwards that this process ran."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model = load(folder / "model")
    drawn = io.StringIO()
    with counted(model) as lengths, contextlib.redirect_stderr(drawn):
        basis = calibrate(model, progress=True, **CALIBRATION)
    basis.save(folder / f"basis-{rank}")
    with counted(model) as resumed:
        calibrate(model, checkpoint=folder / "killed", **CALIBRATION).save(folder / f"resumed-{rank}")
    other = {**CALIBRATION, "token_ids": [random_ids(9, 160, seed=rank)]}
    return {
        "forwards": len(lengths),
        "resumed": len(resumed),
        "drawn": drawn.getvalue(),
        "refusal": refusal(model, **other),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path(sys.argv[2])
    result = {"tensor_parallel": tensor_parallel, "calibration": calibration}[sys.argv[1]](work)
    torch.save(result, work / f"answer-{distributed.get_rank()}.pt")
    distributed.destroy_process_group()
