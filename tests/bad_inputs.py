"""Wrong inputs as users write them, and the sentence each one gets. ``docs/errors.md`` is made of them:

    .venv/bin/python tests/bad_inputs.py > docs/errors.md

``test_bad_inputs.py`` runs every input (``bad_input_setting.py`` makes what they name) and compares the sentences. Those of
the command line are in ``bad_commands.py``.
"""

from typing import NamedTuple

from bad_commands import COMMANDS


class BadInput(NamedTuple):
    """A line of Python or of the shell, the kind of error it gets (``error`` in the shell) and the sentence."""

    shown: str
    kind: str
    sentence: str


class Section(NamedTuple):
    """Wrong inputs of one sort, two lines each: what is written; indented, the kind of error and its sentence."""

    title: str
    names: str
    lines: str

    @property
    def inputs(self) -> list[BadInput]:
        """The wrong inputs."""
        lines = self.lines.strip().splitlines()
        pairs = zip(lines[::2], lines[1::2], strict=True)
        return [BadInput(shown, *answer.strip().split(": ", 1)) for shown, answer in pairs]


ATTACHING = """
attach("my-model", basis)
  ModelError: expected a transformers model, got str; load one with from_pretrained
attach(torch.compile(model), basis)
  ModelError: this model is compiled; attach to the model that torch.compile was given, then compile it
attach(model)
  ArgumentError: method 'loki' needs a basis, got none; give calibrate(model, ...) or KeyBasis.load(path, model=model)
attach(model, "my-basis")
  ArgumentError: basis must be a KeyBasis, got 'my-basis'; KeyBasis.load(path, model=model) reads one
attach(model, basis, method="locki")
  ArgumentError: unknown method 'locki'; known: dense, exact-topk, loki, streaming, pca-attn, paper-loki, random, h2o, snapkv, sparq, quest, double-sparsity (did you mean 'loki'?)
attach(model, basis, backend="cuda")
  ArgumentError: unknown backend 'cuda'; known: auto, native, triton, torch
attach(model, basis, tail="cubic")
  ArgumentError: unknown tail 'cubic'; known: none, mean, linear
attach(model, basis, method="streaming", tail="linear")
  ArgumentError: method 'streaming' has no tail 'linear'; give one of none, mean
attach(model, method="exact-topk", budget=Budget(tokens=64), tail="linear")
  ArgumentError: tail='linear' needs a basis; give one, or use tail='mean'
attach(model, basis, planes="lots")
  ArgumentError: planes 'lots' are outside the grammar; write R@8, R@4, R@2 or R@4+M@2, such as '16@4+32@2' (R@16 and R@32 keep floats, for research)
attach(model, basis, planes="12@4")
  ArgumentError: planes '12@4': a 4-bit plane fills whole 4-byte words, so its dims must be a multiple of 8; got 12
attach(model, basis, planes="24@4")
  ArgumentError: planes '24@4' have 24 dims but the head dim is 16; give at most 16
attach(model, basis, planes=16)
  ArgumentError: planes must be a string such as '16@4+32@2' or Planes, got 16
attach(model, basis, method="paper-loki", planes="8@4")
  ArgumentError: method 'paper-loki' keeps float keys; got planes '8@4', give R@32 or R@16
attach(model, basis, method="sparq", planes="8@4")
  ArgumentError: method 'sparq' reads components of the keys themselves; got planes '8@4', give R@16 for R components
attach(model, basis, per="head")
  ArgumentError: unknown per 'head'; known: kv-head, query-head (did you mean 'kv-head'?)
attach(model, basis, layers={7: "dense"})
  ArgumentError: unknown layer 7; known: 0, 1, 2
attach(model, basis, layers={1: "sparce"})
  ArgumentError: layer 1: expected 'dense', 'sparse' or a Budget, got 'sparce'
attach(model, basis, layers=[1, 2])
  ArgumentError: layers must map layer numbers to what they do, {1: 'dense'} say; got [1, 2]
attach(model, basis, budget=512)
  ArgumentError: budget must be a Budget, got 512; write Budget(tokens=512) or Budget(fraction=1/8)
attach(model, method="streaming")
  ArgumentError: method 'streaming' without a basis needs a budget, got none; give Budget(tokens=512), say
attach(model, basis, dense_below=-1)
  ArgumentError: dense_below must be a whole number of tokens, at least 0; got -1
attach(model, basis, monitor_every=0)
  ArgumentError: monitor_every must be a whole number of decode steps, at least 1; got 0
attach(model, basis, on_low_mass=(0.5, "warn"))
  ArgumentError: on_low_mass acts on what the monitor measures; give monitor_every too, 16 say
attach(model, basis, monitor_every=16, on_low_mass=(50, "warn"))
  ArgumentError: on_low_mass must be a mass between 0 and 1 and 'warn' or 'dense', (0.5, 'warn') say; got (50, 'warn')
attach(model, basis, monitor_every=16, on_low_mass=0.5)
  ArgumentError: on_low_mass must be a mass between 0 and 1 and 'warn' or 'dense', (0.5, 'warn') say; got 0.5
attach(qwen, basis)
  MismatchError: this basis was calibrated for another model, with architecture LlamaForCausalLM where this model has Qwen3ForCausalLM; calibrate this model
attach(model, without_moments, method="paper-loki")
  ArgumentError: this basis holds balanced and has no moments beside it to fit pca-pre from; calibrate again, or keep moments.safetensors in the basis folder
with attach(model, basis): attach(model, basis)
  ModelError: something is attached to this model already; detach it first
attach(flash, basis)
  ModelError: this model uses attn_implementation='flash_attention_2'; load it with one of sdpa, eager
attach(weights_wanted, basis)
  ModelError: output_attentions=True needs every attention weight; set it to False, or detach to get them
"""  # noqa: E501

UNSUPPORTED = """
attach(deepseek, basis)
  ModelError: models of type 'deepseek_v3' are not supported: latent attention (MLA) caches one compressed vector a token, not the keys of every head
attach(bloom, basis)
  ModelError: models of type 'bloom' are not supported: ALiBi adds a bias by distance to every score, which low-rank keys do not know
attach(t5, basis)
  ModelError: models of type 't5' are not supported: they are encoder-decoders; only decoders (causal language models) are
attach(gptj, basis)
  ModelError: models of type 'gptj' are not supported: GPTJForCausalLM does not call transformers' attention interface
attach(falcon, basis)
  ModelError: models of type 'falcon' are not supported: FalconForCausalLM does not call transformers' attention interface
attach(sliding, basis)
  ModelError: this mistral model has no full-attention layer (all are sliding_attention): nothing can be made sparse
attach(phi, basis)
  ModelError: models of type 'phi' are not supported: untested; supported types: cohere, cohere2, gemma, gemma2, gemma3_text, gpt2, gpt_neox, gpt_oss, granite, llama, ministral, mistral, mixtral, olmo2, olmo3, opt, phi3, qwen2, qwen3, qwen3_moe, smollm3, stablelm
"""  # noqa: E501

RUNNING = """
with attach(model, basis): model(ids)
  ModelError: an attached model has no gradients; call it under torch.inference_mode() (generate does), or detach to train
with attach(model, basis): model.generate(ids, output_attentions=True, max_new_tokens=2)
  ModelError: output_attentions=True needs every attention weight; set it to False, or detach to get them
with attach(model, basis, backend="torch"): model.generate(ids, cache_implementation="static", max_new_tokens=2)
  ModelError: decode steps over a static cache run on the native or Triton kernels, and this attachment runs on torch (asked for); pass a DynamicCache, or leave cache_implementation out
with attach(model, basis, monitor_every=4): model.generate(ids, cache_implementation="static", max_new_tokens=2)
  ModelError: decode steps over a static cache tell the host nothing, so that graphs can hold them, and monitor_every has nothing to go by; pass a DynamicCache, or leave cache_implementation out
with attach(model, basis) as attached, attached.trace(): model.generate(ids, cache_implementation="static", max_new_tokens=2)
  ModelError: decode steps over a static cache tell the host nothing, so that graphs can hold them, and trace() has nothing to go by; pass a DynamicCache, or leave cache_implementation out
with attach(model, method="dense"), torch.inference_mode(): model(ids, attention_mask=padded_right, past_key_values=StaticCache(config=model.config, max_cache_len=64))
  ModelError: this attention mask hides tokens behind a sequence's first one (padding on the right, holes between turns), and decode steps over a static cache attend all of them; pad on the left, or pass a DynamicCache, or leave cache_implementation out
with attach(model, basis): model.generate(ids, cache_implementation="offloaded_static", max_new_tokens=2)
  ModelError: an offloaded StaticCache cannot carry low-rank keys; pass a plain StaticCache or DynamicCache
with attach(model, basis): model.generate(ids, past_key_values=offloaded_cache, max_new_tokens=2)
  ModelError: an offloaded DynamicCache cannot carry low-rank keys; pass a plain DynamicCache, or none
with attach(model, basis): model.generate(ids, past_key_values=quantized_cache, max_new_tokens=2)
  ModelError: QuantizedCache cannot carry low-rank keys; pass a plain DynamicCache, or none
with attach(model, basis): model.generate(ids, past_key_values=sliding_cache, max_new_tokens=2)
  ModelError: layer 0 has full attention, the cache keeps it as DynamicSlidingWindowLayer; pass a cache made for this model: DynamicCache(config=model.config)
with attach(model, basis): model.generate(ids, past_key_values=cache_of_another_model, max_new_tokens=2)
  ArgumentError: the cache was filled for (sequences, key heads, dims) = (1, 1, 16), the model now gives (1, 2, 16); pass a cache of this model and this batch
with attach(model, basis, method="snapkv") as attached, attached.paper_rows(): model(ids)
  ArgumentError: method 'snapkv' selects by the end of a prompt, and under paper_rows() there is none; use continuation(prompt_tokens)
with attach(model, basis) as attached, attached.continuation(-1): model(ids)
  ArgumentError: prompt_tokens must be an int or a LongTensor (B,), at least 0; got -1
with attach(model, basis) as attached, attached.continuation(torch.tensor([3, 3])), torch.inference_mode(): model(ids)
  ArgumentError: prompt_tokens has 2 entries for 1 sequences; give one for each, or an int
with attach(model, basis) as attached, attached.continuation(3), torch.inference_mode(): model(ids, attention_mask=both_ways)
  ModelError: this attention mask is not causal row by row (packed sequences or a custom mask); continuation rows need a plain causal mask
"""  # noqa: E501

VALUES = """
Budget()
  ArgumentError: a budget needs exactly one of tokens and fraction, got tokens=None and fraction=None; write Budget(tokens=512) or Budget(fraction=1/8)
Budget(tokens=512, fraction=1/8)
  ArgumentError: a budget needs exactly one of tokens and fraction, got tokens=512 and fraction=0.125; write Budget(tokens=512) or Budget(fraction=1/8)
Budget(tokens=0)
  ArgumentError: tokens must be a whole number of tokens, at least 1; got 0
Budget(tokens=512.0)
  ArgumentError: tokens must be a whole number of tokens, at least 1; got 512.0
Budget(tokens=24)
  ArgumentError: a budget of 24 tokens cannot hold 4 sinks and 32 recent tokens; give at least 36, or fewer sinks and recent
Budget(fraction=1.5)
  ArgumentError: fraction must be a number above 0 and at most 1 (the smallest is 1/65536); got 1.5
Budget(tokens=512, sinks=-1)
  ArgumentError: sinks must be a whole number of tokens, at least 0; got -1
"""  # noqa: E501

BASES = """
KeyBasis.load("nowhere")
  ArtifactError: no basis at nowhere: there is no such folder; write one with `loki calibrate`
KeyBasis.load("my-model")
  ArtifactError: my-model is not a basis: it holds no manifest.json; write one with `loki calibrate`
KeyBasis.load("book.txt")
  ArtifactError: book.txt is not a basis: it is a file, a basis is a folder; write one with `loki calibrate`
KeyBasis.load("future-basis")
  ArtifactError: future-basis has basis format 9, this version reads up to 1; upgrade loki-attention
KeyBasis.load("truncated-basis")
  ArtifactError: truncated-basis/basis.safetensors is missing, truncated or was changed after it was written; calibrate again
KeyBasis.load("edited-basis")
  ArtifactError: edited-basis/manifest.json was changed after it was written; calibrate again
KeyBasis.load("garbled-basis")
  ArtifactError: garbled-basis/manifest.json is damaged: it is not a manifest; calibrate again
KeyBasis.load("my-basis", model="my-model")
  ModelError: expected a transformers model, got str; load one with from_pretrained
KeyBasis.load("my-basis", model=fine_tuned)
  MismatchError: this basis was calibrated on other weights of the same architecture (a fine-tune?); calibrate this model, or pass other_weights=True (--other-weights) to use the basis all the same
basis.save("book.txt")
  ArtifactError: book.txt exists and is not a basis; name another folder
without_moments.refit(candidate="pca-pre")
  ArgumentError: this basis holds balanced and has no moments beside it to fit pca-pre from; calibrate again, or keep moments.safetensors in the basis folder
"""  # noqa: E501

CALIBRATING = """
calibrate(model)
  ArgumentError: calibration needs one of texts (with a tokenizer) and token_ids, got neither; give one
calibrate(model, texts=["Call me Ishmael."])
  ArgumentError: texts need a tokenizer, got none; give the model's, or token_ids instead
calibrate(model, tokenizer, "Call me Ishmael.")
  ArgumentError: texts is one string ('Call me Ishmael.'), not an iterable of strings; write [text], or give a file as a Path
calibrate(model, tokenizer, [1, 2])
  ArgumentError: item 0 of texts is int, not a string; give strings, or token ids as token_ids
calibrate(model, tokenizer, [])
  CorpusError: texts is empty: give at least one string of text to calibrate on
calibrate(model, tokenizer, ["Call me Ishmael."])
  CorpusError: the text has 8 tokens in all, too little for two windows of at least 64 (one to fit on, one held out): give more text
calibrate(model, tokenizer, [Path("nowhere.txt")])
  CorpusError: nowhere.txt is not there; give the path of a text file or of a folder of text files
calibrate(model, tokenizer, [Path("table.csv")])
  CorpusError: table.csv is not a text file this reads; known suffixes: .txt, .md, .jsonl, .txt.gz, .md.gz, .jsonl.gz
calibrate(model, tokenizer, [Path("empty.txt")])
  CorpusError: empty.txt is empty; give a file with text in it
calibrate(model, tokenizer, [Path("latin1.txt")])
  CorpusError: latin1.txt is not UTF-8 text (byte 1); convert it to UTF-8
calibrate(model, tokenizer, [Path("notes.jsonl")])
  CorpusError: notes.jsonl, line 1, has no text in field 'text' (it has: 'title', 'year'); name the field that holds the text
calibrate(model, tokenizer, [Path("pictures")])
  CorpusError: the folder pictures has no text files; known suffixes: .txt, .md, .jsonl, .txt.gz, .md.gz, .jsonl.gz
calibrate(model, token_ids=[[1, 2, 99999]])
  ArgumentError: row 0 of token_ids has id 99999, outside the vocabulary of 2048; ids are 0 to 2047: use this model's own tokenizer, and cut padding off
calibrate(model, tokenizer, [Path("book.txt")], length=4096)
  ArgumentError: length must be a whole number of tokens from 2 to the model's maximum 512; got 4096
calibrate(model, tokenizer, [Path("book.txt")], budget=512)
  ArgumentError: budget must be a Budget, got 512; write Budget(tokens=512) or Budget(fraction=1/8)
calibrate(model, tokenizer, [Path("book.txt")], candidate="balance")
  ArgumentError: unknown candidate 'balance'; known: pca-pre, pca-post, balanced (did you mean 'balanced'?)
calibrate(model, tokenizer, [Path("book.txt")], dense_if_mass_below=50)
  ArgumentError: dense_if_mass_below must be a number from 0 to 1; got 50
calibrate(model, tokenizer, [Path("book.txt")], checkpoint="pictures")
  ArgumentError: pictures holds something that is not a calibration in progress; name another folder
with attach(model, basis): calibrate(model, tokenizer, [Path("book.txt")])
  ModelError: something is attached to this model already; detach it first
"""  # noqa: E501

INTRODUCTION = """# Wrong inputs, and what they get

<!-- made by tests/bad_inputs.py -->
Every mistake a user can make raises a kind of `LokiError`; the command line prints `error: ` and the sentence on standard
error and ends with exit code 1 (2 for an option or a command that there is not). The tests run every line of this page."""
ATTACHING_NAMES = """`model` is a Llama of three layers and head dim 16, `basis` its basis and `without_moments` the same without
`moments.safetensors`; `qwen` is another model, `flash` one loaded with FlashAttention, `weights_wanted` one whose
configuration has `output_attentions=True`."""
UNSUPPORTED_NAMES = """Each model is of the type that its name says, `sliding` is a Mistral with a sliding window in every layer.
`loki info MODEL` says the same before weights are downloaded."""
RUNNING_NAMES = """`ids` is one sequence of ten tokens. `sliding_cache` was made for a model with a sliding window,
`cache_of_another_model` filled by a model with one key head; `both_ways` is a mask that is not causal,
`padded_right` one that hides the last two tokens."""
BASES_NAMES = """The folders' names say what happened to them; `fine_tuned` has the architecture of `model` and other
weights."""
CALIBRATING_NAMES = "`tokenizer` is the model's own. `pictures` is a folder without text."
COMMANDS_NAMES = "`my-basis` is the basis of `my-model`; `fine-tuned` has its architecture and other weights."

SECTIONS = (
    Section("Attaching", ATTACHING_NAMES, ATTACHING),
    Section("Models that cannot be served", UNSUPPORTED_NAMES, UNSUPPORTED),
    Section("Running an attached model", RUNNING_NAMES, RUNNING),
    Section("Budgets", "", VALUES),
    Section("Basis folders", BASES_NAMES, BASES),
    Section("Calibrating", CALIBRATING_NAMES, CALIBRATING),
    Section("The command line", COMMANDS_NAMES, COMMANDS),
)


def page() -> str:
    """``docs/errors.md``."""
    return "\n\n".join([INTRODUCTION, *map(_section, SECTIONS)]) + "\n"


def _section(section: Section) -> str:
    of_python = section.inputs[0].kind != "error"
    kinds = ["error", "---"] if of_python else [None, None]
    rows = [("you write", kinds[0], "you get"), ("---", kinds[1], "---")]
    rows += [(f"`{one.shown}`", f"`{one.kind}`" if of_python else None, one.sentence) for one in section.inputs]
    table = "\n".join(f"| {' | '.join(cell for cell in row if cell)} |" for row in rows)
    return "\n\n".join(part for part in (f"## {section.title}", section.names, table) if part)


if __name__ == "__main__":
    print(page(), end="")
