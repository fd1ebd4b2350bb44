"""Selective activation checkpointing that saves products gives the gradients of a model without it, through
every fused block of a whole model.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lorafa_kernels import LoRAFAConfig, apply_lorafa, lorafa_parameters

pytestmark = pytest.mark.numerics

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def policy(context, operator, *args, **kwargs):
    saved = operator in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def llama(dtype):
    transformers = pytest.importorskip("transformers", reason="the model is transformers'")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    config = LoRAFAConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    apply_lorafa(model, config)
    assert {block.kind for block in model.lorafa_report.blocks if block.fused} == {
        "MLP",
        "shared input",
        "norm",
    }
    return model


def gradients(model, step):
    torch.manual_seed(1)
    step().backward()
    return [parameter.grad for parameter in lorafa_parameters(model)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("allow", [False, True], ids=["mutation refused", "mutation allowed"])
def test_saved_products_give_the_same_gradients(dtype, allow):
    ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    plain, saving = llama(dtype), llama(dtype)
    wanted = gradients(plain, lambda: plain(ids, labels=ids).loss)
    contexts = functools.partial(
        create_selective_checkpoint_contexts, policy, allow_cache_entry_mutation=allow
    )
    got = gradients(
        saving,
        lambda: checkpoint(lambda: saving(ids, labels=ids).loss, use_reentrant=False, context_fn=contexts),
    )
    # The same operations on the same numbers, saved or computed twice.
    assert all(map(torch.equal, got, wanted))
