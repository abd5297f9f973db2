"""``launch/compare.py``: methods x seeds x sizes of the training set, each cell a process of its own; a table at the end."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fishdip_ds.config import SPECIFIC, FishdipConfig, nearest
from fishdip_ds.ds_config import read_json
from fishdip_ds.errors import ConfigError, DataError, FishdipError
from fishdip_ds.strategies import registry
from fishdip_ds.training.arguments import add_method_flags
from fishdip_ds.training.arguments import build_parser as train_parser
from fishdip_ds.training.compare_table import libraries, markdown, plot, rows_of

LR_SCALE = {"full": 0.1, "child_tuning_f": 0.1, "dps": 0.1, "dps_mix": 0.1, "weight_mixup": 0.1, "mixout": 0.1, "lt_sft": 0.1,
            "lora": 0.5, "shira": 0.5, "prefix": 3.0}
"""Learning rate of a method over the run's, which is meant for methods that train a few weights: those that train all want
less. Others: 1."""
OURS = ("strategy", "seed", "subset_seed", "seeds", "fraction", "count", "shots", "output", "resume", "local_rank", "lr")
"""Flags of training that a comparison sets itself."""
EPILOG = """examples:
  python launch/compare.py --ds_config ds_configs/z3.json --methods full,lora,fish_dip --seeds 1,2,3 --sizes 0.1,0.5 \\
      --output_dir runs/compare --max_steps 200 --match_trained lora --jobs 2
  python launch/compare.py --output_dir runs/compare --table_only
All other flags are those of launch/train.py and go to every cell; those of single methods to the methods that know them.
"""


@dataclass(frozen=True)
class Cell:
    """One run."""

    method: str
    size: str
    seed: int
    flags: tuple[str, ...]
    """Of ``launch/train.py``, but for --output."""
    digest: str
    """Of all that decides the result: another command is another cell."""

    @property
    def name(self) -> str:
        """Folder of the cell."""
        return f"{self.method}-{self.size}-{self.seed}-{self.digest}"


@dataclass
class Grid:
    """A comparison that is fully said."""

    args: argparse.Namespace
    shared: dict[str, object]
    """Settings of single methods that were given for all."""
    passed: list[str]
    """Flags for every cell."""
    sets: dict[str, dict[str, str]] = field(default_factory=dict)
    """Method -> its own flags."""

    def cells(self) -> list[Cell]:
        """All cells, seed by seed, so that a part of the run has every method."""
        ds = read_json(self.args.ds_config)
        return [self._cell(method, size, seed, ds) for size in self.args.sizes for seed in self.args.seeds
                for method in self.args.methods]

    def _cell(self, method: str, size: str, seed: int, ds: dict) -> Cell:
        own = {key: value for key, value in self.shared.items() if key in registry.settings_of(method)
               and not (key == "density" and _dense(method))}
        own["lr"] = self.args.lr * LR_SCALE.get(method, 1.0)
        if method in self.args.match_trained:
            own["match_density"] = self._density(ds)
        own.update(self.sets.get(method, {}))
        flags = ["--ds_config", str(self.args.ds_config), *self.passed, "--strategy", method, "--seed", str(seed),
                 "--subset_seed", str(seed), "--fraction" if "." in size else "--count", size]
        for key, value in sorted(own.items()):
            flags += [f"--{key}", *_words(value)]
        text = json.dumps([flags[2:], ds, self.args.ranks], sort_keys=True)
        return Cell(method, size, seed, tuple(flags), hashlib.sha256(text.encode()).hexdigest()[:8])

    def _density(self, ds: dict) -> float:
        """Share of the weights that the method compared against trains."""
        method = self.args.against
        if method in registry.STOCK or _dense(method):
            raise ConfigError(f"--match_trained needs a density to match, which --against {method} has not; compare against "
                              "a method that trains a few weights, such as fish_dip.")
        given = [self.sets.get(method, {}).get("density"), self.shared.get("density"), ds.get("fishdip", {}).get("density")]
        return float(next((value for value in given if value is not None), FishdipConfig.density))


def _dense(method: str) -> bool:
    return method not in registry.STOCK and registry.strategy_class(method).dense


def _words(value: object) -> list[str]:
    if value is True or value == "true":
        return []
    return [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]


def build_parser() -> argparse.ArgumentParser:
    """Flags of the comparison itself."""
    parser = argparse.ArgumentParser(prog="launch/compare.py", epilog=EPILOG, allow_abbrev=False,
                                     description="Compare methods.", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the cells, the table and the plots")
    parser.add_argument("--ds_config", type=Path, help="DeepSpeed JSON, as for training")
    parser.add_argument("--methods", type=_list, default=[], help=f"of {', '.join(registry.known())}")
    parser.add_argument("--seeds", type=_list, default=["1", "2", "3"], help="each chooses samples, their order and what a "
                        "method draws (default 1,2,3)")
    parser.add_argument("--sizes", type=_list, default=["1.0"], help="shares of the training set (with a point) or counts of "
                        "examples (without), such as 0.1,0.5 or 50,200 (default 1.0)")
    parser.add_argument("--lr", type=float, help="learning rate of methods that train a few weights (default: the JSON's, "
                        "else 1e-3); other methods take it times " + ", ".join(f"{v:g} ({k})" for k, v in LR_SCALE.items()))
    parser.add_argument("--set", nargs="+", default=[], metavar="METHOD:KEY=VALUE", help="flags of one method, such as "
                        "lora:lr=1e-3; beat all others")
    parser.add_argument("--match_trained", type=_list, default=[], metavar="METHODS", help="of lora, shira, prefix: as many "
                        "trained weights as --against has, as nearly as their size allows")
    parser.add_argument("--against", default=None, help="method that differences are taken to (default: fish_dip, else the "
                        "first)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each cell, by torchrun (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time (default 1); share the cores between them")
    parser.add_argument("--keep_checkpoints", action="store_true", help="keep what the cells save (default: scores alone)")
    parser.add_argument("--table_only", action="store_true", help="run nothing: print the table of what is there")
    add_method_flags(parser.add_argument_group("settings of single methods, for all that know them"), only=SPECIFIC)
    return parser


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parse(argv: Sequence[str]) -> Grid:
    """Read the flags.

    Raises:
        ConfigError: naming what is unknown or contradictory, before any cell runs.
    """
    args, passed = build_parser().parse_known_args(argv)
    if args.table_only:
        return Grid(args, {}, [])
    if args.ds_config is None or not args.methods:
        raise ConfigError("give --ds_config, a DeepSpeed JSON, and --methods, such as full,lora,fish_dip.")
    known = {option.removeprefix("--"): action for action in train_parser()._actions for option in action.option_strings}
    for word in passed:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and (name in OURS or name not in known):
            why = "set by the comparison itself" if name in OURS else f"unknown{nearest(name, known)}"
            raise ConfigError(f"flag {word} is {why}")
    sets: dict[str, dict[str, str]] = {}
    for word in args.set:
        method, colon, rest = word.partition(":")
        key, equals, value = rest.partition("=")
        if not (colon and equals) or method not in args.methods:
            raise ConfigError(f"--set {word} is not of the form METHOD:KEY=VALUE with a method of {', '.join(args.methods)}.")
        if key not in known or key in set(OURS) - {"lr"}:
            raise ConfigError(f"--set {word}: {key!r} is no flag of training that can be set"
                              f"{nearest(key, set(known) - {'help'})}")
        sets.setdefault(method, {})[key] = value
    _check(args)
    shared = {key: getattr(args, key) for key in SPECIFIC if getattr(args, key) is not None}
    if args.lr is None:
        lr = read_json(args.ds_config).get("optimizer", {}).get("params", {}).get("lr", "auto")
        args.lr = 1e-3 if lr == "auto" else lr
    libraries("scipy.stats", "matplotlib.figure")
    return Grid(args, shared, passed, sets)


def _check(args: argparse.Namespace) -> None:
    for method in [*args.methods, *args.match_trained, *([args.against] if args.against else [])]:
        if method not in registry.known():
            raise ConfigError(f"unknown method {method!r}{nearest(method, registry.known())}")
    args.against = args.against or ("fish_dip" if "fish_dip" in args.methods else args.methods[0])
    for method in args.match_trained:
        if "match_density" not in registry.settings_of(method):
            raise ConfigError(f"--match_trained {method}: its size cannot be chosen; lora, shira and prefix can be matched.")
    if not all(seed.isdigit() for seed in args.seeds):
        raise ConfigError(f"--seeds {','.join(args.seeds)}: give whole numbers, such as 1,2,3.")
    args.seeds = [int(seed) for seed in args.seeds]
    for name in ("methods", "seeds", "sizes"):
        values = getattr(args, name)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"--{name} is empty or names one thing twice; name each once.")
    for size in args.sizes:
        if not size.replace(".", "", 1).isdigit() or float(size) <= 0 or ("." in size and float(size) > 1):
            raise ConfigError(f"size {size!r} is neither a share, such as 0.1, nor a count, such as 50.")
    if min(args.ranks, args.jobs) < 1:
        raise ConfigError("--ranks and --jobs must be at least 1.")


class Runner:
    """Runs the cells that are not finished."""

    def __init__(self, grid: Grid, script: Path) -> None:
        self.grid, self.args, self.script = grid, grid.args, script
        self.cells = grid.cells()
        self.folder = self.args.output_dir / "cells"
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._seconds: dict[str, list[float]] = {}
        self._stopped = False

    def run(self) -> list[dict]:
        """The records of all cells, in their order."""
        found = {cell: self._finished(cell) for cell in self.cells}
        todo = [cell for cell in self.cells if found[cell] is None]
        if len(todo) < len(self.cells):
            print(f"{len(self.cells) - len(todo)} of {len(self.cells)} cells are finished already", flush=True)
        for record in found.values():
            if record is not None:
                self._seconds.setdefault(record["method"], []).append(record["seconds"])
        with ThreadPoolExecutor(self.args.jobs) as pool:
            try:
                left = set(todo)
                for cell, record in zip(todo, pool.map(lambda cell: self._run(cell, left), todo), strict=True):
                    found[cell] = record
            except BaseException:
                self._stopped = True
                with self._lock:
                    for process in self._running:
                        process.terminate()
                raise
        return [found[cell] for cell in self.cells]

    def _finished(self, cell: Cell) -> dict | None:
        path = self.folder / cell.name / "cell.json"
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record["exit_code"] == 0 else None

    def _run(self, cell: Cell, left: set[Cell]) -> dict:
        folder = self.folder / cell.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = [sys.executable] if self.args.ranks == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.args.ranks), "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "127.0.0.1:0"]
        command = [*start, str(self.script), *cell.flags, "--output", str(folder / "run")]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE",
                                                               "MASTER_ADDR", "MASTER_PORT")}
        if self.args.ranks * self.args.jobs > 1:
            env.setdefault("OMP_NUM_THREADS", "1")
        begin = time.perf_counter()
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            with self._lock:
                if self._stopped:
                    raise FishdipError("stopped.")
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
                self._running.add(process)
            code = process.wait()
        record = self._record(cell, folder, command, code, time.perf_counter() - begin)
        with self._lock:
            self._running.discard(process)
            left.discard(cell)
            self._seconds.setdefault(cell.method, []).append(record["seconds"])
            self._tell(cell, record, left)
        return record

    def _record(self, cell: Cell, folder: Path, command: list[str], code: int, seconds: float) -> dict:
        """What ``cell.json`` holds."""
        record = {"method": cell.method, "size": cell.size, "seed": cell.seed, "digest": cell.digest, "exit_code": code,
                  "seconds": round(seconds, 2), "ranks": self.args.ranks, "command": command}
        run = folder / "run"
        if code == 0:
            results = json.loads((run / "results.json").read_text(encoding="utf-8"))
            config = json.loads((run / "config.json").read_text(encoding="utf-8"))["deepspeed"]
            samples = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(run.glob("samples/**/train.jsonl"))))
            record |= {"scores": results["after"], "headline": results["headline"], "steps": results["steps"],
                       "trained_weights": results["trained_weights"], "train_seconds": results["train_seconds"],
                       "lr": config["optimizer"]["params"]["lr"], "settings": config["fishdip"],
                       "samples_sha256": samples.hexdigest()}
        else:
            lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            said = [line for line in lines if "error: " in line or "Error: " in line]
            record["error"] = (said or lines or ["no output"])[-1][-500:]
        if not self.args.keep_checkpoints:
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
        (folder / "cell.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return record

    def _tell(self, cell: Cell, record: dict, left: set[Cell]) -> None:
        said = f"FAILED: {record['error']}" if record["exit_code"] else ", ".join(
            f"{key} {metric} {100 * record['scores'][key][metric]:.2f} %" for key, metric in record["headline"].items())
        every = [s for values in self._seconds.values() for s in values]
        rest = sum(statistics.fmean(self._seconds.get(c.method, every)) for c in left) / self.args.jobs
        print(f"[{len(self.cells) - len(left)}/{len(self.cells)}] {cell.method} size {cell.size} seed {cell.seed}: {said}, "
              f"{record['seconds']:.0f} s; about {rest / 60:.1f} min left", flush=True)


def check_samples(cells: Sequence[dict]) -> None:
    """``FishdipError`` if two methods saw other samples for the same seed and size."""
    seen: dict[tuple, dict] = {}
    for cell in (c for c in cells if not c["exit_code"]):
        first = seen.setdefault((cell["size"], cell["seed"]), cell)
        if first["samples_sha256"] != cell["samples_sha256"]:
            raise FishdipError(f"{first['method']} and {cell['method']} were trained on other samples for size {cell['size']} "
                               f"and seed {cell['seed']}: the data has changed; give another --output_dir.")


def tables(cells: Sequence[dict], against: str, folder: Path) -> str:
    """Write ``table.md``, ``compare.json`` and the plots; the text of the table."""
    done = [cell for cell in cells if not cell["exit_code"]]
    headline = done[0]["headline"] if done else {}
    text, rows = [], []
    for key, metric in headline.items():
        mine = rows_of(cells, key, against)
        rows += mine
        text.append(markdown(mine, metric, against))
        plot(mine, metric, folder / f"{key.replace('/', '.')}.png")
    failed = [f"{c['method']} size {c['size']} seed {c['seed']}: {c['error']}" for c in cells if c["exit_code"]]
    if failed:
        text.append("\nfailed cells:\n" + "\n".join(f"* {line}" for line in failed))
    table = "\n".join(text)
    (folder / "table.md").write_text(table.lstrip() + "\n", encoding="utf-8")
    value = {"against": against, "cells": list(cells), "rows": rows}
    (folder / "compare.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return table


def main(argv: Sequence[str], script: Path) -> None:
    """Run what is missing, print the table. Cells that failed end it with an error, when all have run."""
    grid = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped comparison stops its cells
    folder = grid.args.output_dir
    if grid.args.table_only:
        path = folder / "compare.json"
        if not path.is_file():
            raise DataError(f"{folder} holds no compare.json of a comparison; run one there first.")
        stored = json.loads(path.read_text(encoding="utf-8"))
        cells, against = stored["cells"], grid.args.against or stored["against"]
    else:
        cells, against = Runner(grid, script).run(), grid.args.against
        check_samples(cells)
    print(tables(cells, against, folder), flush=True)
    failed = [cell for cell in cells if cell["exit_code"]]
    if failed:
        raise FishdipError(f"{len(failed)} of {len(cells)} cells failed; see log.txt in their folders in {folder / 'cells'}, "
                           "and start the same command again to retry them.")
    print(f"\ntable {folder / 'table.md'}, numbers {folder / 'compare.json'}, plots {folder}/*.png")
