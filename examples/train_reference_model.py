"""Trains a small Llama-architecture model that copies and retrieves, from text files: the recipe of the bundled one.

Knows the recipe, the generated sequences and how to go on after an interruption. Knows nothing of sparse attention.

    python examples/train_reference_model.py --text novels/ wiki.train.tokens.txt --out my-model

The bundled model took 36 million tokens, about 95 minutes on two CPU cores; `--kv-heads 1` makes one like it whose four heads
share their keys, `--size large` one of 24 million parameters and 8192 tokens of context, for a GPU. `--start-from` begins
with a trained model; one of fewer key heads then needs a fifth of the tokens. Until the run is finished everything lies in
`OUT.partial`; after an interruption the same command goes on from the last checkpoint, to the weights of an undisturbed run.
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from training_sequences import (
    Corpus,
    Example,
    build_corpus,
    hidden_facts,
    read_texts,
    repeated_segment,
    train_tokenizer,
)

Optimizers = list[torch.optim.Optimizer]


class Stage(NamedTuple):
    """Part of the run: sequences of one length. ``repeats`` and ``facts`` are shares of the sequences, the rest is prose."""

    length: int
    share: float
    step_tokens: int
    repeats: float = 0.0
    facts: float = 0.0


# The model must copy before it learns anything else: induction forms after about 8 million tokens, in the first stage.
STAGES = (
    Stage(128, share=0.25, step_tokens=4096, repeats=0.7),
    Stage(256, share=0.15, step_tokens=4096, facts=0.35),
    Stage(512, share=0.15, step_tokens=4096, facts=0.35),
    Stage(1024, share=0.15, step_tokens=4096, facts=0.35),
    Stage(2048, share=0.15, step_tokens=8192, facts=0.35),
    Stage(4096, share=0.15, step_tokens=8192, facts=0.35),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides the weights but the text: the model's shape, the course of the training, the seed."""

    tokens: int = 36_000_000
    vocabulary: int = 2048
    layers: int = 4
    hidden: int = 256
    intermediate: int = 704
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    stages: tuple[Stage, ...] = STAGES
    matrix_rate: float = 2.5e-3
    other_rate: float = 3e-3
    decay_share: float = 0.3
    answer_weight: float = 4.0
    seed: int = 0

    def plan(self) -> list[Stage]:
        """The stage of every step: each stage has at least one."""
        counts = [max(1, round(stage.share * self.tokens / stage.step_tokens)) for stage in self.stages]
        return [stage for stage, count in zip(self.stages, counts, strict=True) for _ in range(count)]

    def rate(self, progress: float) -> float:
        """The factor on both learning rates: 1 until the last ``decay_share`` of the run, then linearly to 0."""
        return min(1.0, (1.0 - progress) / self.decay_share)


SIZES = {
    "small": Recipe(),
    "large": Recipe(
        tokens=100_000_000,
        layers=8,
        hidden=512,
        intermediate=1408,
        heads=8,
        stages=(
            *(stage._replace(step_tokens=8 * stage.step_tokens) for stage in STAGES[:-1]),
            Stage(4096, share=0.075, step_tokens=65536, facts=0.35),
            Stage(8192, share=0.075, step_tokens=65536, facts=0.35),
        ),
    ),
}


def draw_batch(corpus: Corpus, recipe: Recipe, stage: Stage, step: int) -> tuple[Tensor, Tensor]:
    """Ids and weights (rows, length) of one step: a function of the seed and the step alone, so that a run can resume."""
    rng = random.Random(f"{recipe.seed} {step}")
    examples = []
    for _ in range(max(1, stage.step_tokens // stage.length)):
        draw = rng.random()
        if draw < stage.repeats:
            examples.append(repeated_segment(corpus, stage.length, rng))
        elif draw < stage.repeats + stage.facts:
            examples.append(hidden_facts(corpus, stage.length, recipe.answer_weight, rng))
        else:
            examples.append(Example(corpus.window(stage.length, rng), [1.0] * stage.length))
    return torch.tensor([example.ids for example in examples]), torch.tensor([example.weights for example in examples])


def build_model(recipe: Recipe, positions: int) -> LlamaForCausalLM:
    """An untrained model of the recipe's shape, for sequences of up to ``positions`` tokens."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=positions,
        rope_parameters={"rope_theta": 100_000.0, "rope_type": "default"},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **{f"{name}_token_id": index for index, name in enumerate(("bos", "eos", "pad"))},
    )
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config)


def take_weights(model: LlamaForCausalLM, path: Path) -> None:
    """Sets a model to the weights at ``path``, a key or value head to the mean of those it stands for (Ainslie et al. 2023,
    arXiv:2305.13245, section 2.1).
    """
    weights, own = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict(), model.state_dict()
    try:
        for name in (name for name in weights if name.endswith(("k_proj.weight", "v_proj.weight"))):
            heads = weights[name].unflatten(0, (model.config.num_key_value_heads, -1, model.config.head_dim))
            weights[name] = heads.mean(1).reshape(own[name].shape)
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise SystemExit(f"{path} has another shape than the model to train: {error}") from error


def build_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> Optimizers:
    """Muon for the layers' matrices, at Adam's RMS, and AdamW for the embedding and the norms."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_rate, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["full_rate"] = group["lr"]
    return [muon, adamw]


def training_step(model: LlamaForCausalLM, optimizers: Optimizers, ids: Tensor, weights: Tensor, rate: float) -> float:
    """The weighted loss of a batch, before the step it takes at ``rate`` times the full rates."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["full_rate"]
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def load_checkpoint(path: Path, wanted: str, model: LlamaForCausalLM, optimizers: Optimizers, device: str) -> int:
    """The number of steps done, with model and optimizers set to where they stood. Refuses one of another recipe or text."""
    state = torch.load(path, map_location=device, weights_only=True)
    if state["fingerprint"] != wanted:
        raise SystemExit(
            f"{path} belongs to another recipe or other text; use the same arguments, or remove {path.parent}"
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def save_checkpoint(path: Path, fingerprint: str, model: LlamaForCausalLM, optimizers: Optimizers, step: int) -> None:
    """Writes a checkpoint so that an interruption leaves the old one or the new one."""
    optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
    state = {"fingerprint": fingerprint, "step": step, "model": model.state_dict(), "optimizers": optimizer_states}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def save_model(model: LlamaForCausalLM, corpus: Corpus, partial: Path, out: Path) -> None:
    """Puts the finished model in bfloat16 and its tokenizer at ``out``, whole or not at all, and removes ``partial``."""
    folder = partial / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    corpus.tokenizer.save_pretrained(folder)
    folder.replace(out)
    shutil.rmtree(partial)


def report(step: int, plan: Sequence[Stage], loss: float, tokens: int, seconds: float) -> None:
    """Prints where the run stands, over the line before on a terminal."""
    speed = tokens / max(seconds, 1e-9)
    left = sum(stage.step_tokens for stage in plan[step:]) / speed / 60
    line = f"step {step}/{len(plan)}  length {plan[step - 1].length}  loss {loss:.3f}  {speed:,.0f} tokens/s  {left:.0f} min left"
    print(line, end="\r" if sys.stdout.isatty() and step < len(plan) else "\n", flush=True)


def train(
    recipe: Recipe,
    texts: Sequence[str],
    out: Path,
    *,
    device: str,
    start_from: Path | None = None,
    stop_after: int | None = None,
    save_every: int = 200,
) -> list[float]:
    """The loss of each step taken now; after the plan's last step the model lies at ``out``, before that a checkpoint beside it."""
    if out.exists():
        raise SystemExit(f"{out} exists already; name another folder or remove it")
    partial, plan = out.with_name(f"{out.name}.partial"), recipe.plan()
    checkpoint = partial / "checkpoint.pt"
    longest = max(stage.length for stage in plan)
    model = build_model(recipe, positions=2 * longest)
    if start_from is None:
        tokenizer = train_tokenizer(texts, recipe.vocabulary)
    else:
        tokenizer = AutoTokenizer.from_pretrained(start_from)
        take_weights(model, start_from)
    corpus = build_corpus(texts, tokenizer, longest)
    model.to(device)
    optimizers = build_optimizers(model, recipe)
    asked = f"{json.dumps(asdict(recipe))} {start_from or ''}"
    fingerprint = hashlib.sha256(asked.encode() + corpus.ids.numpy().tobytes()).hexdigest()
    partial.mkdir(parents=True, exist_ok=True)
    first = load_checkpoint(checkpoint, fingerprint, model, optimizers, device) if checkpoint.exists() else 0
    last = min(stop_after or len(plan), len(plan))
    total = sum(stage.step_tokens for stage in plan)
    done = sum(stage.step_tokens for stage in plan[:first])
    start, losses, before = time.perf_counter(), [], done
    for step, stage in enumerate(plan[first:last], start=first + 1):
        ids, weights = draw_batch(corpus, recipe, stage, step)
        losses.append(training_step(model, optimizers, ids.to(device), weights.to(device), recipe.rate(done / total)))
        done += stage.step_tokens
        if step % 20 == 0 or step == last:
            report(step, plan, losses[-1], done - before, time.perf_counter() - start)
        if step % save_every == 0 or step == last:
            save_checkpoint(checkpoint, fingerprint, model, optimizers, step)
    if last == len(plan):
        save_model(model, corpus, partial, out)
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(
        description="Train a small Llama model that copies and retrieves, from text files."
    )
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, and folders of .txt files")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the finished model; must not exist")
    parser.add_argument("--size", choices=SIZES, default="small", help="3.5 or 24 million parameters (default: small)")
    parser.add_argument("--tokens", type=int, help="length of the whole run (default: 36 million; large: 100 million)")
    parser.add_argument("--kv-heads", type=int, choices=(1, 2, 4), help="key heads that the heads share (default: 2)")
    parser.add_argument("--start-from", type=Path, help="begin with this model's weights and tokenizer")
    parser.add_argument("--steps", type=int, help="stop after this step; the same command without it goes on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    wished = {"tokens": options.tokens, "kv_heads": options.kv_heads, "seed": options.seed}
    recipe = replace(SIZES[options.size], **{name: value for name, value in wished.items() if value is not None})
    if recipe.tokens < 1 or (options.steps is not None and options.steps < 1):
        parser.error("--tokens and --steps are at least 1")
    texts, start = read_texts(options.text), options.start_from
    train(recipe, texts, options.out, device=options.device, start_from=start, stop_after=options.steps)
    finished = options.out.exists()
    print(f"the model lies in {options.out}" if finished else f"stopped; to be continued in {options.out}.partial")


if __name__ == "__main__":
    main()
