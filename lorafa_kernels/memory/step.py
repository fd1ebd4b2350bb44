"""One training step of a model on fake tensors: what it keeps, its peak, and of what that consists.

The step is forward, backward and the optimizer's step, as after the first one: the optimizer's states are
there. Without gradients of an earlier step (zero_grad sets them to None).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from ..dispatch import only_looked_on
from . import corrections, cpu, layers, methods
from .layers import AFTER, BACKWARD, FORWARD, Layer, Stacks
from .methods import Adapters, Method
from .models import Subject
from .trace import (
    ADAPTERS,
    FIXED,
    GRADIENTS,
    INPUTS,
    KEPT,
    LOSS,
    OPTIMIZER,
    WEIGHTS,
    LiveStorages,
    Segment,
    tensors_of,
)

_START, _LOSS_MADE, _BACKWARD, _OPTIMIZER = "start", "loss made", "backward", "optimizer"
_TAG = "lorafa_planned"


class CannotRun(RuntimeError):
    """A model that does not run on fake tensors; the message names the operation that stopped it."""


@dataclass(frozen=True)
class Setting:
    """What a plan is for: sizes of a step, what is adapted and how it runs.

    batch, sequence: of a step. rank: of the adapters. dtype: of the model. targets: as target_modules of
    LoRAFAConfig. optimizer: one of methods.OPTIMIZERS. device: "cuda" (CUDA's rules, corrections.py) or
    "cpu". adapter_dtype: of what is trained; None: the model's. checkpointing: of every layer. dropout: of
    the adapters. devices: how many share parameters, gradients and states (FSDP).
    """

    batch: int = 1
    sequence: int = 2048
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    targets: str | tuple[str, ...] = "all-linear"
    optimizer: str = "adamw"
    device: str = "cuda"
    adapter_dtype: torch.dtype | None = torch.float32
    checkpointing: bool = False
    dropout: float = 0.0
    devices: int = 1


@dataclass(frozen=True)
class Estimate:
    """What a step takes, in bytes.

    kept: what forward leaves for backward, without the loss's value. peak: the most that is allocated beyond
    what was there before the step. total: the most that is allocated at all, weights, adapters and
    optimizer's states included. kinds: of what the total consists, at that moment. fixed: what is there
    before the step.
    """

    kept: int
    peak: int
    total: int
    fixed: int
    kinds: Mapping[str, int]


@dataclass
class _Run:
    """What one number of layers gives."""

    segments: Mapping[Hashable, Segment]
    kept: int
    kinds: Mapping[str, int]
    largest_layer: int = 0


@dataclass
class Planner:
    """Plans of one subject. Models are copied once for each method and number of layers.

    whole: run all layers, instead of few of each kind.
    """

    subject: Subject
    setting: Setting
    whole: bool = False
    _models: dict = field(default_factory=dict)
    _template: nn.Module | None = None
    _stacks: Stacks | None = None

    def template(self) -> nn.Module:
        """The model without values, with its adapted layers marked."""
        if self._template is None:
            model = self.subject.build(self.setting.dtype)
            with FakeTensorMode(allow_non_fake_inputs=False):
                model = layers.fake_copy(model, frozenset(), Stacks.none())
            self.names = methods.adapted_names(model, self.setting.targets)
            for name in self.names:
                setattr(model.get_submodule(name), _TAG, True)
            self._template = model
            self._stacks = Stacks.none() if self.whole else Stacks.of(model)
        return self._template

    def estimate(self, method: Method, **changed) -> Estimate:
        """Return what a step takes with `method`; changed: fields of the setting that differ.

        Raises CannotRun for a model that does not run on fake tensors.
        """
        setting = replace(self.setting, **changed)
        self.template()
        try:
            return self._estimate(method, setting)
        except (CannotRun, layers.Unlike):
            if not self._stacks.sizes:
                raise
        # A model may ask for its layers by number, or treat them unlike: all of them, then.
        self._stacks = Stacks.none()
        self.forget()
        return self._estimate(method, setting)

    def _estimate(self, method: Method, setting: Setting) -> Estimate:
        smallest, kinds = self._stacks.smallest, self._stacks.repeated
        first = self._run(method, setting, smallest)
        further = {kind: self._run(method, setting, smallest | {kind.added}) for kind in kinds}
        segments = layers.extrapolate(first.segments, {kind: run.segments for kind, run in further.items()})

        def whole(of) -> int:
            return of(first) + sum(kind.more * (of(run) - of(first)) for kind, run in further.items())

        kept = whole(lambda run: run.kept)
        fixed = {kind: whole(lambda run, kind=kind: run.kinds[kind]) for kind in FIXED}
        largest = max(run.largest_layer for run in (first, *further.values()))
        return _estimate_of(setting, kept, fixed, segments, largest)

    def forget(self) -> None:
        """Let go of the models that were copied."""
        self._models.clear()

    def _run(self, method: Method, setting: Setting, chosen: frozenset[Layer]) -> _Run:
        if (method.key, chosen) not in self._models:
            self._models[method.key, chosen] = _Model(self, method, chosen)
        return self._models[method.key, chosen].run(self.subject, setting)


class _Model:
    """A copy of the subject's model with few layers, adapted by a method, and its optimizer."""

    def __init__(self, planner: Planner, method: Method, chosen: frozenset[Layer]) -> None:
        setting = planner.setting
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.method = method
        self._checkpoints = False
        with self.mode, torch.device("cpu"):
            model = layers.fake_copy(planner.template(), chosen, planner._stacks)
            names = tuple(name for name, module in model.named_modules() if vars(module).get(_TAG))
            adapters = Adapters(names, setting.rank, 0.0, setting.adapter_dtype)
            if method.has_adapters and not names:
                raise ValueError("the layers of the plan have no adapter")
            method.adapt(model, adapters)
            self.model = model.train()
            self.layers = layers.layers_in(model, chosen, planner._stacks)
            self.trained = [p for p in model.parameters() if p.requires_grad]
            self.optimizer = methods.make_optimizer(setting.optimizer, self.trained, setting.device)
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def run(self, subject: Subject, setting: Setting) -> _Run:
        """Trace one step."""
        methods.set_dropout(self.model, setting.dropout)
        self._checkpoint(setting.checkpointing)
        cuda = setting.device == "cuda"
        rules = corrections if cuda else cpu
        live = LiveStorages(rules.temporaries(), corrections.CUDA_GRANULE if cuda else 1)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                contexts = (
                    corrections.cuda_rules() if cuda else cpu.generator_state(),
                    self.mode,
                    torch.device("cpu"),
                    only_looked_on(operators=cuda),
                )
                for context in contexts:
                    stack.enter_context(context)
                self._step(subject, setting, live)
        except Exception as error:
            where = f"stopped at {live.stopped_at}: " if live.stopped_at else ""
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CannotRun(f"the model does not run on fake tensors: {where}{reason}") from error
        finally:
            self.optimizer.zero_grad()
        kinds = {kind: live.bytes_at(_START, (kind,)) for kind in FIXED}
        kept = live.bytes_at(_LOSS_MADE, (KEPT, LOSS))
        largest = max((_bytes(layer) for layer in self.layers.values()), default=0)
        return _Run(live.segments(), kept, kinds, largest)

    def _checkpoint(self, wanted: bool) -> None:
        if wanted == self._checkpoints:
            return
        with warnings.catch_warnings():
            # A later transformers gives these another name.
            warnings.simplefilter("ignore")
            if wanted:
                options = {"use_reentrant": False}
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            else:
                self.model.gradient_checkpointing_disable()
        self._checkpoints = wanted

    def _step(self, subject: Subject, setting: Setting, live: LiveStorages) -> None:
        model = self.model
        inputs = subject.inputs(model, setting.batch, setting.sequence)
        self._add_fixed(live, inputs)
        hooks = _Hooks(model, self.layers, live)
        live.mark(_START)
        with live:
            loss = subject.step(model, inputs)
            hooks.forward_ends()
            live.name(loss, LOSS)
            live.mark(_LOSS_MADE)
            loss.backward()
            del loss
            for parameter in self.trained:
                if parameter.grad is not None:
                    live.name(parameter.grad, GRADIENTS)
            live.kind = None
            live.mark(_OPTIMIZER)
            self.optimizer.step()
            self.optimizer.zero_grad()
        hooks.remove()
        live.settle(_LOSS_MADE)

    def _add_fixed(self, live: LiveStorages, inputs) -> None:
        is_adapter = self.method.has_adapters
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            adapter = is_adapter and name.rpartition(".")[2] in ("lora_A", "lora_B")
            live.add(tensor, ADAPTERS if adapter else WEIGHTS)
        for tensor in tensors_of(self.optimizer):
            live.add(tensor, OPTIMIZER)
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                live.add(leaf, INPUTS)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in module.parameters())


class _Hooks:
    """Marks where each layer begins and ends, forward and backward, and what is of logits and loss."""

    def __init__(self, model: nn.Module, layers: Mapping[Layer, nn.Module], live: LiveStorages) -> None:
        self._live, self._forward = live, True
        self._handles = []
        for layer, module in layers.items():
            self._handles += [
                module.register_forward_pre_hook(partial(self._begin, layer)),
                module.register_forward_hook(partial(self._end, layer)),
            ]
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is not None:
            self._handles.append(head.register_forward_pre_hook(self._head))

    def _begin(self, layer: Layer, module: nn.Module, args: tuple) -> None:
        if self._forward:
            self._live.mark((FORWARD, layer))

    def _end(self, layer: Layer, module: nn.Module, args: tuple, output) -> None:
        # A checkpoint runs it again in backward.
        if not self._forward:
            return
        self._live.mark((AFTER, layer))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda grad: self._live.mark((BACKWARD, layer)))
                return

    def _head(self, module: nn.Module, args: tuple) -> None:
        if self._forward:
            self._live.kind = LOSS
            if isinstance(args[0], Tensor) and args[0].requires_grad:
                args[0].register_hook(self._head_ends)

    def _head_ends(self, grad: Tensor) -> None:
        self._live.kind = None

    def forward_ends(self) -> None:
        self._forward = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _estimate_of(
    setting: Setting,
    kept: int,
    fixed: Mapping[str, int],
    segments: Mapping[Hashable, Segment],
    largest_layer: int,
) -> Estimate:
    workspace = corrections.CUDA_WORKSPACE if setting.device == "cuda" else 0
    n = setting.devices
    shared = (WEIGHTS, ADAPTERS, OPTIMIZER, GRADIENTS)
    # The layer that computes and the next one are gathered whole.
    gathered = 2 * largest_layer if n > 1 else 0

    def own(kinds: Mapping[str, int]) -> dict[str, int]:
        return {kind: -(-size // n) if kind in shared else size for kind, size in kinds.items()}

    before = sum(own(fixed).values())
    worst = max((own(segment.kinds) for segment in segments.values()), key=lambda kinds: sum(kinds.values()))
    worst["temporaries"] += workspace + gathered
    total = sum(worst.values())
    return Estimate(kept, total - before, total, before, worst)
