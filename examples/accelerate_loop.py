"""A training loop with Accelerate on a model that apply_lorafa has adapted; states hold the adapter alone.

    python -m examples.accelerate_loop --out run                        20 steps of a tiny model, on a CPU
    python -m examples.accelerate_loop --out run --steps 40 --resume    goes on from the newest state
    torchrun --nproc-per-node 2 -m examples.accelerate_loop --out run

It needs `pip install transformers accelerate`, and a checkout as the current folder.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader

from lorafa_kernels import LoRAFAConfig, apply_lorafa, save_adapter
from lorafa_kernels.integrations.accelerate import adapter_states

from .tiny import batch_of, options_of, report, rows, tiny_llama

ACCUMULATE = 2


class Progress:
    """What a state has beside model, optimizer and random state."""

    def __init__(self) -> None:
        self.epochs = 0
        self.losses: list[float] = []

    def state_dict(self) -> dict:
        return {"epochs": self.epochs, "losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        self.epochs, self.losses = state["epochs"], state["losses"]


def train(model: nn.Module, out: Path, steps: int, resume: bool) -> list[float]:
    """Train for at least `steps` optimizer steps, in whole epochs; return the loss of each."""
    accelerator = adapter_states(
        Accelerator(
            cpu=True,
            gradient_accumulation_steps=ACCUMULATE,
            # The order of an epoch's rows follows from its number.
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
        )
    )
    # Of all processes together: each has its share of the batch.
    loader = DataLoader(rows(), batch_size=4 // accelerator.num_processes, shuffle=True, collate_fn=batch_of)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if resume:
        accelerator.load_state(str(newest(out)))
    while len(progress.losses) < steps:
        loader.set_epoch(progress.epochs)
        parts = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                parts.append(accelerator.reduce(loss.detach(), "mean"))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    progress.losses.append(torch.stack(parts).mean().item())
                    parts.clear()
                optimizer.step()
                optimizer.zero_grad()
        progress.epochs += 1
        save(accelerator, out, progress.epochs)
    if accelerator.is_main_process:
        save_adapter(accelerator.unwrap_model(model), out / "adapter")
    return progress.losses


def save(accelerator: Accelerator, out: Path, epochs: int) -> None:
    """Write a state under another name first: one that was interrupted is never read."""
    part, state = out / "state.part", out / f"state-{epochs}"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(state, ignore_errors=True)
        part.rename(state)
        shutil.rmtree(out / f"state-{epochs - 2}", ignore_errors=True)
    accelerator.wait_for_everyone()


def newest(out: Path) -> Path:
    found = [path for path in out.glob("state-*") if path.is_dir()]
    if not found:
        sys.exit(f"no state-* folder in {out}: leave out --resume")
    return max(found, key=lambda path: int(path.name.partition("-")[2]))


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(__doc__, argv)
    model = apply_lorafa(tiny_llama(), LoRAFAConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    report(options.out, train(model, options.out, options.steps, options.resume))
    return 0


if __name__ == "__main__":
    sys.exit(main())
