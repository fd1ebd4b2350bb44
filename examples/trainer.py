"""transformers' Trainer on a model that apply_lorafa has adapted; checkpoints hold the adapter alone.

    python -m examples.trainer --out run                        20 steps of a tiny model, on a CPU
    python -m examples.trainer --out run --steps 40 --resume    goes on from the newest checkpoint
    torchrun --nproc-per-node 2 -m examples.trainer --out run

It needs `pip install transformers accelerate`, and a checkout as the current folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import Trainer, TrainingArguments

from lorafa_kernels import LoRAFAConfig, apply_lorafa
from lorafa_kernels.integrations.transformers import adapter_checkpoints

from .tiny import options_of, report, rows, tiny_llama


def make_trainer(model: nn.Module, out: Path, steps: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=5,
        save_total_limit=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return adapter_checkpoints(Trainer(model, arguments, train_dataset=rows()))


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(__doc__, argv)
    model = apply_lorafa(tiny_llama(), LoRAFAConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    trainer = make_trainer(model, options.out, options.steps)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(str(options.out / "adapter"))
    report(options.out, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    return 0


if __name__ == "__main__":
    sys.exit(main())
