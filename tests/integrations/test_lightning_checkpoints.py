"""Lightning on models of apply_lorafa: checkpoints without the frozen base, and resuming from them."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_same
from torch import nn

from lorafa_kernels import LoRAFAConfig, apply_lorafa, lorafa_state_dict, merge_adapter, unload_adapter
from lorafa_kernels.integrations.lightning import AdapterCheckpoints

lightning = pytest.importorskip("lightning", reason="the checkpoints are its")
peft = pytest.importorskip("peft", reason="its losses are compared")
beds = pytest.importorskip("peft_beds")
example = pytest.importorskip("examples.lightning_module")

pytestmark = pytest.mark.filterwarnings("ignore")
# Relative difference of the losses of 20 steps in fp32 that users are promised.
PROMISED = 1e-5


def module(seed=0, **fields):
    base = example.tiny_llama()
    torch.manual_seed(seed)
    config = LoRAFAConfig(**{"r": 4, "target_modules": "all-linear"} | fields)
    return example.Module(apply_lorafa(base, config))


@pytest.mark.slow
@pytest.mark.numerics
def test_a_resumed_training_has_the_bits_of_one_that_was_not_interrupted(tmp_path):
    whole, cut, resumed = module(), module(), module(seed=9)
    losses = example.train(whole, tmp_path / "whole", 20, False)
    example.train(cut, tmp_path / "cut", 10, False)
    assert example.train(resumed, tmp_path / "cut", 20, True) == losses[10:]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert_same(lorafa_state_dict(resumed.model), lorafa_state_dict(whole.model))

    state = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.rpartition(".")[2] for name in state} == {"lora_A", "lora_B"} and len(state) == 28
    fresh = example.Module.load_from_checkpoint(tmp_path / "whole" / "last.ckpt", model=module(seed=3).model)
    assert_same(lorafa_state_dict(fresh.model), lorafa_state_dict(whole.model))


@pytest.mark.slow
@pytest.mark.numerics
def test_losses_are_those_of_peft_with_lora_A_frozen(tmp_path):
    ours = module()

    class Theirs(lightning.LightningModule):
        training_step = example.Module.training_step
        configure_optimizers = example.Module.configure_optimizers

        def __init__(self):
            super().__init__()
            self.model, self.losses = beds.twin(ours.model, example.tiny_llama()), []

    found = [example.train(one, tmp_path / type(one).__name__, 20, False) for one in (Theirs(), ours)]
    assert len(found[0]) == 20
    assert max(abs(a - b) / b for a, b in zip(*found, strict=True)) <= PROMISED


@pytest.mark.slow
def test_pytorch_lightning_and_its_mixed_precision(tmp_path):
    package = pytest.importorskip("pytorch_lightning", reason="the same library under its other name")

    class Module(AdapterCheckpoints, package.LightningModule):
        training_step = example.Module.training_step
        configure_optimizers = example.Module.configure_optimizers

        def __init__(self, seed):
            super().__init__()
            self.model, self.losses = module(seed).model, []

    loader = example.DataLoader(example.rows(), batch_size=20, collate_fn=example.batch_of)

    def fit(seed, epochs, **resumed):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = package.Trainer(
            default_root_dir=tmp_path, max_epochs=epochs, accelerator="cpu", precision="bf16-mixed", **quiet
        )
        one = Module(seed)
        trainer.fit(one, loader, **resumed)
        return one

    whole = fit(0, 2)
    first = tmp_path / "checkpoints" / "epoch=0-step=2.ckpt"
    fit(0, 1)
    resumed = fit(9, 2, ckpt_path=first)
    assert resumed.losses == whole.losses[2:] and len(whole.losses) == 4
    assert_same(lorafa_state_dict(resumed.model), lorafa_state_dict(whole.model))


def saved(one):
    checkpoint = {"state_dict": one.state_dict()}
    one.on_save_checkpoint(checkpoint)
    return checkpoint


class Around(AdapterCheckpoints, lightning.LightningModule):
    """An adapted model, and beside it a frozen layer and a buffer, which no adapter's file would have."""

    def __init__(self, seed=0, **fields):
        super().__init__()
        torch.manual_seed(seed)
        inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.LayerNorm(4))
        config = LoRAFAConfig(**{"r": 2, "target_modules": ["0"], "modules_to_save": ["1"]} | fields)
        self.inner = apply_lorafa(inner, config)
        self.inner[3].weight.requires_grad_(True)
        self.teacher = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("seen", torch.tensor(float(seed)))


def test_only_the_frozen_base_is_left_out():
    one, other = Around(seed=1), Around(seed=2)
    checkpoint = saved(one)
    norm = {f"inner.1.{name}" for name in one.inner[1].state_dict()}
    assert len(norm) == 5
    assert set(checkpoint["state_dict"]) == norm | {
        "inner.0.lora_A",
        "inner.0.lora_B",
        "inner.3.weight",
        "teacher.weight",
        "teacher.bias",
        "seen",
    }
    base = other.inner[0].weight.clone()
    read = dict(checkpoint)
    other.on_load_checkpoint(read)
    other.load_state_dict(read["state_dict"])
    assert_same(saved(other)["state_dict"], checkpoint["state_dict"])
    assert_same(other.inner[0].weight, base)
    assert {name for name in saved(Around(modules_to_save=None))["state_dict"] if "inner.1." in name} == {
        "inner.1.running_mean",
        "inner.1.running_var",
        "inner.1.num_batches_tracked",
    }
    # Written without the class.
    other.on_load_checkpoint({"state_dict": one.state_dict()})


FITS_NOT = {
    "rank": ({"r": 1}, r"has inner\.0\.lora_A of shape \(2, 4\), the module \(1, 4\): use the configuration"),
    "alpha": ({"lora_alpha": 3}, r"has scaling=4\.0 for inner\.0, the module 1\.5: use the lora_alpha"),
    "targets": ({"target_modules": ["2"]}, r"lacks inner\.2\.lora_A: it was written without this adapter"),
    "fewer": ({"target_modules": ["0", "2"]}, r"lacks inner\.2\.lora_A"),
}


@pytest.mark.parametrize("case", FITS_NOT)
def test_the_checkpoint_of_another_configuration_is_refused(case):
    fields, message = FITS_NOT[case]
    with pytest.raises(ValueError, match=message):
        Around(**fields).on_load_checkpoint(saved(Around()))


def test_what_has_no_adapter_to_save_is_refused():
    more = saved(Around(target_modules=["0", "2"]))
    with pytest.raises(ValueError, match=r"has inner\.2\.lora_A, which the module has not: use the target"):
        Around().on_load_checkpoint(more)
    one = Around()
    merge_adapter(one.inner.eval())
    with pytest.raises(RuntimeError, match=r"inner\.0 is merged"):
        saved(one)
    none = Around()
    unload_adapter(none.inner)
    with pytest.raises(ValueError, match="holds no LoRA-FA layer: call apply_lorafa"):
        saved(none)
    theirs = Around()
    theirs.inner = peft.get_peft_model(beds.base("llama"), beds.config())
    with pytest.raises(ValueError, match="holds a model of PEFT's: leave out AdapterCheckpoints"):
        saved(theirs)
