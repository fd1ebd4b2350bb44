"""The command `memory`: what a training step takes, with every method of fine-tuning, from a model's
configuration alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..command_line import USAGE_ERROR, brief, count, one_line
from .named import NAMED

MOST_GIB = 1 << 30
# transformers asks a hub for nothing that the planner needs.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


def add_command(subparsers) -> None:
    """Add the command `memory` to argparse's `subparsers`, and `plan`, which was its name until 0.1."""
    text = (
        "Say what memory a training step takes, with full fine-tuning, LoRA and LoRA-FA side by side, and "
        "what fits. The step (forward, backward, optimizer) runs once on tensors without values: no GPU, no "
        "weights, seconds. MODEL: a config.json of transformers or its folder; one of "
        f"{', '.join(NAMED)}; or a config class of transformers. Names and classes take sizes: "
        "llama-3-8b:num_hidden_layers=16. A config.json without `architectures` is taken as a causal "
        "language model, else sequence to sequence, else a classifier, else the base model."
    )
    parser = subparsers.add_parser(
        "memory", help="say what memory a training step takes, and what fits", description=text
    )
    _add_arguments(parser)
    parser.set_defaults(run=run)
    old = subparsers.add_parser("plan", description=f"{text} `plan` is the old name of `memory`.")
    _add_arguments(old)
    old.set_defaults(run=_run_by_old_name)


def _run_by_old_name(options: argparse.Namespace) -> int:
    print("plan is now called memory; the next release removes the old name", file=sys.stderr)
    return run(options)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a config.json, its folder, or a model's name")
    add("--batch", type=count, default=1, metavar="N", help="sequences per step (default: 1)")
    add(
        "--sequence",
        type=count,
        default=None,
        metavar="N",
        help="tokens per sequence, of the decoder for Whisper; images ignore it (default: 2048, or as many "
        "as the model has positions)",
    )
    add("--rank", type=count, default=16, metavar="R", help="rank of the adapters (default: 16)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the model (default: bf16)")
    add(
        "--memory",
        type=_gib,
        metavar="GIB",
        help="also solve for the largest batch and the longest sequence that fit (default: do not)",
    )
    add(
        "--targets",
        default="all-linear",
        metavar="NAMES",
        help="layers that are adapted, their names with commas between (default: all-linear)",
    )
    add(
        "--methods",
        default=None,
        metavar="KEYS",
        help="some of full,peft,lora,lorafa-plain,lorafa,lorafa-nf4 (default: all)",
    )
    add("--padding", action="store_true", help="sequences have padding, and so a mask")
    add(
        "--dropout",
        type=_share,
        default=0.05,
        metavar="P",
        help="of the adapters, in the columns with dropout; 0: no such columns (default: 0.05)",
    )
    add(
        "--optimizer",
        choices=("adamw", "adamw-8bit", "sgd"),
        default="adamw",
        help="(default: adamw)",
    )
    add(
        "--adapter-dtype",
        choices=("fp32", "model"),
        default="fp32",
        help="of what is trained, for all methods but LoRA in the model's dtype (default: fp32)",
    )
    add(
        "--devices",
        type=count,
        default=1,
        metavar="N",
        help="devices that share the model by FSDP (default: 1)",
    )
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="whose rules hold for dropout, attention, optimizer and allocator (default: cuda)",
    )
    add("--json", action="store_true", help="print JSON and nothing else")
    add(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="also draw the parts as bars, which needs matplotlib (default: do not)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the plan; return 0, or 2 where the model or an option is none that can be planned."""
    try:
        with _offline():
            text = _planned(options)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        # str() of an OSError would repeat the file's name.
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        where = _shown_path(options.model)
        print(one_line(f"memory: {where}: {_first_line(text)}"), file=sys.stderr)
        return USAGE_ERROR
    print(text)
    return 0


def _first_line(text: object) -> str:
    lines = str(text).strip().splitlines() or [type(text).__name__]
    return lines[0] if len(lines[0]) <= 600 else f"{lines[0][:600]}..."


def _shown_path(model: str) -> str:
    path = Path(model)
    with contextlib.suppress(OSError, ValueError):
        if path.is_dir():
            path = path / "config.json"
    text = str(path)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _planned(options: argparse.Namespace) -> str:
    # Here: the other commands need neither transformers nor these.
    from .models import resolve
    from .plan import plan_memory
    from .report import lines_of

    subject = resolve(options.model, padding=options.padding)
    sequence = options.sequence or min(2048, subject.most_tokens or 2048)
    targets = options.targets if options.targets == "all-linear" else options.targets.split(",")
    plan = plan_memory(
        subject,
        batch=options.batch,
        sequence=sequence,
        rank=options.rank,
        dtype=options.dtype,
        targets=targets,
        methods=None if options.methods is None else options.methods.split(","),
        dropout=options.dropout,
        optimizer=options.optimizer,
        adapter_dtype=options.adapter_dtype,
        device=options.device,
        devices=options.devices,
        memory=options.memory,
        told=_progress(),
    )
    if options.plot is not None:
        from .plot import save_plot

        save_plot(plan, options.plot)
    return json.dumps(plan.as_record(), indent=2) if options.json else "\n".join(lines_of(plan))


def _progress() -> Callable[[str], None]:
    """What says on a terminal how far it is, and nothing where errors go to a file."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\x1b[K{text} ...", end="\r\x1b[K", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Without the hub, and without remarks of torch on operations that have no values."""
    before = {name: os.environ.get(name) for name in _OFFLINE}
    os.environ.update(_OFFLINE)
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{brief(text)} is not a number in [0, 1)")
    return value


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST_GIB:
        raise argparse.ArgumentTypeError(f"{brief(text)} is not a number of GiB above 0, at most {MOST_GIB}")
    return value
