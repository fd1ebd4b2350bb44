"""Accelerate on models of apply_lorafa, on one process and on two: prepare, accumulate, clip_grad_norm_, and
states that are the adapter.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import processes
import pytest
import torch
from accuracy import assert_same

from lorafa_kernels import LoRAFAConfig, apply_lorafa, load_adapter, lorafa_state_dict, unload_adapter
from lorafa_kernels.integrations.accelerate import adapter_states
from lorafa_kernels.integrations.transformers import adapter_checkpoints

accelerate = pytest.importorskip("accelerate", reason="the states are its")
transformers = pytest.importorskip("transformers", reason="the models are transformers'")
peft = pytest.importorskip("peft", reason="its losses are compared")
beds = pytest.importorskip("peft_beds")
loop = pytest.importorskip("examples.accelerate_loop")

pytestmark = pytest.mark.filterwarnings("ignore")
# Relative difference of the losses of 20 steps in fp32 that users are promised.
PROMISED = 1e-5
# Of a step on two processes from one on one (fp32).
TWO = 1e-6


def adapted(seed=0, **fields):
    base = loop.tiny_llama()
    torch.manual_seed(seed)
    return apply_lorafa(base, LoRAFAConfig(**{"r": 4, "target_modules": "all-linear"} | fields))


@pytest.fixture(autouse=True)
def no_state_is_left():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(*models):
    accelerator = adapter_states(accelerate.Accelerator(cpu=True))
    return accelerator, [accelerator.prepare(model) for model in models]


@pytest.mark.slow
@pytest.mark.numerics
def test_a_resumed_loop_has_the_bits_of_one_that_was_not_interrupted(tmp_path):
    def run(out, steps, *, seed=0, resume=False):
        model = adapted(seed, lora_dropout=0.1)
        return loop.train(model, tmp_path / out, steps, resume), lorafa_state_dict(model)

    whole = run("whole", 10)
    run("cut", 5)
    (tmp_path / "cut" / "state.part").mkdir()
    resumed = run("cut", 10, seed=9, resume=True)
    assert resumed[0] == whole[0] and len(whole[0]) == 10
    assert_same(resumed[1], whole[1])
    state = tmp_path / "whole" / "state-2"
    names = {path.name for path in state.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.bin"} <= names
    assert not [name for name in names if name.startswith(("model", "pytorch_model"))]
    assert_same(lorafa_state_dict(load_adapter(loop.tiny_llama(), state)), whole[1])
    with pytest.raises(SystemExit, match="leave out --resume"):
        run("nothing", 5, resume=True)


@pytest.mark.slow
@pytest.mark.numerics
def test_losses_are_those_of_peft_with_lora_A_frozen(tmp_path):
    model = adapted()
    theirs = beds.twin(model, loop.tiny_llama())
    found = [loop.train(model, tmp_path / "ours", 20, False)]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("adapter_states", "save_adapter"):
            patch.setattr(loop, name, lambda first, *rest: first)
        found.append(loop.train(theirs, tmp_path / "theirs", 20, False))
    assert len(found[0]) == 20 and found[0][-1] < found[0][0]
    assert max(abs(a - b) / b for a, b in zip(*found, strict=True)) <= PROMISED


def test_several_models_and_states_that_were_written_whole(tmp_path):
    first, other, second = adapted(modules_to_save=["lm_head"]), torch.nn.Linear(3, 3), adapted(seed=1)
    accelerator, models = prepared(first, other, second)
    assert adapter_states(accelerator) is accelerator
    accelerator.save_state(str(tmp_path / "state"))
    assert {p.name for p in (tmp_path / "state").glob("*model*")} == {
        "adapter_model.safetensors",
        "model.safetensors",
    }
    assert (tmp_path / "state" / "adapter_2" / "adapter_model.safetensors").exists()
    wanted = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
    accelerator.load_state(str(tmp_path / "state"))
    for model, values in zip(models, wanted, strict=True):
        assert_same(dict(model.state_dict()), values)

    whole = accelerate.Accelerator(cpu=True)
    whole.prepare(first)
    whole.save_state(str(tmp_path / "whole"))
    assert (tmp_path / "whole" / "model.safetensors").exists()
    accelerator, (fresh,) = prepared(adapted(seed=7, modules_to_save=["lm_head"]))
    accelerator.load_state(str(tmp_path / "whole"))
    assert_same(lorafa_state_dict(fresh), lorafa_state_dict(first))

    state = tmp_path / "both"
    accelerator.save_state(str(state))
    whole.save_state(str(state))
    with pytest.raises(ValueError, match=r"holds both an adapter and model\.safetensors, a whole model"):
        accelerator.load_state(str(state))
    accelerator.save_state(str(state))
    assert not list(state.glob("model*"))
    accelerator.load_state(str(state))


def test_what_has_no_adapter_to_save_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"must be an accelerate\.Accelerator, got Linear"):
        adapter_states(torch.nn.Linear(2, 2))
    accelerator, (model,) = prepared(adapted())
    accelerator.save_state(str(tmp_path / "state"))
    with pytest.raises(FileNotFoundError, match=r"cannot go on from .*nothing_of_it.* is missing"):
        (tmp_path / "nothing_of_it").mkdir()
        accelerator.load_state(str(tmp_path / "nothing_of_it"))
    unload_adapter(model)
    with pytest.raises(ValueError, match="holds no LoRA-FA layer: call apply_lorafa"):
        accelerator.save_state(str(tmp_path / "none"))
    accelerator, _ = prepared(adapted(r=8))
    with pytest.raises(ValueError, match=r"cannot go on from .*r=8 in the model, r=4 in the file's config"):
        accelerator.load_state(str(tmp_path / "state"))
    accelerator, _ = prepared(peft.get_peft_model(loop.tiny_llama(), beds.config()))
    with pytest.raises(ValueError, match=r"the model is PEFT's.*leave out adapter_states"):
        accelerator.save_state(str(tmp_path / "theirs"))
    accelerator, _ = prepared(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no prepared model holds a LoRA-FA layer"):
        accelerator.save_state(str(tmp_path / "none"))
    sharded = accelerate.Accelerator(cpu=True)
    sharded.state.distributed_type = accelerate.DistributedType.FSDP
    with pytest.raises(ValueError, match=r"under FSDP Accelerate's states .*call save_adapter"):
        adapter_states(sharded)


def trainer(folder, model, **fields):
    options = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **fields,
    )
    return adapter_checkpoints(transformers.Trainer(model, options, train_dataset=loop.rows()))


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def worker(rank, world, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    model = adapted()
    whole = loop.train(model, Path(folder) / "loop", 10, False)
    if rank == 0:
        shutil.rmtree(Path(folder) / "loop" / "state-2")
    torch.distributed.barrier()
    again = adapted(seed=9)
    resumed = loop.train(again, Path(folder) / "loop", 10, True)
    assert resumed == whole, [a - b for a, b in zip(resumed, whole, strict=True)]
    assert_same(lorafa_state_dict(again), lorafa_state_dict(model))

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    done = trainer(f"{folder}/trainer", adapted(), per_device_train_batch_size=2)
    assert done.args.world_size == world
    done.train()
    torch.distributed.barrier()
    again = trainer(f"{folder}/trainer", adapted(seed=9), per_device_train_batch_size=2)
    again.train(resume_from_checkpoint=f"{folder}/trainer/checkpoint-2")
    assert losses(again) == losses(done)
    assert_same(lorafa_state_dict(again.model), lorafa_state_dict(done.model))
    if rank == 0:
        names = {path.name for path in Path(folder, "trainer", "checkpoint-2").iterdir()}
        assert "adapter_model.safetensors" in names and "model.safetensors" not in names
        Path(folder, "losses.json").write_text(json.dumps([whole, losses(done)]))


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_have_the_losses_of_one_and_resume(tmp_path):
    processes.start(worker, 2, tmp_path)
    looped, trained = json.loads((tmp_path / "losses.json").read_text())
    alone = loop.train(adapted(), tmp_path / "alone", 10, False)
    assert len(looped) == 10
    assert max(abs(a - b) / b for a, b in zip(looped, alone, strict=True)) <= TWO
    one = trainer(str(tmp_path / "one"), adapted(), per_device_train_batch_size=4)
    one.train()
    assert max(abs(a - b) / b for a, b in zip(trained, losses(one), strict=True)) <= TWO
