"""Make the embedded default model: train its tokenizer, then pretrain a small T5 on text made here.

    python tools/pretrain_tiny_t5.py --out fishdip_ds/assets/tiny_t5 --minutes 40

Objectives: T5 span corruption with sentinels (Raffel et al. 2020, section 3.1.4), and full-text
reconstruction of a corrupted input (their table 4, "BERT-style" and "MASS-style" rows), because a model of this size must have
learned to copy its input before it can be finetuned on targets that repeat the sentence. No labelling
task is part of it. Text: sentences about an invented world (``fishdip_ds.data.demo_words``, patterns that
the demo corpus does not use) and streams of made-up words, numbers and signs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import torch

from fishdip_ds.data import demo_words as words
from fishdip_ds.data.demo import World

SENTINELS = 32
SIGNS = list("[]|=.,:;!?()-'\"/&%@#")
SYLLABLES = "ka lo mi ru te sha no vi du pe ga zo li fen tor bal mur nis qua dri ste wex jo".split()


def sentence(rng: random.Random, worlds: list[World]) -> str:
    """One sentence of the invented world; names of both pools occur, as in any general corpus."""
    world = rng.choice(worlds)
    text = re.sub(r"\(([^)]*)\)", lambda m: rng.choice(m[1].split("|")), rng.choice(words.PRETRAIN_PATTERNS))
    return re.sub(r"\{(\w+)\}", lambda m: world.name(m[1] if m[1] in ("trade", "thing") else m[1][0]), text)


def stream(rng: random.Random) -> str:
    """Made-up words, numbers and signs: what can only be copied."""
    def piece() -> str:
        kind = rng.random()
        if kind < 0.15:
            return rng.choice(SIGNS)
        if kind < 0.25:
            return str(rng.randint(0, 10 ** rng.randint(1, 4)))
        if kind < 0.35:
            return "".join(rng.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(1, 6)))
        word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3)))
        return word.capitalize() if rng.random() < 0.4 else word

    return " ".join(piece() for _ in range(rng.randint(4, 14)))


def text(rng: random.Random, worlds: list[World]) -> str:
    """One training text."""
    if rng.random() < 0.3:
        return stream(rng)
    return " ".join(sentence(rng, worlds) for _ in range(rng.randint(1, 3)))


def train_tokenizer(texts: list[str], size: int):
    """Byte-level BPE (any text can be written), pad 0, eos 1, unk 2, sentinels, eos appended to every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(SENTINELS))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[AddedToken(s, special=True) for s in special],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   additional_special_tokens=special[3:], model_max_length=512,
                                   clean_up_tokenization_spaces=False)


def span_corruption(ids: list[int], rng: random.Random, sentinel: int) -> tuple[list[int], list[int]]:
    """T5's objective: spans of mean length 3 over about 15 % of the tokens become sentinels."""
    source, target, at, used = [], [], 0, 0
    while at < len(ids):
        if rng.random() < 0.06 and used < SENTINELS - 1:
            length = min(rng.randint(1, 5), len(ids) - at)
            source.append(sentinel + used)
            target += [sentinel + used, *ids[at : at + length]]
            at, used = at + length, used + 1
        else:
            source.append(ids[at])
            at += 1
    return source, [*target, sentinel + used]


def reconstruction(ids: list[int], rng: random.Random, sentinel: int) -> tuple[list[int], list[int]]:
    """The whole text from a lightly masked one; the rate is drawn per text and may be zero."""
    rate = rng.choice([0.0, 0.05, 0.15])
    return [sentinel if rng.random() < rate else i for i in ids], ids


def batch(rng: random.Random, worlds: list[World], tokenizer, size: int, limit: int) -> dict[str, torch.Tensor]:
    """A padded batch of one objective each, half and half; -100 pads the labels."""
    encoded = tokenizer([text(rng, worlds) for _ in range(size)], add_special_tokens=False)["input_ids"]
    sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    pairs = [(span_corruption if rng.random() < 0.35 else reconstruction)(ids[:limit], rng, sentinel)
             for ids in sorted(encoded, key=len)]
    def pad(rows: list[list[int]], fill: int) -> torch.Tensor:
        width = max(map(len, rows)) + 1
        return torch.tensor([[*row, 1, *[fill] * (width - len(row) - 1)] for row in rows])
    sources = pad([s for s, _ in pairs], 0)
    return {"input_ids": sources, "attention_mask": (sources != 0).long(), "labels": pad([t for _, t in pairs], -100)}


def build_model(vocabulary: int, seed: int):
    """T5 v1.1-style (gated GELU), tied embedding."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    return T5ForConditionalGeneration(T5Config(
        vocab_size=vocabulary, d_model=128, d_kv=32, num_heads=4, d_ff=320, num_layers=3, num_decoder_layers=3,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        relative_attention_num_buckets=32, relative_attention_max_distance=64))


def main() -> None:
    """Train and save, at the end and every few minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=40, help="wall-clock time of pretraining (default 40)")
    parser.add_argument("--steps", type=int, default=0, help="stop after this many steps instead (0: by time)")
    parser.add_argument("--batch", type=int, default=64, help="texts per step (default 64)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW (default 2e-3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of text, order and initial weights (default 0)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    worlds = [World(rng, held_out) for held_out in (False, False, True)]
    tokenizer = train_tokenizer([text(rng, worlds) for _ in range(20_000)], 2048)
    model = build_model(len(tokenizer), args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(tokenizer)} tokens", flush=True)
    start, done, losses, saved, seen = time.time(), 0, [], time.time(), 0
    while (share := done / args.steps if args.steps else (time.time() - start) / args.minutes / 60) < 1:
        warm = min(1.0, (done + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        inputs = batch(rng, worlds, tokenizer, args.batch, 64)
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        seen += int((inputs["labels"] != -100).sum())
        losses.append(float(loss.detach()))
        if done % 100 == 0:
            print(f"step {done}  loss {sum(losses[-100:]) / 100:.4f}  {time.time() - start:.0f} s", flush=True)
        if time.time() - saved > 240:
            save(model, tokenizer, args, done, losses, seen)
            saved = time.time()
    save(model, tokenizer, args, done, losses, seen)


def save(model, tokenizer, args: argparse.Namespace, done: int, losses: list[float], seen: int) -> None:
    """Write model, tokenizer and the record of the training."""
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {"steps": done, "loss_last_100": round(sum(losses[-100:]) / len(losses[-100:]), 4), "target_tokens": seen,
              "batch": args.batch, "lr": args.lr, "seed": args.seed}
    (args.out / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
