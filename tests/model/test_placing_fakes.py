"""Models without values: apply_lorafa adapts them, and their blocks compute as they do with values."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lorafa_kernels import LoRAFAConfig, apply_lorafa
from lorafa_kernels.dispatch import only_looked_on
from lorafa_kernels.engines import is_plain_parameter, is_plain_tensor

transformers = pytest.importorskip("transformers")
CONFIG = LoRAFAConfig(r=4, target_modules="all-linear")


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).train()


class Names(TorchDispatchMode):
    """Notes what is called of this library, and of products."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("place", ["meta", "fake"])
def test_a_model_without_values_is_adapted(place):
    context = torch.device("meta") if place == "meta" else FakeTensorMode()
    with context:
        model = apply_lorafa(llama(), CONFIG)
    fused = [block.kind for block in model.lorafa_report.blocks if block.fused]
    assert fused.count("MLP") == fused.count("shared input") == 2 and fused.count("norm") == 5


def nodes(context: contextlib.AbstractContextManager) -> list[str]:
    """Names of the autograd nodes of a step."""
    with context:
        model = apply_lorafa(llama(), CONFIG)
        tokens = torch.ones(2, 8, dtype=torch.long)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        found, waiting = [], [model(input_ids=tokens, labels=tokens, use_cache=False).loss.grad_fn]
        while waiting:
            node = waiting.pop()
            found.append(node.name())
            waiting += [n for n, _ in node.next_functions if n is not None]
    return found


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="torch 2.11 does not walk through nodes of a custom function",
)
def test_blocks_compute_on_fake_tensors_as_on_real_ones():
    real = set(nodes(contextlib.nullcontext()))
    assert {"LoRAFALinearGroupFunctionBackward", "LoRAFAGatedMLPFunctionBackward"} <= real
    assert set(nodes(FakeTensorMode())) >= {name for name in real if "LoRAFA" in name or "RMSNorm" in name}


class Foreign(torch.Tensor):
    """A subclass of somebody else's, of the same name as torch's."""


Foreign.__name__ = "FakeTensor"


def test_foreign_subclasses_are_not_taken_for_plain_ones():
    foreign = torch.zeros(2).as_subclass(Foreign)
    assert not is_plain_tensor(foreign) and not is_plain_parameter(nn.Parameter(foreign))
    assert is_plain_tensor(torch.zeros(2)) and is_plain_parameter(nn.Parameter(torch.zeros(2)))
    assert not is_plain_parameter(torch.zeros(2))
    with FakeTensorMode():
        fake = torch.zeros(2)
        assert is_plain_tensor(fake) and not is_plain_parameter(fake)
        assert is_plain_parameter(nn.Parameter(fake))


@pytest.mark.parametrize("operators", [False, True])
def test_a_mode_that_only_looks_on_changes_nothing(operators):
    model = apply_lorafa(llama(), CONFIG)
    tokens = torch.ones(2, 8, dtype=torch.long)
    with Names() as watched:
        model(input_ids=tokens, labels=tokens, use_cache=False)
    with Names() as looked_on, only_looked_on(operators):
        model(input_ids=tokens, labels=tokens, use_cache=False)
    ours = [name for name in looked_on.called if name.startswith("lorafa_kernels.")]
    assert bool(ours) == operators
    assert [name for name in watched.called if name.startswith("lorafa_kernels.")]
