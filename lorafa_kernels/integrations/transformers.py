"""Trainer's checkpoints of a model that apply_lorafa has adapted: the adapter alone, and resuming from it.

    trainer = adapter_checkpoints(Trainer(model, ...))         any Trainer, TRL's too, in place
    class MyTrainer(AdapterCheckpoints, SFTTrainer): ...       the same as a class

A TrainerCallback could not do it: Trainer tells callbacks of a checkpoint after it was written, and does not
tell them when it reads one. transformers is imported where a function needs it.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import read_json
from ..model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from ..model.names import unwrap
from .checkpoints import adapted, holds_adapter, read_adapter

# Trainer's names of what is in a checkpoint. The state is written last.
_STATE, _OPTIMIZER = "trainer_state.json", "optimizer.pt"
_WHOLE, _WHOLE_INDEX = "model.safetensors", "model.safetensors.index.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")
# It has the log of the whole training.
_LARGEST_STATE = 1 << 30
_HOW = "adapter_checkpoints"


def adapter_checkpoints(trainer: Any) -> Any:
    """Let the checkpoints of `trainer` hold the adapter alone, in place; return `trainer`.

    trainer: a transformers.Trainer, or one of a class derived from it, such as TRL's SFTTrainer, whose model
    `apply_lorafa` has adapted. What it writes then, checkpoints and `save_model`, has the two files of
    `save_adapter` in the place of the model; `train(resume_from_checkpoint=...)` and load_best_model_at_end
    read them. The trainer's class becomes one that derives from `AdapterCheckpoints` and the one it has.

    Raises TypeError for what is no Trainer, and ValueError for a PeftModel, a model without LoRA-FA layers,
    one that is split over processes (tensor parallelism), parameters that require grad and are no part of the
    adapter, and under FSDP and DeepSpeed, which write checkpoints of their own.
    """
    import transformers

    if not isinstance(trainer, transformers.Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    if not isinstance(trainer, AdapterCheckpoints):
        _check(trainer)
        kind = type(trainer)
        trainer.__class__ = type(kind.__name__, (AdapterCheckpoints, kind), {"__module__": kind.__module__})
    _check(trainer)
    return trainer


class AdapterCheckpoints:
    """Base class to put before a Trainer's: what `adapter_checkpoints` gives an object."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does.

        resume_from_checkpoint: True goes on from the newest checkpoint in output_dir that was written to its
        end, with a warning for a newer one that was not. A folder is that checkpoint.

        Raises FileNotFoundError for a folder that is not there, ValueError for one that holds no adapter, no
        training or an unfinished one, or the adapter of another configuration; before any step.
        """
        _check(self)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _newest(Path(self.args.output_dir)) or True
        elif resume_from_checkpoint:
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            _check_finished(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        from transformers import PreTrainedModel

        _check(self)
        folder = self.args.output_dir if output_dir is None else output_dir
        core = unwrap(self.model)
        if self.args.should_save and _FOLDER.fullmatch(Path(folder).name):
            # Of an earlier training: until it is written anew the checkpoint is not whole.
            (Path(folder) / _STATE).unlink(missing_ok=True)
        if isinstance(core, PreTrainedModel):
            with _saving_adapter(core):
                super()._save(output_dir, state_dict)
        elif self.args.should_save:
            # Of other models Trainer writes the state dict.
            save_adapter(core, folder)
            # As Trainer, which looks there, too.
            tokenizer = self.processing_class
            if tokenizer is None:
                tokenizer = getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        core, folder = adapted(model, _HOW), Path(resume_from_checkpoint)
        if holds_adapter(folder):
            read_adapter(core, folder)
            return
        # Written without adapter_checkpoints.
        _check_whole(core, folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if holds_adapter(best):
            read_adapter(unwrap(self.model), best)
        else:
            super()._load_best_model()


def _check(trainer: Any) -> None:
    for engine, used in (("FSDP", trainer.is_fsdp_enabled), ("DeepSpeed", trainer.is_deepspeed_enabled)):
        if used:
            raise ValueError(
                f"under {engine} checkpoints are those of {engine}, of the whole model: leave out {_HOW} "
                "and call save_adapter(model, folder) at the end"
            )
    adapted(trainer.model, _HOW)


@contextlib.contextmanager
def _saving_adapter(model: nn.Module) -> Iterator[None]:
    """Within this context `model.save_pretrained(folder)` is save_adapter(model, folder)."""

    def save(folder: str | os.PathLike[str], **options: Any) -> None:
        save_adapter(model, folder)

    own, name = model.__dict__, "save_pretrained"
    before = own.get(name)
    own[name] = save
    try:
        yield
    finally:
        del own[name]
        if before is not None:
            own[name] = before


def _unfinished(folder: Path) -> str | None:
    """What is missing of a checkpoint that was interrupted while it was written, or None."""
    try:
        state = read_json(folder / _STATE, _LARGEST_STATE)
    except FileNotFoundError:
        return f"{_STATE} is missing"
    except (OSError, ValueError) as error:
        return f"{_STATE}: {error}"
    return None if isinstance(state, dict) else f"{_STATE} holds no JSON object"


def _newest(output: Path) -> str | None:
    """The finished checkpoint of the most steps in `output`; None if there is no checkpoint at all."""
    found = (
        [p for p in output.iterdir() if _FOLDER.fullmatch(p.name) and p.is_dir()] if output.is_dir() else []
    )
    for folder in sorted(found, key=lambda path: int(_FOLDER.fullmatch(path.name)[1]), reverse=True):
        if (missing := _unfinished(folder)) is None:
            return str(folder)
        warnings.warn(f"{folder} was interrupted while it was written ({missing}): left out", stacklevel=4)
    if found:
        raise ValueError(
            f"no checkpoint in {output} is finished: delete them and train without resume_from_checkpoint"
        )
    return None


def _check_finished(folder: Path) -> None:
    """Raise an error that says what to do unless `folder` is a checkpoint to resume from."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder: pass a checkpoint-<step> folder of output_dir, or True"
        )
    if not holds_adapter(folder) and not any((folder / n).exists() for n in (_WHOLE, _WHOLE_INDEX)):
        inner = [p.name for p in folder.iterdir() if _FOLDER.fullmatch(p.name)]
        advice = f"pass one of {', '.join(sorted(inner)[:4])} in it" if inner else "pass one that has them"
        raise ValueError(f"{folder} holds no adapter ({WEIGHTS_FILE}, {CONFIG_FILE}): {advice}")
    if (missing := _unfinished(folder)) is None:
        if not any(folder.glob(f"{_OPTIMIZER.partition('.')[0]}*")):
            warnings.warn(
                f"{folder} has no optimizer state (save_only_model=True): the optimizer starts anew, so the "
                "losses are not those of an uninterrupted training",
                stacklevel=3,
            )
        return
    if (folder / _OPTIMIZER).exists():
        raise ValueError(
            f"{folder} was interrupted while it was written ({missing}): resume from an earlier one, or "
            "with resume_from_checkpoint=True, which takes the newest one that is whole"
        )
    raise ValueError(
        f"{folder} holds an adapter and no training to go on with ({missing}): call load_adapter(model, "
        "folder) and train without resume_from_checkpoint"
    )


def _check_whole(model: nn.Module, folder: Path) -> None:
    """Raise ValueError if a checkpoint of a whole model in safetensors is not of this adapter: it lacks
    tensors of it, has others, or has them in other shapes.
    """
    if (shapes := _shapes_in(folder)) is None:
        return
    factors = {name: p.shape for name, p in model.named_parameters() if _is_factor(name)}
    if missing := [name for name in factors if name not in shapes]:
        raise ValueError(
            f"{folder} holds a whole model without {missing[0]}: it is no checkpoint of this adapter. Start "
            "without resume_from_checkpoint, with this model as the base"
        )
    advice = "adapt the model with the r and target_modules that it was trained with"
    if surplus := [name for name in shapes if _is_factor(name) and name not in factors]:
        raise ValueError(f"{folder} has {surplus[0]}, which the model has not: {advice}")
    for name, shape in factors.items():
        if tuple(shapes[name] or shape) != tuple(shape):
            raise ValueError(
                f"{folder} has {name} of shape {tuple(shapes[name])}, the model {tuple(shape)}: {advice}"
            )


def _is_factor(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


def _shapes_in(folder: Path) -> dict[str, Sequence[int] | None] | None:
    """{name: shape} of a whole model's tensors, None where it is not in safetensors; a model in several files
    tells names alone.
    """
    if (folder / _WHOLE).is_file():
        from safetensors import safe_open

        with safe_open(folder / _WHOLE, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    if (folder / _WHOLE_INDEX).is_file():
        return dict.fromkeys(read_json(folder / _WHOLE_INDEX)["weight_map"])
    return None
