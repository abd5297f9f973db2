"""Scores by generation, shared out over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fishdip_ds.data.text2text import Collator, Text2TextDataset
from fishdip_ds.distributed import Comm
from fishdip_ds.tasks.base import Counts, Task


@dataclass(frozen=True)
class Evaluation:
    """Outcome on one split; the same on every rank."""

    metrics: dict[str, float]
    outputs: list[str]
    """Generated string of each example, in the order of the split."""


@torch.no_grad()
def evaluate(module: nn.Module, dataset: Text2TextDataset, task: Task, tokenizer, collator: Collator, comm: Comm, *,
             batch_size: int, max_length: int, num_beams: int = 1) -> Evaluation:
    """Generate for every example and score. **Collective.**

    Batches are cut from the whole split sorted by length and dealt to ranks, so that outputs do not depend on
    the number of ranks; a rank without a batch repeats one, for under ZeRO-3 all must generate together.
    """
    device = _device()
    was_training = module.training
    module.eval()
    order = sorted(range(len(dataset)), key=lambda i: (-len(dataset[i].get("prompt_ids", dataset[i]["input_ids"])), i))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    counts, mine = Counts(), {}
    for turn in range(-(-len(batches) // comm.world)):
        number = turn * comm.world + comm.rank
        ids = batches[number] if number < len(batches) else batches[0]
        prompts = {k: v.to(device) for k, v in collator.prompts([dataset[i] for i in ids]).items()}
        generated = module.generate(**prompts, max_new_tokens=max_length, num_beams=num_beams, do_sample=False,
                                    synced_gpus=comm.world > 1, pad_token_id=tokenizer.pad_token_id)
        if collator.causal:
            generated = generated[:, prompts["input_ids"].shape[1] :]
        if number < len(batches):
            texts = tokenizer.batch_decode(generated, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for i, text in zip(ids, texts, strict=True):
                mine[i] = text
                counts = counts + task.count(dataset.examples[i], text)
    module.train(was_training)
    total, outputs = Counts(), {}
    for other_counts, other_outputs in comm.gather_objects((counts, mine)):
        total = total + other_counts
        outputs.update(other_outputs)
    return Evaluation(task.metrics(total), [outputs[i] for i in range(len(dataset))])


def _device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())
