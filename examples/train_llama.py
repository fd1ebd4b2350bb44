"""Fine-tune a Llama-shaped model with LoRA-FA on one process or many:

    python -m examples.train_llama
    torchrun --nproc-per-node 8 -m examples.train_llama --size Llama-3-8B --dtype bfloat16 --sequence 4096

The model is one of lorafa_kernels.tune.models's sizes, or "tiny", with random weights, or comes from a local
folder; the text is a file, or Python's own help, cut into rows of bytes or of a local tokenizer's tokens.
torchrun's processes shard the model with FSDP2, a group for each layer; with --tensor-parallel N each N of
them split its matrices. NCCL between GPUs, gloo between CPUs.

In --out: checkpoints/ and, at the end, adapter/ in PEFT's format and results.json with all losses. The same
command again goes on from the newest checkpoint, whatever ended the run before, on as many processes or on
another number, which must share the folder. It then ends with the losses of a run that nothing ended: to the
bit where every sum has the same order again, as on one process on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from examples import DemoError
from lorafa_kernels.command_line import FAILED, INTERRUPTED, USAGE_ERROR, Parser, count, exit_code, one_line
from lorafa_kernels.files import replace_file
from lorafa_kernels.tune.models import MODELS

NAME = "examples.train_llama"
OUT = Path(__file__).resolve().parent.parent / ".demo" / "train_llama"
DTYPES = ("float32", "bfloat16")
SIZES = ("tiny", *(name for name, layer in MODELS.items() if "gate_proj" in {one.name for one in layer}))
INTERRUPTED_MESSAGE = "\ninterrupted: the same command goes on from the newest checkpoint\n"
# What another run of the same training may change: where it runs, and how often it stops to save.
FREE = ("out", "device", "accumulate", "checkpointing", "save_every", "tensor_parallel")


class UsageError(Exception):
    """Options that do not go together, or not with the text or the checkpoint; the message says which."""


@dataclass(frozen=True)
class Options:
    size: str = "tiny"
    checkpoint: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None
    sequence: int = 128
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "all-linear"
    gradient_correction: bool = False
    steps: int = 100
    batch: int = 8
    accumulate: int = 1
    lr: float = 1e-2
    warmup: int = 10
    clip: float = 1.0
    eval_every: int = 50
    eval_rows: int = 16
    save_every: int = 20
    dtype: str = "float32"
    checkpointing: bool = False
    seed: int = 0
    device: str = "auto"
    tensor_parallel: int = 1
    out: Path = OUT


class _Parser(Parser):
    """Of all the processes that torchrun started only the first one speaks."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(status, message if os.environ.get("RANK", "0") == "0" else None)


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    default = Options()
    parser = _Parser(
        prog=f"python -m {NAME}",
        description="Fine-tune a Llama-shaped model with LoRA-FA; also under torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(name: str, help: str, **kind: Any) -> None:
        field = name.removeprefix("--").replace("-", "_")
        parser.add_argument(name, default=getattr(default, field), help=help, **kind)

    add("--size", "the model's sizes; its weights are random", choices=SIZES)
    add("--checkpoint", "local folder of a model, in place of --size", type=Path)
    add("--text", "file to train on; default: the help texts of Python's standard library", type=Path)
    add("--tokenizer", "local folder of a tokenizer; default: a token for each byte", type=Path)
    add("--sequence", "tokens of a row", type=count)
    add("--rank", "rank r of the adapter", type=count)
    add("--alpha", "lora_alpha: the scaling is alpha/r", type=_number(0, math.inf))
    add("--dropout", "dropout on the adapter's input", type=_number(0, 1))
    add("--targets", "all-linear, or names of linear layers with commas: q_proj,v_proj")
    add("--gradient-correction", "as in LoRA-FA's second version", action="store_true")
    add("--steps", "steps of the optimizer", type=count)
    add("--batch", "rows of a step, over all processes", type=count)
    add("--accumulate", "parts that each process takes its rows of a step in", type=count)
    add("--lr", "largest learning rate", type=_number(0, math.inf))
    add("--warmup", "steps to reach it; then it falls along a cosine to a tenth", type=_whole)
    add("--clip", "largest norm of the gradient", type=_number(0, math.inf))
    add("--eval-every", "steps between evaluations; there is one after the last step", type=count)
    add("--eval-rows", "rows that are held out for them", type=count)
    add("--save-every", "steps between checkpoints; there is one after the last step", type=count)
    add("--dtype", "of the frozen weights and of the computation; lora_B is float32", choices=DTYPES)
    add("--checkpointing", "keep a layer's input alone, and run it again in backward", action="store_true")
    add("--seed", "for the weights, the adapter, the order of rows and dropout", type=_whole)
    add("--device", "auto is a GPU where there is one", choices=("auto", "cpu", "cuda"))
    add("--tensor-parallel", "processes that split the model's matrices among them", type=count)
    add("--out", "folder for checkpoints, adapter and results.json", type=Path)
    options = Options(**vars(parser.parse_args(arguments)))
    try:
        _check(options)
    except UsageError as error:
        parser.error(str(error))
    return options


def _check(options: Options) -> None:
    """Raise UsageError for what needs no text and no model to be wrong."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes % options.tensor_parallel:
        raise UsageError(
            f"argument --tensor-parallel: {processes} processes cannot be divided into groups of "
            f"{options.tensor_parallel}"
        )
    shares = processes // options.tensor_parallel
    if options.batch % (shares * options.accumulate):
        among = f"{shares} groups of processes" if options.tensor_parallel > 1 else f"{processes} processes"
        raise UsageError(
            f"argument --batch: {options.batch} rows cannot be divided among {among}, each in "
            f"{options.accumulate} parts (--accumulate)"
        )
    if options.sequence < 2:
        raise UsageError("argument --sequence: expected 2 or more tokens, the first one predicts the second")
    if options.warmup >= options.steps:
        raise UsageError(f"argument --warmup: {options.warmup} steps leave none of --steps {options.steps}")
    if options.gradient_correction and options.alpha == 0:
        raise UsageError("argument --alpha: --gradient-correction divides by it, it must not be 0")
    for name in ("checkpoint", "tokenizer"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            raise UsageError(f"argument --{name}: {folder} is not a folder")
    if options.text is not None and not options.text.is_file():
        raise UsageError(f"argument --text: {options.text} is not a file")
    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"argument --out: {options.out} is not a folder")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    before = signal.signal(signal.SIGINT, _leave_at_once)
    try:
        return run(options)
    except (DemoError, UsageError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{NAME}: {one_line(error)}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, UsageError) else FAILED
    finally:
        signal.signal(signal.SIGINT, before)


def _leave_at_once(*_: object) -> None:
    """Ctrl-C. Nothing on the disk needs to be put in order: checkpoints stand a kill."""
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.stderr.fileno(), INTERRUPTED_MESSAGE.encode())
    os._exit(INTERRUPTED)


def _end(code: int) -> NoReturn:
    """Under torchrun nothing is finalized: the threads of a process group live on after
    destroy_process_group (torch 2.13), and one that asks for the GIL meanwhile aborts its process.
    """
    if "RANK" in os.environ:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(options: Options) -> int:
    # Imported here, since they take seconds in which --help and wrong options should be answered.
    try:
        import torch

        from examples.llama import processes, text
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise DemoError(
            f"the package {package} is missing: install the examples' with `pip install -e '.[demo]'`"
        ) from error
    try:
        packed = text.pack(text.read(options.text), options.tokenizer, options.sequence, options.eval_rows)
    except DemoError as error:
        raise UsageError(str(error)) from error
    with processes.processes(options.device, options.tensor_parallel) as ours:
        if ours.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ours.count))
        return _train(options, packed, ours)


def _train(options: Options, packed: Any, ours: Any) -> int:
    import torch

    from examples.llama import checkpoints, loop, model
    from lorafa_kernels import save_adapter

    fixed = {**_fixed(options), "text_digest": packed.digest}
    folder = options.out / "checkpoints"
    found = None
    if ours.first:
        checkpoints.clear(folder)
        found = checkpoints.newest(folder)
    found = ours.told(found)
    if found is not None:
        _check_same(checkpoints.options_of(found), fixed, options.out)

    dtype = getattr(torch, options.dtype)
    try:
        adapted = model.build(
            options.size,
            options.checkpoint,
            vocabulary=packed.vocabulary,
            sequence=options.sequence,
            seed=options.seed,
            dtype=dtype,
            device=ours.device,
            shown=ours.first,
        )
    except DemoError as error:
        raise UsageError(str(error)) from error
    _adapt(adapted, options)
    if options.checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if ours.together:
        try:
            model.shard(adapted, ours, dtype)
        except ValueError as error:
            raise UsageError(f"argument --tensor-parallel: {error}") from error
    # Dropout draws from here, in each process its own.
    torch.manual_seed(options.seed + ours.rank)

    plan = loop.Plan(
        steps=options.steps,
        batch=options.batch,
        accumulate=options.accumulate,
        learning_rate=options.lr,
        warmup=options.warmup,
        clip=options.clip,
        evaluate=options.eval_every,
        save=options.save_every,
        seed=options.seed,
    )
    state = checkpoints.State(adapted, *loop.optimizer_of(adapted, plan), checkpoints.Progress())
    say = print if ours.first else _say_nothing
    if found is not None:
        same_random = checkpoints.load(state, found, ours)
        say(f"going on from step {state.progress.step}, {found}", flush=True)
        if options.dropout and not same_random:
            say("another number of processes wrote it: dropout draws anew", flush=True)
    say(_opening(options, packed, adapted, ours), flush=True)
    loop.train(state, packed, plan, ours, lambda: checkpoints.save(state, folder, fixed, ours))
    save_adapter(adapted, options.out / "adapter")
    if ours.first:
        _write_results(options, state.progress, ours)
    say(
        f"loss on held-out text {state.progress.evaluations[-1][1]:.4f}; adapter in {options.out / 'adapter'}"
    )
    return 0


def _adapt(base: Any, options: Options) -> None:
    from lorafa_kernels import LoRAFAConfig, apply_lorafa

    targets = options.targets
    try:
        config = LoRAFAConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            gradient_correction=options.gradient_correction,
            init_seed=options.seed,
        )
        apply_lorafa(base, config)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _fixed(options: Options) -> dict[str, Any]:
    """The options that decide what is computed, as JSON has them."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
        if name not in FREE
    }


def _check_same(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    """Raise UsageError if the checkpoint in `out` belongs to another training."""
    for name, value in new.items():
        if old.get(name) != value:
            what = f"--{name.replace('_', '-')} {old.get(name)}, not {value}"
            if name == "text_digest":
                what = "another text"
            raise UsageError(f"{out} holds a training with {what}: give another --out, or the same options")


def _say_nothing(*_: object, **__: object) -> None:
    pass


def _opening(options: Options, packed: Any, adapted: Any, ours: Any) -> str:
    trained = sum(one.numel() for one in adapted.parameters() if one.requires_grad)
    whole = sum(one.numel() for one in adapted.parameters())
    return (
        f"{options.checkpoint or options.size}, {options.dtype}: {trained:,} of {whole:,} parameters train; "
        f"{len(packed.train):,} rows of {options.sequence} tokens, {len(packed.held_out)} held out; "
        f"{ours.count} x {ours.device.type}{', FSDP2' if ours.together else ''}"
        f"{f', matrices split by {ours.split}' if ours.split > 1 else ''}"
    )


def _write_results(options: Options, progress: Any, ours: Any) -> None:
    import torch

    import lorafa_kernels

    content = {
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()},
        "processes": ours.count,
        "device": ours.device.type,
        "torch": torch.__version__,
        "lorafa_kernels": lorafa_kernels.__version__,
        "losses": progress.losses,
        "evaluations": progress.evaluations,
    }
    replace_file(options.out / "results.json", json.dumps(content, indent=1) + "\n")


def _number(least: float, below: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < below:
            limit = "" if math.isinf(below) else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"expected a number from {least:g} on{limit}, got {text!r}")
        return value

    return parse


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"expected a whole number below 2**31, got {text!r}")
    return int(text)


if __name__ == "__main__":
    _end(exit_code(NAME, main))
