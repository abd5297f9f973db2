"""Entry point of ``launch/train.py``: run, and end all ranks with one sentence if something is wrong."""

from __future__ import annotations

import os
import sys
import warnings


def main(argv: list[str] | None = None) -> None:
    """Parse flags, join the ranks, train. Exit code 1 with a message on errors a user can act on."""
    _quiet()
    from fishdip_ds.errors import FishdipError

    try:
        from fishdip_ds.training.arguments import parse

        job = parse(argv)
        from fishdip_ds.distributed import close_distributed, init_distributed

        comm = init_distributed()
        from fishdip_ds.training.trainer import Trainer

        Trainer(job, comm).main()
    except FishdipError as error:
        _end(f"error: {error}")
    except KeyboardInterrupt:
        _end("interrupted")
    close_distributed()


def _quiet() -> None:
    """Silence start-up chatter of the libraries below; their errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


def _end(message: str) -> None:
    """Say why and leave at once: other ranks may wait in a collective, and the launcher ends them when one leaves."""
    rank = os.environ.get("RANK", "0")
    print(message if rank == "0" else f"rank {rank}: {message}", file=sys.stderr, flush=True)
    os._exit(1)
