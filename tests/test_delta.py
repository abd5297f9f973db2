"""Sparse deltas: small, exact, taken off bitwise, merged by rules, and refused on another base."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import TextPairs, collate, ds_config, tiny_t5
from ranks import run

import fishdip_ds
from fishdip_ds.checkpoint.delta import Delta, export_delta
from fishdip_ds.errors import ConfigError, FishdipError

ROOT = Path(__file__).resolve().parents[1]


def _train(folder: str, seed: int) -> dict[str, torch.Tensor]:
    from fishdip_ds.zero3.partition import gathered

    world = torch.distributed.get_world_size()
    config = ds_config(micro=12 // world, optimizer={"type": "AdamW", "params": {"lr": 1e-2}})
    config["fishdip"] = {**config.get("fishdip", {}), "seed": seed, "strategy": "random", "density": 0.02}
    engine = fishdip_ds.initialize(tiny_t5(seed=3).train(), config, TextPairs(24), collate)[0]
    for batch in engine.loader:
        engine.backward(engine(**batch).loss)
        engine.step()
    engine.save_checkpoint(folder)
    weights = {}
    for name, param in engine.module.named_parameters():
        with gathered([param]):
            weights[name] = param.detach().clone()
    return weights


@pytest.fixture(scope="module")
def deltas(tmp_path_factory) -> tuple[list[Path], list[dict]]:
    """Five deltas of one base, made on one and two ranks, and the weights that each run ended with."""
    folder = tmp_path_factory.mktemp("deltas")
    trained = [run(1 + i % 2, _train, str(folder / f"run{i}"), i)[0] for i in range(5)]
    return [export_delta(folder / f"run{i}", folder / f"delta{i}", facts={"base_model": "tiny"}) for i in range(5)], trained


def _weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_five_deltas_on_one_base(deltas):
    folders, trained = deltas
    model = tiny_t5(seed=3)
    base = _weights(model)
    loaded = [Delta.read(folder) for folder in folders]
    for delta, expected in zip(loaded, trained, strict=True):
        applied = fishdip_ds.load_delta(model, delta)
        assert _same(_weights(model), expected) and not _same(_weights(model), base)
        applied.revert()
        assert _same(_weights(model), base)
    begin = time.perf_counter()
    fishdip_ds.load_delta(model, loaded[0], check=False).revert()
    print(f"switch of {loaded[0].facts['entries']} entries: {1000 * (time.perf_counter() - begin):.2f} ms")


def test_merge_rules(deltas):
    folders, _ = deltas
    model = tiny_t5(seed=3)
    base = _weights(model)
    a, b = Delta.read(folders[0]), Delta.read(folders[1])
    overlap = [n for n in a.entries if n in b.entries and set(a.entries[n][0].tolist()) & set(b.entries[n][0].tolist())]
    assert overlap
    with pytest.raises(ConfigError, match=r"both change .* choose a merge rule"):
        fishdip_ds.load_delta(model, a, b)
    assert _same(_weights(model), base)

    def dense(delta: Delta, name: str) -> torch.Tensor:
        change = torch.zeros_like(base[name]).view(-1)
        at, values = delta.entries[name]
        change[at] = values - base[name].view(-1)[at]
        return change

    for rule in ("sum", "mean", "last"):
        applied = fishdip_ds.load_delta(model, a, b, rule=rule, weights=[0.5, 1.0])
        for name in overlap:
            x, y = 0.5 * dense(a, name), dense(b, name)
            both = torch.zeros_like(x, dtype=torch.bool)
            both[list(set(a.entries[name][0].tolist()) & set(b.entries[name][0].tolist()))] = True
            expected = {"sum": x + y, "mean": torch.where(both, (x + y) / 2, x + y), "last": torch.where(both, y, x + y)}[rule]
            torch.testing.assert_close(_weights(model)[name].view(-1), base[name].view(-1) + expected, rtol=1e-6, atol=1e-7)
        applied.revert()
        assert _same(_weights(model), base)
    with pytest.raises(ConfigError, match="merge rule 'ties' is unknown"):
        fishdip_ds.load_delta(model, a, rule="ties")


def test_what_does_not_fit_is_refused(deltas, tmp_path):
    folders, _ = deltas
    with pytest.raises(FishdipError, match="trained from other base weights"):
        fishdip_ds.load_delta(tiny_t5(seed=4), folders[0])
    with pytest.raises(FishdipError, match="is of another model"):
        fishdip_ds.load_delta(torch.nn.Linear(2, 2), folders[0])
    with pytest.raises(FishdipError, match="is no delta"):
        Delta.read(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folders[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    raw = bytearray((copy / "delta.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "delta.safetensors").write_bytes(raw)
    with pytest.raises(FishdipError, match="missing, truncated or altered"):
        Delta.read(copy)
    facts = json.loads((copy / "delta.json").read_text())
    (copy / "delta.json").write_text(json.dumps({**facts, "format": 2}))
    with pytest.raises(FishdipError, match="this version reads 1"):
        Delta.read(copy)


def _call(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_export_from_a_run_and_plain_transformers_reads_it(tmp_path):
    out = tmp_path / "run"
    _call("launch/train.py", "--ds_config", "ds_configs/z3.json", "--count", "24", "--max_steps", "4", "--eval_limit", "2",
          "--no_eval_before", "--max_target_length", "32", "--export", "--output", str(out))
    told = _call("launch/export.py", "delta", "--from_run", str(out), "--out", str(tmp_path / "delta"))
    assert "18,046 of 1,804,672 weights" in told and "# Sparse delta" in (tmp_path / "delta/README.md").read_text()
    _call("launch/export.py", "merged", "--from_run", str(out), "--out", str(tmp_path / "merged"))
    code = ("import sys, torch; sys.modules['fishdip_ds'] = None; from transformers import AutoModelForSeq2SeqLM as M;"
            "a, b = (M.from_pretrained(p).eval() for p in sys.argv[1:]);"
            "assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True));"
            "x = torch.arange(5, 25)[None]; assert torch.equal(a.generate(x), b.generate(x)); print('same')")
    assert "same" in _call("-c", code, str(tmp_path / "merged"), str(out / "model"))
