"""``launch/export.py``: a run's result as a sparse delta, or merged into its base as a transformers folder."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from fishdip_ds.checkpoint.delta import Delta, export_delta
from fishdip_ds.checkpoint.merged import same_base, write_merged
from fishdip_ds.errors import ConfigError
from fishdip_ds.training.taskfile import NAME

EPILOG = """examples:
  python launch/export.py delta --from_run runs/ner-fish_dip --out deltas/ner
  python launch/export.py merged --from_run runs/ner-fish_dip --out models/ner
  python launch/export.py merged --delta deltas/ner --base models/flan-t5-xl --out models/ner
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser; ``--help`` explains every flag."""
    parser = argparse.ArgumentParser(prog="launch/export.py", description="Write what a run trained, from its files alone.",
                                     epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["delta", "merged"], help="changed weights alone, or a whole transformers folder")
    parser.add_argument("--from_run", type=Path, help="folder of a run of launch/train.py")
    parser.add_argument("--tag", help="checkpoint of the run, such as step-000300 (default: the last)")
    parser.add_argument("--delta", type=Path, help="merged: a delta folder in place of --from_run")
    parser.add_argument("--base", type=Path, help="merged: folder of the base model (default: the run's --model)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser


def main(argv: Sequence[str]) -> None:
    """Export. Local: one process, no GPU."""
    args = build_parser().parse_args(argv)
    if (args.from_run is None) == (args.delta is None) or (args.what == "delta" and args.delta is not None):
        raise ConfigError("give --from_run, the folder of a run" + (" (or --delta)." if args.what == "merged" else "."))
    if args.out.exists() and any(args.out.iterdir() if args.out.is_dir() else [args.out]):
        raise ConfigError(f"{args.out} is there already and not an empty folder; choose another --out.")
    if args.what == "delta":
        _delta(args.from_run, args.tag, args.out)
        facts = json.loads((args.out / "delta.json").read_text(encoding="utf-8"))
        print(f"wrote {args.out}: {facts['entries']:,} of {facts['weights']:,} weights, "
              f"{sum(p.stat().st_size for p in args.out.iterdir()) / 2**20:.2f} MiB")
        return
    _merged(args)
    print(f"wrote {args.out}")


def _delta(run: Path, tag: str | None, out: Path) -> None:
    config, results = _config(run), run / "results.json"
    scores = json.loads(results.read_text(encoding="utf-8"))["after"] if results.is_file() else {}
    export_delta(run / "checkpoints", out, tag, {
        "base_model": config["flags"]["model"] or "embedded T5", "config": config["deepspeed"]["fishdip"], "scores": scores})
    if (run / NAME).is_file():
        shutil.copy2(run / NAME, out / NAME)


def _merged(args: argparse.Namespace) -> None:
    import tempfile

    from fishdip_ds.training.models import embedded_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.delta or Path(scratch) / "delta"
        if args.from_run is not None:
            _delta(args.from_run, args.tag, folder)
        delta = Delta.read(folder)
        named = delta.facts.get("base_model")
        base = args.base or (embedded_model() if named == "embedded T5" else Path(str(named)))
        if not base.is_dir():
            raise ConfigError(f"the base model {str(base)!r} is no folder here; give --base, the folder with its safetensors.")
        same_base(base, delta)
        write_merged(base, delta, args.out)
        if (folder / NAME).is_file():
            shutil.copy2(folder / NAME, args.out / NAME)


def _config(run: Path) -> dict:
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run} is no folder of a run: config.json cannot be read ({error}).") from None
