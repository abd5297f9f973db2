"""The main job: data, model, engine, loop, scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tqdm import tqdm

import fishdip_ds
from fishdip_ds.data.datasets import Splits, load_dataset
from fishdip_ds.data.sampling import by_count, by_fraction, by_shots
from fishdip_ds.data.text2text import Collator, Text2TextDataset
from fishdip_ds.distributed import Comm
from fishdip_ds.ds_config import resolve
from fishdip_ds.errors import ConfigError
from fishdip_ds.selector import SelectionReport
from fishdip_ds.tasks.base import Example, get_task
from fishdip_ds.training.arguments import Job, fills
from fishdip_ds.training.evaluation import Evaluation, evaluate
from fishdip_ds.training.models import load_model, load_tokenizer

SPLITS = ("dev", "test")


class Trainer:
    """One run from flags to scores. Every method is **collective**; only rank 0 prints and writes."""

    def __init__(self, job: Job, comm: Comm) -> None:
        self.args, self.comm = job.args, comm
        self.bar: tqdm | None = None
        self.output: Path = job.args.output
        # The schedule's length follows from the data, which follows from the batch: resolve without it first.
        self.run = resolve({k: v for k, v in job.ds.items() if k != "scheduler"}, comm.world, fills(job.args))
        splits = load_dataset(self.args.data, self.args.task, labels=self.args.labels)
        self.task = get_task(self.args.task, splits.schema)
        self.tokenizer = load_tokenizer(self.args.model)
        chosen = self._subset(splits.train)
        self.max_steps = self.args.max_steps or self.args.epochs * math.ceil(len(chosen) / self.run.global_batch)
        self.run = resolve(job.ds, comm.world, {**fills(job.args), "scheduler.params.total_num_steps": self.max_steps})
        model = load_model(self.args.model, self.run, gradient_checkpointing=self.args.gradient_checkpointing)
        self.causal = not model.config.is_encoder_decoder
        self.data = self._tokenise(splits, chosen)
        self.collator = self._collator()
        self.engine, _, self.loader, _ = fishdip_ds.initialize(
            model, self.run.ds, self.data["train"], self.collator, lr_scheduler=self._scheduler())
        self.engine.on_refresh = self._tell_refresh
        self.results: dict[str, dict[str, dict[str, float]]] = {"before": {}, "after": {}}
        self.say(f"{self.args.model or 'embedded T5'} on {splits.source}: {len(chosen)} of {len(splits.train)} training "
                 f"examples, {len(self.data['dev'])} dev, {len(self.data['test'])} test, "
                 f"{len(splits.schema.natural)} types; {self.max_steps} steps of {self.run.global_batch} on "
                 f"{comm.world} rank{'s' if comm.world > 1 else ''}, strategy {self.run.fishdip.strategy}")

    # ---- the run ---------------------------------------------------------------------------------------

    def main(self) -> dict:
        """Train and score; returns what ``results.json`` holds."""
        self._write("config.json", {"deepspeed": self.run.ds, "flags": {
            k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}})
        if self.args.resume is not None:
            folder, state = self.engine.load_checkpoint(Path(self.args.resume or self.output) / "checkpoints")
            self.results["before"] = state.get("before", {})
            self.say(f"resumed {folder} at step {self.engine.global_steps}")
            if self.engine.global_steps >= self.max_steps:
                self.say(f"step {self.engine.global_steps} of {self.max_steps} is done already; "
                         "raise --max_steps or --epochs to go on")
        elif not self.args.no_eval_before:
            self.results["before"] = {split: self._score(split, "before").metrics for split in SPLITS}
        self._loop()
        for split in SPLITS:
            self.results["after"][split] = self._score(split, "after").metrics
        checkpoint = self._save()
        if self.args.export:
            self.engine.save_pretrained(self.output / "model")
            if self.comm.rank == 0:
                self.tokenizer.save_pretrained(self.output / "model")
        summary = {**self.results, "steps": self.engine.global_steps, "strategy": self.run.fishdip.strategy,
                   "density": self.run.fishdip.density, "headline": self.task.headline}
        self._write("results.json", summary)
        self.say(self._table())
        self.say(self._next_steps(checkpoint))
        return summary

    def _loop(self) -> None:
        engine = self.engine.train()
        self.bar = tqdm(total=self.max_steps, initial=engine.global_steps, disable=self.comm.rank != 0, unit="step",
                        dynamic_ncols=True)
        while engine.global_steps < self.max_steps:
            for batch in self.loader:
                engine.backward(engine(**batch).loss)
                engine.step()
                if engine.micro_steps % self.run.accumulation:
                    continue
                self._after_step()
                if engine.global_steps >= self.max_steps:
                    break
        self.bar.close()
        self.bar = None

    def _after_step(self) -> None:
        step, last = self.engine.global_steps, self.engine.last
        due = self.engine.next_refresh()
        self.bar.set_postfix_str(f"loss {last.loss:.3f}, lr {last.lr:.1e}, {last.samples_per_s:.0f} samples/s"
                                 + (f", next refresh at {due}" if due is not None else ""))
        self.bar.update()
        done = step >= self.max_steps
        if self.args.eval_interval and step % self.args.eval_interval == 0 and not done:
            metrics = self._score("dev", "during").metrics
            self.say(f"step {step}: dev {self.task.headline} {100 * metrics[self.task.headline]:.2f} %")
        if self.args.save_interval and step % self.args.save_interval == 0 and not done:
            self._save()

    def _score(self, split: str, when: str) -> Evaluation:
        outcome = evaluate(self.engine.module, self.data[split], self.task, self.tokenizer, self.collator, self.comm,
                           batch_size=self.args.eval_batch_size, max_length=self.args.max_target_length,
                           num_beams=self.args.num_beams)
        self.engine.monitor.scalars({f"Eval/{split}/{k}": v for k, v in outcome.metrics.items()},
                                    self.engine.global_samples)
        if when != "during" and self.comm.rank == 0:
            rows = [{"id": e.id, "input": self.task.input_text(e), "gold": self.task.target_text(e), "output": text}
                    for e, text in zip(self.data[split].examples, outcome.outputs, strict=True)]
            self._write(f"predictions.{split}.{when}.jsonl", rows)
        return outcome

    def _save(self) -> Path:
        folder = self.engine.save_checkpoint(self.output / "checkpoints",
                                             client_state={"before": self.results["before"]})
        self.say(f"saved {folder}")
        return folder

    # ---- building --------------------------------------------------------------------------------------

    def _subset(self, train: list[Example]) -> list[int]:
        args, seed = self.args, self.args.subset_seed
        if args.fraction is not None:
            return by_fraction(len(train), args.fraction, seed)
        if args.count is not None:
            return by_count(len(train), args.count, seed)
        if args.shots is not None:
            return by_shots(train, args.shots, seed)
        return list(range(len(train)))

    def _tokenise(self, splits: Splits, chosen: list[int]) -> dict[str, Text2TextDataset]:
        limit = self.args.eval_limit or None
        examples = {"train": [splits.train[i] for i in chosen], "dev": splits.dev[:limit], "test": splits.test[:limit]}
        data = {}
        for split, rows in examples.items():
            data[split] = made = Text2TextDataset(
                rows, self.task, self.tokenizer, max_input_length=self.args.max_input_length,
                max_target_length=self.args.max_target_length, causal=self.causal)
            if made.cut_inputs or made.cut_targets:
                self.say(f"{split}: {made.cut_inputs} inputs and {made.cut_targets} targets exceed the limits of "
                         f"{self.args.max_input_length} and {self.args.max_target_length} tokens and were cut")
        self._write("train_subset.json", [e.id for e in examples["train"]])
        return data

    def _collator(self) -> Collator:
        if not self.run.fishdip.pad_as_target:
            return Collator(self.tokenizer.pad_token_id, causal=self.causal)
        if self.causal:
            raise ConfigError('"fishdip.pad_as_target" is a quirk of encoder-decoder runs; leave it out here.')
        return Collator(self.tokenizer.pad_token_id, pad_inputs_to=self.args.max_input_length,
                        pad_targets_to=self.args.max_target_length, label_pad=self.tokenizer.pad_token_id)

    def _scheduler(self):
        """The flag's or, without one and without a section in the JSON, linear decay."""
        name = self.args.lr_scheduler
        if name is None and self.run.ds.get("scheduler") is not None:
            return None
        from transformers import get_scheduler

        return lambda optimizer: get_scheduler(name or "linear", optimizer, self.args.warmup_steps, self.max_steps)

    # ---- telling ---------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print on rank 0, above the progress bar if there is one."""
        if self.comm.rank == 0:
            tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def _write(self, name: str, value: object) -> None:
        if self.comm.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            text = ("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value) if name.endswith(".jsonl")
                    else json.dumps(value, indent=1, ensure_ascii=False) + "\n")
            (self.output / name).write_text(text, encoding="utf-8")

    def _tell_refresh(self, report: SelectionReport) -> None:
        engine = self.engine
        worst = "\n".join(
            f"| {i} | {loss:.3f} | `{self.task.target_text(self.data['train'].examples[i])}` |" for i, loss in report.worst)
        engine.monitor.text("Train/worst_samples", f"| sample | loss | target |\n|---|---|---|\n{worst}",
                            engine.global_samples)
        self.say(f"step {report.step}: mask of {engine.mask.count:,} weights ({100 * engine.mask.density:.2f} %) chosen "
                 f"in {sum(report.seconds.values()):.1f} s, {engine.mask.hash()[:12]}")

    def _table(self) -> str:
        lines = [f"\n{'':14}{'precision':>11}{'recall':>9}{'F1':>9}"]
        for when in ("before", "after"):
            for split in SPLITS:
                m = self.results[when].get(split)
                if m:
                    lines.append(f"{split + ' ' + when:14}{100 * m['precision']:>10.2f} {100 * m['recall']:>8.2f} "
                                 f"{100 * m['f1']:>8.2f}  %")
        return "\n".join(lines)

    def _next_steps(self, checkpoint: Path) -> str:
        command = f"deepspeed launch/train.py --ds_config {self.args.ds_config}"
        here = f"--task {self.args.task} --data {self.args.data}" if self.args.data != "demo" else ""
        return (f"\ncheckpoint  {checkpoint}\nscores      {self.output / 'results.json'}\n\nwhat to try next\n"
                f"  tensorboard --logdir {self.output}\n"
                f"  {command} {here} --resume --output {self.output} --max_steps {self.max_steps * 2}\n"
                f"  {command} {here} --strategy random\n"
                f"  {command} --data FOLDER_WITH_train.txt_dev.txt_test.txt --shots 10\n").replace("  --", " --")
