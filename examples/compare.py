"""Train and test the three ways on the same batches, count their memory, and reload the library's adapter
into a fresh model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from examples import DemoError
from examples.memory import peak_bytes, saved_activation_bytes
from examples.report import LIBRARY, LORA, PLAIN, OneStep, Reloaded, Run
from examples.sentiment import ENCODER_LINEARS, SentimentClassifier, apply_lora
from examples.training import Batch, EncodedSnippets, Trainer, accuracy, batch_order, predict
from lorafa_kernels import (
    LoRAFAConfig,
    LoRAFALinear,
    apply_lorafa,
    load_adapter,
    lorafa_parameters,
    save_adapter,
)

if TYPE_CHECKING:
    from examples.finetune_minilm import Options

# alpha / r, as in the runs of the LoRA-FA paper's authors.
SCALING = 2
# What tutorials of LoRA set.
DROPOUT = 0.05
# Few, since bf16 products are up to 40 times slower than fp32 ones on some CPUs.
ONE_STEP_SNIPPETS = 8
PRECISIONS = ("fp32", "bf16", "autocast to bf16")

Ways = dict[str, Callable[[SentimentClassifier], list[nn.Parameter]]]


def compare_ways(
    fresh_model: Callable[[int], SentimentClassifier],
    train_set: EncodedSnippets,
    test_set: EncodedSnippets,
    options: Options,
    device: torch.device,
    *,
    adapter: Path,
    console: Console,
) -> tuple[list[Run], list[OneStep], Reloaded]:
    """Run the three ways; write the library's adapter to the folder `adapter` and reload it.

    `fresh_model` builds the model from a seed. The ways take turns, step by step, so that other work on the
    machine slows all of them alike.
    """
    ways = ways_of(options)
    order = batch_order(len(train_set), options.batch_size, options.steps, options.seed)
    first = train_set.batch(order[0], device)
    few = train_set.batch(order[0][:ONE_STEP_SNIPPETS], device)

    def fresh() -> SentimentClassifier:
        return fresh_model(options.seed)

    with console.status("counting the memory of one step"):
        # This is the warm-up as well: what only the first step of a process pays for is not timed.
        memory = {name: measured(fresh(), prepare, first, "fp32") for name, prepare in ways.items()}
        one_step = [
            OneStep(precision, name, *measured(fresh(), prepare, few, precision))
            for precision in PRECISIONS
            for name, prepare in ways.items()
        ]

    trainers = {}
    for name, prepare in ways.items():
        model = fresh()
        trainers[name] = Trainer(model, prepare(model), len(order))
    torch.manual_seed(options.seed)
    with _progress(console) as progress:
        bars = {name: progress.add_task(name, total=options.steps, loss="") for name in ways}
        for indices in order:
            batch = train_set.batch(indices, device)
            for name, trainer in trainers.items():
                loss = trainer.step(batch)
                progress.update(bars[name], advance=1, loss=f"loss {loss:.3f}")

    runs = []
    for name, trainer in trainers.items():
        logits = predict(trainer.model, test_set, device)
        size = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        score = accuracy(logits, test_set)
        runs.append(Run(name, size, *memory[name], trainer.losses, trainer.step_seconds, score))

    save_adapter(trainers[LIBRARY].model, adapter)
    # From another seed, so that a head which did not come with the adapter would show.
    reloaded = load_adapter(fresh_model(options.seed + 1), adapter)
    reloaded_logits = predict(_with_impl(reloaded, options.impl), test_set, device)
    check = Reloaded(
        accuracy=accuracy(reloaded_logits, test_set),
        same_logits=torch.equal(reloaded_logits, logits),
        largest_difference=(reloaded_logits - logits).abs().max().item(),
    )
    return runs, one_step, check


def ways_of(options: Options) -> Ways:
    """Each way by its name: puts adapters into a model and returns what is trained. The library's is last."""
    alpha = SCALING * options.rank
    return {
        LORA: lambda model: apply_lora(model, options.rank, alpha, dropout=DROPOUT),
        PLAIN: lambda model: apply_lora(model, options.rank, alpha, dropout=DROPOUT, train_A=False),
        LIBRARY: lambda model: adapt(model, options.rank, alpha, options.impl, dropout=DROPOUT),
    }


def measured(
    model: SentimentClassifier,
    prepare: Callable[[SentimentClassifier], list[nn.Parameter]],
    batch: Batch,
    precision: str,
) -> tuple[int, int]:
    """Return the bytes that a step keeps for backward, and the peak of two steps with their optimizer."""
    device = batch.input_ids.device
    if precision == "bf16":
        model.to(torch.bfloat16)
    parameters = prepare(model)

    def region():
        if precision.startswith("autocast"):
            return torch.autocast(device.type, torch.bfloat16)
        return contextlib.nullcontext()

    with region():
        kept = saved_activation_bytes(copy.deepcopy(model), batch)
    trainer = Trainer(model, parameters, steps=2)

    def two_steps() -> None:
        for _ in range(2):
            with region():
                trainer.step(batch)

    return kept, peak_bytes(two_steps, device)


def adapt(
    model: SentimentClassifier, r: int, lora_alpha: float, impl: str = "auto", dropout: float = 0.0
) -> list[nn.Parameter]:
    """Put a LoRAFALinear where each Linear of the encoder was; return what is trained, the head included."""
    config = LoRAFAConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=dropout,
        target_modules=ENCODER_LINEARS,
        modules_to_save=["classifier"],
    )
    apply_lorafa(model, config)
    return lorafa_parameters(_with_impl(model, impl))


def choose_device(name: str) -> torch.device:
    """Turn --device into a device that is there. Raises DemoError if it is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DemoError(
            f"--device {name} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices; --device cpu needs none"
        )
    return device


def check_impl(impl: str, device: torch.device) -> None:
    """Raise DemoError if LoRA-FA cannot run with `impl` on `device`: before training, not after it."""
    layer = LoRAFALinear(16, 16, r=8, device=device)
    layer.impl = impl
    try:
        layer(torch.zeros(16, 16, device=device))
    except RuntimeError as error:
        raise DemoError(f"--impl {impl}: {error}") from error


def _with_impl(model: nn.Module, impl: str) -> nn.Module:
    for module in model.modules():
        if isinstance(module, LoRAFALinear):
            module.impl = impl
    return model


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<23}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        console=console,
    )
