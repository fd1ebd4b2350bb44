"""Train and test the three ways on the same batches, and reload the LoRA-FA adapter into a fresh model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from examples import DemoError
from examples.report import Reloaded, Run
from examples.sentiment import ENCODER_LINEARS, SentimentClassifier, apply_lora, train_head_only
from examples.training import EncodedSnippets, accuracy, batch_order, predict, saved_activation_bytes, train
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


def compare_ways(
    fresh_model: Callable[[int], SentimentClassifier],
    train_set: EncodedSnippets,
    test_set: EncodedSnippets,
    options: Options,
    device: torch.device,
    *,
    adapter: Path,
    console: Console,
) -> tuple[list[Run], Reloaded]:
    """Run head only, LoRA and LoRA-FA; write the adapter of LoRA-FA to the folder `adapter` and reload it.

    `fresh_model` builds the model from a seed. The fourth run returned is LoRA-FA's formula in plain PyTorch,
    measured on one step and not trained.
    """
    lora_alpha = SCALING * options.rank
    ways: dict[str, Callable[[SentimentClassifier], list[nn.Parameter]]] = {
        "head only": train_head_only,
        "LoRA": lambda model: apply_lora(model, options.rank, lora_alpha),
        "LoRA-FA": lambda model: adapt(model, options.rank, lora_alpha, options.impl),
    }
    order = batch_order(len(train_set), options.batch_size, options.steps, options.seed)
    measured = train_set.batch(order[0], device)
    runs = []
    with _progress(console) as progress:
        for name, prepare in ways.items():
            task = progress.add_task(name, total=options.steps, loss="")
            model = fresh_model(options.seed)
            parameters = prepare(model)
            # This is the warm-up as well: what only the first step of a process pays for is not timed.
            saved = saved_activation_bytes(model, measured)

            def show(loss: float, task=task) -> None:
                progress.update(task, advance=1, loss=f"loss {loss:.3f}")

            trained = train(model, parameters, train_set, order, device, show)
            logits = predict(model, test_set, device)
            size = sum(parameter.numel() for parameter in parameters)
            score = accuracy(logits, test_set)
            runs.append(Run(name, size, saved, trained.losses, trained.step_seconds, score))

    save_adapter(model, adapter)
    # From another seed, so that a head which did not come with the adapter would show.
    reloaded = load_adapter(fresh_model(options.seed + 1), adapter)
    reloaded_logits = predict(_with_impl(reloaded, options.impl), test_set, device)
    check = Reloaded(
        accuracy=accuracy(reloaded_logits, test_set),
        same_logits=torch.equal(reloaded_logits, logits),
        largest_difference=(reloaded_logits - logits).abs().max().item(),
    )

    plain = fresh_model(options.seed)
    size = sum(p.numel() for p in apply_lora(plain, options.rank, lora_alpha, train_A=False))
    runs.append(Run("LoRA-FA, plain PyTorch", size, saved_activation_bytes(plain, measured)))
    return runs, check


def adapt(model: SentimentClassifier, r: int, lora_alpha: float, impl: str = "auto") -> list[nn.Parameter]:
    """Put a LoRAFALinear where each Linear of the encoder was; return what is trained, the head included."""
    config = LoRAFAConfig(
        r=r, lora_alpha=lora_alpha, target_modules=ENCODER_LINEARS, modules_to_save=["classifier"]
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
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        console=console,
    )
