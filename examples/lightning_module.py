"""Lightning on a model that apply_lorafa has adapted; checkpoints leave out the frozen base.

    python -m examples.lightning_module --out run                        20 steps of a tiny model, on a CPU
    python -m examples.lightning_module --out run --steps 40 --resume    goes on from the last checkpoint

It needs `pip install transformers lightning`, and a checkout as the current folder.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lorafa_kernels import LoRAFAConfig, apply_lorafa, save_adapter
from lorafa_kernels.integrations.lightning import AdapterCheckpoints

from .tiny import batch_of, options_of, report, rows, tiny_llama


class Module(AdapterCheckpoints, lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def train(module: Module, out: Path, steps: int, resume: bool) -> list[float]:
    """Train for `steps` steps, in whole epochs; return the losses of this run's steps."""
    # Lightning's checkpoints do not have the random state: without shuffling and dropout the order is known.
    loader = DataLoader(rows(), batch_size=4, collate_fn=batch_of)
    trainer = lightning.Trainer(
        default_root_dir=out,
        # Not max_steps: of a run that it ended, Lightning repeats a batch when it goes on.
        max_epochs=math.ceil(steps / len(loader)),
        accelerator="cpu",
        devices=1,
        callbacks=[ModelCheckpoint(out, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=out / "last.ckpt" if resume else None)
    return module.losses


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(__doc__, argv)
    module = Module(apply_lorafa(tiny_llama(), LoRAFAConfig(r=4, target_modules="all-linear")))
    losses = train(module, options.out, options.steps, options.resume)
    save_adapter(module.model, options.out / "adapter")
    report(options.out, losses)
    return 0


if __name__ == "__main__":
    sys.exit(main())
