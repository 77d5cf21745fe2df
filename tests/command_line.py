"""The command ``loki`` run within the test's process, and a model in a folder for it."""

from pathlib import Path

import torch
from click.testing import Result
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from loki_attention.cli import app
from loki_attention.data import reference_model_path

CALIBRATION = ["--length", "128", "--fit-tokens", "1024", "--held-out-tokens", "384", "--budget", "24"]
CALIBRATION += ["--sinks", "2", "--recent", "4", "--minimum", "8", "--planes", "8@4", "--dtype", "float32"]
"""Options for a calibration of seconds."""


def run(*args: object, **keywords: object) -> Result:
    """What ``loki ARGS`` printed and how it ended."""
    return CliRunner().invoke(app, [str(arg) for arg in args], **keywords)


def error_line(result: Result) -> str:
    """The one line on standard error of a command that refused its input."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def write_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama of three layers with the bundled tokenizer, its logits wide enough to emit many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(reference_model_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 2:
                weight.mul_(5)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
