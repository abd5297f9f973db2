"""Step time and peak memory of ``fish_dip`` beside stock full finetuning and LoRA, in one run.

    python benchmarks/step.py

A T5-base-size model (about 223M weights, random), bf16, one rank, batch 4 x 64 source and 48 target tokens;
each method in a process of its own, in turn, several rounds. Prints one JSON object as its last line: ratios are
ours divided by theirs, medians of the rounds. Memory is the peak resident set above that of the process
with the weights loaded, in GiB; selection of the mask is measured apart (``*_with_refresh`` includes it).
``gradient_bytes_ratio`` is what one rank of two sends per step for gradients, divided by 4 bytes x k.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

METHODS = ("fish_dip", "full", "lora")
GIB = 1024**3
SIZES = {"base": {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 3072, "num_layers": 12, "vocab_size": 32128},
         "tiny": {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2, "vocab_size": 512}}


class PeakMemory:
    """Samples this process's resident set every 2 ms; ``take`` gives the peak since the last ``take``, in GiB."""

    def __init__(self) -> None:
        self._peak, self._stop = 0, False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop:
            self._peak = max(self._peak, resident_bytes())
            time.sleep(0.002)

    def take(self) -> float:
        """Peak in GiB; starts over after giving freed memory back to the system."""
        peak = max(self._peak, resident_bytes())
        ctypes.CDLL(None).malloc_trim(0)
        self._peak = resident_bytes()
        return peak / GIB


def resident_bytes() -> int:
    """Resident set size of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def worker(args: argparse.Namespace) -> None:
    """Measure one method in this process; rank 0 writes its figures to ``args.worker_out``."""
    import torch

    torch.set_num_threads(args.threads)
    import fishdip_ds
    from fishdip_ds.distributed import close_distributed, init_distributed

    comm = init_distributed()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    model = build_model(args.size, dtype)
    generator = torch.Generator().manual_seed(comm.rank)
    vocabulary = SIZES[args.size]["vocab_size"]
    items = [{"input_ids": torch.randint(2, vocabulary, (args.source,), generator=generator),
              "labels": torch.randint(2, vocabulary, (args.target,), generator=generator)} for _ in range(args.batch * 4)]
    collate = lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]}  # noqa: E731
    config = {
        "train_micro_batch_size_per_gpu": args.batch, "gradient_clipping": 1.0, "bf16": {"enabled": args.dtype == "bf16"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 5_000_000, "stage3_param_persistence_threshold": 100_000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "fishdip": {"strategy": args.worker, "density": args.density, "refresh_interval": 10**9, "worst_samples": 3,
                    "scan_batch_size": args.batch, "lora_r": 16}}
    ctypes.CDLL(None).malloc_trim(0)
    loaded, memory = resident_bytes() / GIB, PeakMemory()
    engine, _, loader, _ = fishdip_ds.initialize(model, config, items, collate)
    engine.train()
    if args.worker == "fish_dip":
        engine.refresh()
    selection_peak = memory.take()
    seconds = []
    while len(seconds) < args.steps + 2:
        for batch in loader:
            begin = time.perf_counter()
            engine.backward(engine(**batch).loss)
            engine.step()
            seconds.append(time.perf_counter() - begin)
    figures = {"seconds": statistics.median(seconds[2 : args.steps + 2]), "peak_gib": memory.take() - loaded,
               "start_gib": selection_peak - loaded,
               "trained": engine.mask.count if args.worker == "fish_dip"
               else sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)}
    if args.worker == "fish_dip":
        figures["gradient_bytes_per_step"] = engine.comm.sent_bytes["gradients"] / engine.global_steps
    if comm.rank == 0:
        Path(args.worker_out).write_text(json.dumps(figures))
    close_distributed()


def build_model(size: str, dtype):
    """A randomly initialised T5 v1.0 of that size."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model = T5ForConditionalGeneration(T5Config(**SIZES[size], dropout_rate=0.0, decoder_start_token_id=0))
    torch.set_default_dtype(before)
    return model


def measure(method: str, args: argparse.Namespace, ranks: int, steps: int) -> dict:
    """Run one method in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0",
                   "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"] if ranks > 1 else [sys.executable]
        flags = {"worker": method, "worker_out": out, "steps": steps, "size": args.size, "dtype": args.dtype,
                 "batch": args.batch, "source": args.source, "target": args.target, "density": args.density,
                 "threads": args.threads if ranks == 1 else 1}
        done = subprocess.run([*command, __file__, *(f"--{k}={v}" for k, v in flags.items())], capture_output=True,
                              text=True, env={**os.environ, "DS_LOG_LEVEL": "error"})
        if done.returncode:
            raise SystemExit(f"{method} on {ranks} ranks failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def main() -> None:
    """Measure all methods and print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base", help="model size (default base)")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="weights and activations")
    parser.add_argument("--batch", type=int, default=4, help="samples per step (default 4)")
    parser.add_argument("--source", type=int, default=64, help="source tokens (default 64)")
    parser.add_argument("--target", type=int, default=48, help="target tokens (default 48)")
    parser.add_argument("--density", type=float, default=0.01, help="share of weights trained (default 0.01)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps per round (default 6)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, the methods in turn (default 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--worker_out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    runs: dict[str, list[dict]] = {method: [] for method in METHODS}
    for _ in range(args.rounds):
        for method in METHODS:
            runs[method].append(measure(method, args, 1, args.steps))
    two = measure("fish_dip", args, 2, 2)
    middle = {m: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for m, rows in runs.items()}
    print(f"{'':10}{'s/step':>9}{'peak GiB':>10}{'start GiB':>11}{'trained':>14}")
    for method, row in middle.items():
        print(f"{method:10}{row['seconds']:>9.3f}{row['peak_gib']:>10.3f}{row['start_gib']:>11.3f}{row['trained']:>14,.0f}")
    ours = middle["fish_dip"]
    whole = {m: max(row["peak_gib"], row["start_gib"]) for m, row in middle.items()}
    result = {
        **{f"time_ratio_{m}": round(ours["seconds"] / middle[m]["seconds"], 3) for m in ("full", "lora")},
        **{f"memory_ratio_{m}": round(ours["peak_gib"] / middle[m]["peak_gib"], 3) for m in ("full", "lora")},
        **{f"memory_ratio_{m}_with_refresh": round(whole["fish_dip"] / whole[m], 3) for m in ("full", "lora")},
        "gradient_bytes_ratio": round(two["gradient_bytes_per_step"] / (4 * two["trained"]), 4),
        "time_ratio_lora_rounds": [round(a["seconds"] / b["seconds"], 3)
                                   for a, b in zip(runs["fish_dip"], runs["lora"], strict=True)],
        "settings": {k: v for k, v in vars(args).items() if not k.startswith("worker")},
        "methods": middle, "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
