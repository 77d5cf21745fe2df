"""The training recipe learns, goes on where it stopped, and leaves a model that loads."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loki_attention.data import sample_texts
from train_reference_model import SIZES, Recipe, Stage, build_model, draw_batch, main, take_weights, train
from training_sequences import build_corpus, hidden_facts, read_texts, repeated_segment, train_tokenizer

TINY = Recipe(
    tokens=60 * 512,
    vocabulary=512,
    layers=2,
    hidden=64,
    intermediate=128,
    heads=2,
    kv_heads=1,
    head_dim=32,
    stages=(Stage(32, 0.75, 512, repeats=0.5), Stage(256, 0.25, 512, facts=0.6)),
)


@pytest.fixture(scope="module")
def texts():
    return read_texts(sample_texts()[:2])


@pytest.fixture(scope="module")
def corpus(texts):
    return build_corpus(texts, train_tokenizer(texts, 512), longest=256)


def test_the_loss_falls_and_the_model_loads(texts, tmp_path):
    out = tmp_path / "model"
    losses = train(TINY, texts, out, device="cpu")
    assert len(losses) == len(TINY.plan()) == 60
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "It was 12345 o'clock."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert model.config.max_position_embeddings == 512
    assert model(**tokenizer(text, return_tensors="pt")).logits.isfinite().all()
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(SystemExit, match="exists already"):
        train(TINY, texts, out, device="cpu")


def test_a_stopped_run_goes_on_to_the_same_weights(texts, tmp_path):
    short = replace(TINY, tokens=24 * 512)
    whole = train(short, texts, tmp_path / "whole", device="cpu")
    halves = [train(short, texts, tmp_path / "resumed", device="cpu", stop_after=stop) for stop in (10, None)]
    assert [len(losses) for losses in halves] == [10, 14]
    assert halves[0] + halves[1] == whole
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]


def test_a_run_starts_from_a_model_and_averages_its_key_heads(texts, tmp_path):
    start, tiny = tmp_path / "start", replace(TINY, tokens=2 * 512)
    train(replace(tiny, kv_heads=2), texts, start, device="cpu")
    weights = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict()
    model = build_model(tiny, positions=512)
    take_weights(model, start)
    for name, weight in model.state_dict().items():
        is_shared = name.endswith(("k_proj.weight", "v_proj.weight"))
        expected = (weights[name][:32] + weights[name][32:]) / 2 if is_shared else weights[name]
        torch.testing.assert_close(weight, expected)
    train(tiny, texts, tmp_path / "model", device="cpu", start_from=start)
    saved = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (start, tmp_path / "model")]
    assert saved[0] == saved[1]
    with pytest.raises(SystemExit, match="another shape"):
        take_weights(build_model(replace(tiny, hidden=32), positions=512), start)


def test_a_checkpoint_of_another_recipe_is_refused(texts, tmp_path):
    train(TINY, texts, tmp_path / "model", device="cpu", stop_after=1)
    with pytest.raises(SystemExit, match="another recipe"):
        train(replace(TINY, seed=1), texts, tmp_path / "model", device="cpu")


def test_the_recipe_spends_its_tokens_as_it_says():
    plan = Recipe().plan()
    assert sum(stage.step_tokens for stage in plan) == pytest.approx(36e6, rel=1e-3)
    assert [stage.length for stage in dict.fromkeys(plan)] == [128, 256, 512, 1024, 2048, 4096]
    assert (Recipe().rate(0.0), Recipe().rate(0.7), Recipe().rate(1.0)) == (1.0, pytest.approx(1.0), 0.0)
    assert Recipe().rate(0.85) == pytest.approx(0.5)


def test_the_large_model_is_what_it_says():
    large = SIZES["large"]
    plan = large.plan()
    assert sum(stage.step_tokens for stage in plan) == pytest.approx(large.tokens, rel=1e-2)
    assert max(stage.length for stage in plan) == 8192
    with torch.device("meta"):
        model = build_model(large, positions=16384)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(24e6, rel=0.02)


def test_facts_are_asked_for_at_the_end_and_their_answers_weigh_more(corpus):
    for seed in range(30):
        ids, weights = hidden_facts(corpus, 256, 4.0, random.Random(seed))
        assert len(ids) == len(weights) == 256
        heavy = [token for token, weight in zip(ids, weights, strict=True) if weight == 4.0]
        answers = [answer.strip() for answer in corpus.tokenizer.decode(heavy).split(".") if answer.strip()]
        context = corpus.tokenizer.decode(ids[: weights.index(4.0)])
        assert answers
        assert all(answer in context for answer in answers)


def test_a_repeated_segment_repeats_and_its_random_part_weighs_nothing(corpus):
    for seed in range(30):
        ids, weights = repeated_segment(corpus, 64, random.Random(seed))
        assert len(ids) == len(weights) == 64
        assert any(ids[period:] == ids[:-period] for period in range(8, 33))
        assert weights[-32:] == [1.0] * 32


def test_batches_depend_on_seed_and_step_alone(corpus):
    stage = TINY.stages[1]
    first, again, other = (draw_batch(corpus, TINY, stage, step) for step in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == first[1].shape == (2, 256)


def test_folders_are_read_and_wikitext_is_detokenized(tmp_path):
    (tmp_path / "a.txt").write_text("plain @-@ text")
    (tmp_path / "b.tokens.txt").write_text("word @-@ level text .")
    assert read_texts([tmp_path]) == ["plain @-@ text", "word-level text."]


@pytest.mark.parametrize("options", [["--tokens", "0"], ["--steps", "0"]])
def test_bad_numbers_end_with_a_clear_line(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--text", str(sample_texts()[0]), "--out", str(tmp_path / "model"), *options])
    assert error.value.code == 2
    assert "at least 1" in capsys.readouterr().err


def test_missing_text_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere\.txt"):
        read_texts([tmp_path / "nowhere.txt"])
    with pytest.raises(SystemExit, match="no text"):
        read_texts([tmp_path])


@pytest.mark.slow
def test_the_command_trains_the_full_shape_and_can_be_stopped(tmp_path, capsys):
    command = [
        "--text",
        *map(str, sample_texts()),
        "--out",
        str(tmp_path / "model"),
        "--tokens",
        "30000",
        "--kv-heads",
        "1",
        "--device",
        "cpu",
    ]
    main([*command, "--steps", "2"])
    assert "stopped" in capsys.readouterr().out
    main(command)
    assert "tokens/s" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(3.4e6, rel=0.02)
    assert model.config.num_key_value_heads == 1
