"""A training loop in plain PyTorch and transformers, as a reference for :mod:`speed`.

``python benchmarks/plain.py MODEL TOKENISED --steps 6 --blocks 8 --at-once 8`` writes one line of
JSON per optimizer step, with its seconds and its loss. The loop uses the recipe's model, blocks,
order of blocks, batch, precision, optimizer and learning rates. It runs in one process on all
cores.
"""

from __future__ import annotations

import argparse
import json
import os
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a Hugging Face model")
    parser.add_argument("tokenised", help="folder of the tokenised corpus (notebook 02)")
    parser.add_argument("--steps", type=int, default=6, help="number of optimizer steps")
    parser.add_argument("--blocks", type=int, default=8, help="blocks per optimizer step")
    parser.add_argument("--at-once", type=int, default=8, help="blocks per forward pass")
    parser.add_argument("--learning-rate", type=float, default=2.5e-4, help="peak learning rate")
    parser.add_argument(
        "--schedule", default="constant", help="name of the scheduler in transformers"
    )
    parser.add_argument(
        "--schedule-settings", type=json.loads, default={}, help="JSON of its settings"
    )
    parser.add_argument("--warmup", type=int, default=0, help="number of warmup steps")
    parser.add_argument("--seed", type=int, default=42, help="seed of the order of blocks")
    parser.add_argument(
        "--bf16", action="store_true", help="autocast to bf16, with weights in fp32"
    )
    given = parser.parse_args()
    import torch
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, get_scheduler

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores or 1)
    model = AutoModelForCausalLM.from_pretrained(given.model, torch_dtype=torch.float32).train()
    blocks = load_from_disk(given.tokenised)["train"].with_format("torch")
    # The order of accelerate's sampler in the first epoch.
    order = torch.randperm(
        len(blocks), generator=torch.Generator().manual_seed(given.seed)
    ).tolist()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=given.learning_rate, weight_decay=0.0, fused=True
    )
    schedule = get_scheduler(
        given.schedule,
        optimizer,
        num_warmup_steps=given.warmup,
        num_training_steps=given.steps,
        scheduler_specific_kwargs=given.schedule_settings,
    )
    for step in range(given.steps):
        since, loss = time.perf_counter(), 0.0
        first = step * given.blocks
        for start in range(first, first + given.blocks, given.at_once):
            taken = order[start : min(start + given.at_once, first + given.blocks)]
            ids = blocks[taken]["input_ids"]
            with torch.autocast("cpu", torch.bfloat16, enabled=given.bf16):
                # transformers' trainer divides by all labels, including each block's first
                items = given.blocks * ids.shape[1]
                share = model(
                    input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=items
                ).loss
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(json.dumps({"seconds": time.perf_counter() - since, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
