"""The embedded default model: small, loadable without a network, lossless tokenizer, able to copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import fishdip_ds
from fishdip_ds.data.demo import load_demo
from fishdip_ds.tasks.base import Counts
from fishdip_ds.tasks.ner import Ner

FOLDER = Path(fishdip_ds.__file__).parent / "assets" / "tiny_t5"
ODD = [
    "[ EU | organization ] rejects [ German | miscellaneous ] call to boycott .",
    "[ Tolkien | person | lives in = here ] was born [ here | location ]",
    "[belief] hotel area not given , hotel stars 4 [belief]", "a=b|c[[d]]e", "don't pay $1,214.50 (or 3%) !",
    "naïve Zürich – 日本語 😀 Ελλάδα", "MiXeD CaSe x86_64 foo_bar", "two  spaces", " leading and trailing ", "", "]",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForSeq2SeqLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()


def write(model, tokenizer, texts: list[str]) -> list[str]:
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    out = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=80)
    return tokenizer.batch_decode(out, skip_special_tokens=True)


def test_size_and_parts():
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 16 * 2**20
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "README.md"} <= {p.name for p in FOLDER.iterdir()}


def test_model_and_tokenizer_fit(model, tokenizer):
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.tie_word_embeddings
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert model.config.decoder_start_token_id == 0
    assert sum(p.numel() for p in model.parameters()) == json.loads(
        (FOLDER / "pretraining.json").read_text(encoding="utf-8"))["weights"]


@pytest.mark.parametrize("text", ODD)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_signs_and_sentinels_are_single_tokens(tokenizer):
    pieces = tokenizer.tokenize("[ a | b = c ]d|[[")
    assert [p.lstrip("Ġ") for p in pieces if set(p) & set("[]|=")] == ["[", "|", "=", "]", "|", "[", "["]
    assert all(len(tokenizer(f"<extra_id_{i}>", add_special_tokens=False)["input_ids"]) == 1 for i in range(32))


def test_demo_targets_come_back(tokenizer):
    splits = load_demo("ner", 0)
    task = Ner(splits.schema)
    texts = [task.target_text(e) for e in splits.test]
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"], skip_special_tokens=True) == texts


def test_it_copies_sentences_it_never_saw(model, tokenizer):
    texts = [" ".join(e.tokens) for e in load_demo("ner", 0).test[:40]]
    copied = sum(a == b for a, b in zip(write(model, tokenizer, texts), texts, strict=True))
    assert copied >= 20


def test_it_knows_no_entities_before_finetuning(model, tokenizer):
    splits = load_demo("ner", 0)
    task = Ner(splits.schema)
    examples = splits.test[:40]
    counts = Counts()
    for example, text in zip(examples, write(model, tokenizer, [task.input_text(e) for e in examples]), strict=True):
        counts = counts + task.count(example, text)
    assert task.metrics(counts)["f1"] < 0.02
