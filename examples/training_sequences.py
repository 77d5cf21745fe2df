"""What the reference model is trained on: text from files, its tokenizer, and sequences that ask to copy and to retrieve.

Knows nothing of the model or the training. Every sequence is drawn from a generator that the caller hands in.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from loki_attention.evaluation.text import detokenize_wikitext

SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|pad|>"]


class Example(NamedTuple):
    """A sequence and the weight of predicting each of its tokens."""

    ids: list[int]
    weights: list[float]


class Fact(NamedTuple):
    """A sentence to hide, and the question and answer that ask for it later."""

    sentence: str
    question: str
    answer: str


class Corpus(NamedTuple):
    """The text as one row of token ids, the words that facts are about, and the tokenizer."""

    ids: Tensor
    words: list[str]
    tokenizer: PreTrainedTokenizerFast

    def window(self, length: int, rng: random.Random) -> list[int]:
        """``length`` tokens in a row from a random place."""
        start = rng.randrange(len(self.ids) - length + 1)
        return self.ids[start : start + length].tolist()

    def encode(self, text: str) -> list[int]:
        """The token ids of a short text."""
        return self.tokenizer(text, add_special_tokens=False).input_ids


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The texts of files and of the ``.txt`` files in folders; ``*.tokens.txt`` is WikiText and is detokenized."""
    files = [file for path in paths for file in (sorted(path.rglob("*.txt")) if path.is_dir() else [path])]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise SystemExit(
            f"no text to train on: {', '.join(missing) or 'no .txt file there'}; --text takes files and folders"
        )
    texts = [(file.name, file.read_text(encoding="utf-8")) for file in files]
    return [detokenize_wikitext(text) if name.endswith(".tokens.txt") else text for name, text in texts]


def chunks(texts: Sequence[str], characters: int = 100_000) -> Iterator[str]:
    """The texts in pieces that a tokenizer takes in parallel."""
    for text in texts:
        for start in range(0, len(text), characters):
            yield text[start : start + characters]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocabulary`` tokens that takes digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chunks(texts), trainer)
    bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def build_corpus(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, longest: int) -> Corpus:
    """The texts encoded; ``longest`` is the length of the longest sequence they must fill."""
    pieces = [torch.tensor(ids, dtype=torch.int32) for ids in tokenizer(list(chunks(texts))).input_ids]
    counts = Counter(word for text in texts for word in re.findall(r"\b[a-z]{4,9}\b", text))
    corpus = Corpus(torch.cat(pieces), sorted(word for word, _ in counts.most_common(5000)), tokenizer)
    if len(corpus.ids) <= longest or len(corpus.words) < 100:
        raise SystemExit(
            f"too little text: {len(corpus.ids)} tokens, {len(corpus.words)} words; give at least {longest} and 100"
        )
    return corpus


def repeated_segment(corpus: Corpus, length: int, rng: random.Random) -> Example:
    """A segment, random or natural, repeated to the end. A random one's first turn cannot be predicted and weighs 0."""
    period = rng.randint(max(2, length // 8), length // 2)
    natural = rng.random() < 0.5
    span = range(len(SPECIAL_TOKENS), len(corpus.tokenizer))
    segment = corpus.window(period, rng) if natural else rng.choices(span, k=period)
    ids = (segment * (length // period + 1))[:length]
    return Example(ids, [float(natural)] * period + [1.0] * (length - period))


def draw_fact(kind: int, word: str, corpus: Corpus, rng: random.Random) -> Fact:
    """One of the three kinds of fact about ``word``."""
    number, three = rng.randrange(10_000, 100_000), " ".join(rng.sample(corpus.words, 3))
    question, answer, reminder = (
        (f" The special magic number for {word} is:", f" {number}.", ""),
        (f" The secret words of {word} are:", f" {three}.", ""),
        (f" The pass key for {word} is", f" {number}.", f" Remember it. {number} is the pass key for {word}."),
    )[kind]
    return Fact(question + answer + reminder, question, answer)


def hidden_facts(corpus: Corpus, length: int, answer_weight: float, rng: random.Random) -> Example:
    """Prose with 1 to 8 facts of one kind after its sentences, all of them asked for at the end in another order."""
    kind, most = rng.randrange(3), max(1, min(8, length // 128))
    words = rng.sample(corpus.words, rng.randint(1, most))
    facts = [draw_fact(kind, word, corpus, rng) for word in words]
    sentences = [corpus.encode(fact.sentence) for fact in facts]
    ending = Example([], [])
    for fact in rng.sample(facts, len(facts)):
        question, answer = corpus.encode(fact.question), corpus.encode(fact.answer)
        ending.ids.extend(question + answer)
        ending.weights.extend([1.0] * len(question) + [answer_weight] * len(answer))
    prose = corpus.window(max(0, length - len(ending.ids) - sum(map(len, sentences))), rng)
    stop = corpus.encode(".")[0]
    places = [i + 1 for i, token in enumerate(prose) if token == stop] or [len(prose)]
    ids, start = [], 0
    for place, sentence in zip(sorted(rng.choices(places, k=len(facts))), sentences, strict=True):
        ids += prose[start:place] + sentence
        start = place
    ids += prose[start:]
    # A fact too long for a short sequence loses its start, so that the answers stay.
    return Example((ids + ending.ids)[-length:], ([1.0] * len(ids) + ending.weights)[-length:])
