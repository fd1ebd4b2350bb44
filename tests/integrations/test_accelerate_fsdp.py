"""Accelerate's FSDP2 plug-in, as `accelerate launch` with fsdp_version=2 makes it, on two processes.

Accelerate takes the plug-in on GPUs alone: the test tells it that the engine is FSDP, the rest is its own.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_same
from processes import start

from lorafa_kernels import LoRAFAConfig, apply_lorafa, load_adapter, lorafa_state_dict, save_adapter
from lorafa_kernels.integrations.peft import accelerate_peft

accelerate = pytest.importorskip("accelerate", reason="the plug-in is Accelerate's")
peft = pytest.importorskip("peft", reason="one of the models is PEFT's")
beds = pytest.importorskip("peft_beds", reason="the models are transformers' and PEFT's")

WORLD, STEPS = 2, 5
# What another order of fp32 sums may change.
LARGEST = 1e-6


def build(way: str) -> torch.nn.Module:
    """The same values each time."""
    if way == "PEFT":
        model = peft.get_peft_model(beds.base("llama"), beds.config())
        beds.draw(model)
        return accelerate_peft(model).train()
    config = LoRAFAConfig(r=4, target_modules="all-linear", init_lora_weights=False, init_seed=3)
    return apply_lorafa(beds.base("llama"), config).train()


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def step(model, optimizer, rows, backward) -> float:
    loss = model(input_ids=rows, labels=rows).loss
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def batch() -> torch.Tensor:
    return torch.randint(3, beds.VOCABULARY, (2 * WORLD, 12), generator=torch.Generator().manual_seed(1))


def accelerator(checkpointing: bool):
    """An Accelerator of two processes on a CPU, with the defaults of `accelerate config` for FSDP2."""
    state = accelerate.state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=True,
        activation_checkpointing=checkpointing,
    )
    made = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    for shared in (state.PartialState._shared_state, state.AcceleratorState._shared_state):
        shared["distributed_type"] = accelerate.DistributedType.FSDP
    state.AcceleratorState._shared_state["fsdp_plugin"] = plugin
    assert made.is_fsdp2
    return made


def _train(rank: int, world: int, folder: str, way: str, checkpointing: bool) -> dict:
    runs = accelerator(checkpointing)
    model = build(way)
    model, optimizer = runs.prepare(model, optimizer_of(model))
    assert all(isinstance(p, dist.tensor.DTensor) for p in model.parameters())
    rows = batch()[rank * 2 : rank * 2 + 2]
    losses = []
    for number in range(STEPS):
        if number == 2:
            runs.save_state(f"{folder}/{way}/state")
        losses.append(step(model, optimizer, rows, runs.backward))
    runs.load_state(f"{folder}/{way}/state")
    again = [step(model, optimizer, rows, runs.backward) for _ in range(2, STEPS)]
    thawed = [n for n, p in model.named_parameters() if "lora_A" in n and p.requires_grad]
    core = runs.unwrap_model(model)
    if way == "apply_lorafa":
        save_adapter(core, f"{folder}/{way}/adapter")
    else:
        whole = runs.get_state_dict(model)
        if runs.is_main_process:
            core.save_pretrained(f"{folder}/{way}/adapter", state_dict=whole)
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    found = {"losses": (mean / world).tolist(), "as before": again == losses[2:], "thawed": thawed}
    lora = {_name(n): p.full_tensor().detach() for n, p in core.named_parameters() if "lora_" in n}
    return found | {"lora": lora}


def _name(name: str) -> str:
    return beds.plain_name(name.replace("_checkpoint_wrapped_module.", ""))


def _worker(rank: int, world: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    found = {
        way: _train(rank, world, folder, way, checkpointing)
        for way, checkpointing in (("apply_lorafa", True), ("PEFT", False))
    }
    if rank == 0:
        torch.save(found, f"{folder}/result")


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_train_as_one_and_go_on_from_a_state(tmp_path):
    start(_worker, WORLD, tmp_path)
    for way, got in torch.load(tmp_path / "result").items():
        assert got["as before"] and not got["thawed"], way
        model = build(way)
        optimizer = optimizer_of(model)
        want = [step(model, optimizer, batch(), torch.Tensor.backward) for _ in range(STEPS)]
        assert want[-1] < want[0] and len(got["losses"]) == STEPS
        worst = max(abs(one - other) / other for one, other in zip(got["losses"], want, strict=True))
        assert worst <= LARGEST, f"{way}: {worst:.1e}"
        held = lorafa_state_dict(load_adapter(beds.base("llama"), tmp_path / way / "adapter"))
        assert_same({_name(name).removesuffix(".weight"): t for name, t in held.items()}, got["lora"])
