"""TRL's SFTTrainer on a model of apply_lorafa, without PEFT; checkpoints hold the adapter alone.

    python -m examples.sft --out run                        20 steps of a tiny model, on a CPU
    python -m examples.sft --out run --steps 40 --resume    goes on from the newest checkpoint

It needs `pip install trl`, and a checkout as the current folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from torch import nn
from trl import SFTConfig, SFTTrainer

from lorafa_kernels import LoRAFAConfig, apply_lorafa
from lorafa_kernels.integrations.transformers import adapter_checkpoints

from .tiny import LENGTH, options_of, report, rows, tiny_llama, tokenizer


def make_trainer(model: nn.Module, out: Path, steps: int) -> SFTTrainer:
    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        max_length=LENGTH,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=5,
        save_total_limit=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()])
    return adapter_checkpoints(SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer()))


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
