"""Tensor parallelism and FSDP in one process: compiled, copied, and errors that say what to do instead."""

from __future__ import annotations

import copy

import engine_runs as runs
import pytest
import torch
import torch.distributed as dist
from accuracy import assert_same, check_budget
from processes import group
from torch import nn

from lorafa_kernels import (
    LoRAFAConfig,
    LoRAFALinear,
    LoRAFALinearGroup,
    LoRAFASwiGLU,
    apply_lorafa,
    load_adapter,
    lorafa_parameters,
    merge_adapter,
    save_adapter,
    unload_adapter,
)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
WIDTH = runs.WIDTH


@pytest.fixture
def parallel(tmp_path):
    """The module under test, in a process group of one."""
    with group(0, 1, tmp_path):
        from lorafa_kernels.integrations import parallel

        yield parallel


@pytest.fixture
def mesh(parallel):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1,))


def split(module, mesh, plan):
    from torch.distributed.tensor.parallel import parallelize_module

    return parallelize_module(module, mesh, plan)


def layer(**options) -> LoRAFALinear:
    torch.manual_seed(0)
    return LoRAFALinear(WIDTH, WIDTH, r=2, init_lora_weights=False, **options)


def gradients(model: nn.Module, step=None, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    runs.loss_of(model if step is None else step, *runs.batch(dtype)).backward()
    return runs.gathered(list(lorafa_parameters(model)))


@pytest.mark.numerics
@pytest.mark.slow
def test_a_split_model_compiles_in_one_graph(parallel, mesh):
    def dB(dtype=torch.float32, split_and_compile=False):
        model = step = runs.build(dtype, plain=not split_and_compile, lora_dropout=0.5)
        if split_and_compile:
            split(model, mesh, parallel.llama_plan(model, mesh))
            step = torch.compile(model, backend="aot_eager", fullgraph=True)
        # One process draws the masks that a model alone draws.
        torch.manual_seed(1)
        return {"dB": torch.cat([grad.flatten() for grad in gradients(model, step, dtype)])}

    torch._dynamo.reset()
    check_budget(dB(split_and_compile=True), dB(torch.float64), dB())


@pytest.mark.numerics
def test_one_process_computes_what_a_layer_alone_computes(parallel, mesh, tmp_path):
    """Bit for bit, with gradients that are corrected, in a copy, and after loading."""
    # A bias of the second would be added after the sum over processes, with a rounding of its own.
    first, second = (layer(gradient_correction=True, bias=bias) for bias in (True, False))
    alone = nn.Sequential(first, nn.Tanh(), second)
    model = copy.deepcopy(alone)
    split(model, mesh, {"0": parallel.LoRAFAColwiseParallel(), "2": parallel.LoRAFARowwiseParallel()})
    x = torch.randn(5, WIDTH)

    def results(module):
        module.zero_grad()
        y = module(x)
        y.square().sum().backward()
        return [y.detach(), *runs.gathered(list(lorafa_parameters(module)))]

    want = results(alone)
    assert_same(results(model), want)
    assert_same(results(copy.deepcopy(model)), want)
    with torch.autocast("cpu", torch.bfloat16):
        low = results(alone)
        assert low[0].dtype == torch.bfloat16
        assert_same(results(model), low)
    with torch.no_grad():
        for one in alone:
            if isinstance(one, LoRAFALinear):
                one.lora_A.mul_(2)
    save_adapter(alone, tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    changed = results(alone)
    assert not torch.equal(changed[1], want[1])
    assert_same(results(model), changed)


@pytest.mark.numerics
def test_activations_kept_on_the_cpu():
    want = gradients(runs.build())
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(runs.build()), want)


@pytest.mark.numerics
def test_a_fused_layer_over_two_fsdp_groups_is_computed_in_parts(parallel):
    from torch.distributed.fsdp import fully_shard

    model = runs.build()
    for block in model.layers:
        fully_shard(block.mlp.gate_proj)
        fully_shard(block.self_attn.q_proj)
        fully_shard(block)
    fully_shard(model)
    torch.manual_seed(0)
    config = LoRAFAConfig(r=runs.RANK, target_modules=runs.TARGETS, init_lora_weights=False)
    assert_same(gradients(model), gradients(apply_lorafa(runs.Model(), config, fuse=False)))


def test_modules_that_are_one_layer_over_two_fsdp_groups_are_refused(parallel):
    from torch.distributed.fsdp import fully_shard

    linears = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    for module, member in (
        (LoRAFASwiGLU(WIDTH, 8), "gate_proj"),
        (LoRAFALinearGroup.from_linears({"q": linears[0], "k": linears[1]}), "q"),
    ):
        fully_shard(module.get_submodule(member))
        fully_shard(module)
        with pytest.raises(TypeError, match=r"weight is a DTensor.* must be wrapped as one"):
            module(torch.zeros(2, WIDTH))


def test_a_wrong_mesh_is_refused(parallel, mesh):
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    style = parallel.LoRAFAColwiseParallel()
    named = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    for wrong, hint in ((named, r"pass mesh\['tensor'\]"), (init_device_mesh("cpu", (1, 1)), "1-D part")):
        with pytest.raises(ValueError, match=rf"takes a 1-D mesh, got 2-D: .*{hint}"):
            split(layer(), wrong, style)
        with pytest.raises(ValueError, match="takes a 1-D mesh, got 2-D"):
            parallel.llama_plan(runs.build(), wrong)
    elsewhere = DeviceMesh("cuda", [0], _init_backend=False)
    with pytest.raises(ValueError, match=r"is on cpu, the mesh is one of cuda: .*init_device_mesh\('cpu'"):
        split(layer(), elsewhere, style)


def test_without_a_process_group_it_says_so(tmp_path):
    with group(0, 1, tmp_path):
        from torch.distributed.device_mesh import init_device_mesh

        from lorafa_kernels.integrations import parallel

        mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(RuntimeError, match="no process group: start the processes with torchrun"):
        split(layer(), mesh, parallel.LoRAFAColwiseParallel())
    with pytest.raises(RuntimeError, match="no process group"):
        parallel.llama_plan(runs.build(), mesh)


def test_what_cannot_be_split_is_refused(parallel, mesh, tmp_path):
    column, row = parallel.LoRAFAColwiseParallel, parallel.LoRAFARowwiseParallel
    swiglu = LoRAFASwiGLU(WIDTH, 8)
    with pytest.raises(TypeError, match="LoRAFASwiGLU computes its layers as one and cannot be split"):
        split(swiglu, mesh, column())
    split(swiglu, mesh, {"gate_proj": column()})
    with pytest.raises(TypeError, match="must be wrapped as one"):
        swiglu(torch.zeros(2, WIDTH))
    from lorafa_kernels.nn import LoRAFAQuantisedLinear, QuantisedLinear

    for kind in ("nf4", "int8"):
        frozen = QuantisedLinear.from_linear(nn.Linear(64, 8), kind)
        for quantised in (frozen, LoRAFAQuantisedLinear.from_linear(frozen)):
            for style in (column(), row()):
                with pytest.raises(TypeError, match="has a quantised base, which no style here splits"):
                    split(quantised, mesh, style)
    one = split(layer(), mesh, column())
    with pytest.raises(ValueError, match="weight is sharded already: call parallelize_module once"):
        split(one, mesh, row())
    merged = layer().eval()
    merged.merge()
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) before parallelize_module"):
        split(merged, mesh, row())
    with pytest.raises(ValueError, match="no module is called q_proj"):
        parallel.llama_plan(nn.Sequential(layer()), mesh)
    phi = nn.ModuleDict({"qkv_proj": nn.Linear(4, 12)})
    with pytest.raises(ValueError, match="qkv_proj joins several projections"):
        parallel.llama_plan(phi, mesh)


def test_sizes_that_a_mesh_cannot_divide_are_refused(parallel, monkeypatch, mesh):
    monkeypatch.setattr(type(mesh), "size", lambda self, mesh_dim=None: 3)
    with pytest.raises(ValueError, match=r"q_proj has out_features=16, which 3 processes cannot divide"):
        parallel.llama_plan(runs.build(), mesh)
    with pytest.raises(ValueError, match="in_features=16, which 3 processes cannot divide"):
        split(layer(), mesh, parallel.LoRAFARowwiseParallel())
    model = nn.Module()
    model.q_proj, model.config = nn.Linear(4, 12), type("Config", (), {"num_key_value_heads": 4})()
    with pytest.raises(ValueError, match="num_key_value_heads=4, which 3 processes cannot divide"):
        parallel.llama_plan(model, mesh)


def test_a_split_layer_keeps_its_promises(parallel, mesh):
    model = nn.Sequential(layer())
    split(model, mesh, {"0": parallel.LoRAFAColwiseParallel()})
    for change in (merge_adapter, unload_adapter):
        with pytest.raises(RuntimeError, match=r"its weight belongs to a device mesh .*Save the adapter"):
            change(model)
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="weight requires grad, but LoRA-FA keeps it frozen"):
        model(torch.zeros(2, WIDTH))
    plain = split(nn.Linear(4, 4), mesh, parallel.LoRAFAColwiseParallel())
    with pytest.raises(ValueError, match="weight is a DTensor: adapt the model before it is sharded"):
        apply_lorafa(nn.Sequential(plain), LoRAFAConfig(target_modules=["0"]))


def test_torchs_styles_refuse_a_lorafa_layer(parallel, mesh):
    """Torch's own error, before anything is sharded; a layer that torch has replicated says what to use."""
    from torch.distributed.tensor import distribute_module
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    for style in (ColwiseParallel(), RowwiseParallel()):
        one = layer()
        with pytest.raises(NotImplementedError, match=r"only support nn\.Linear"):
            split(one, mesh, style)
        assert type(one.weight) is nn.Parameter
    distribute_module(one, mesh)
    with pytest.raises(TypeError, match=r"styles of lorafa_kernels\.integrations\.parallel"):
        one(torch.zeros(2, WIDTH))


def test_fsdp1_refuses_what_was_thawed_and_flat_parameters_alone(parallel):
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrapped(model, use_orig_params):
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=cpu)

    for name in ("weight", "lora_A", "bias"):
        model = runs.build()
        model.layers[1].self_attn.o_proj.get_parameter(name).requires_grad_(True)
        with pytest.raises(ValueError, match=f"{name} requires grad, but LoRA-FA keeps it frozen"):
            wrapped(model, True)(runs.batch()[0])
    with pytest.raises(ValueError, match=r"uniform `requires_grad` when `use_orig_params=False`"):
        wrapped(runs.build(), False)


def test_trainers_of_a_split_model_are_refused(parallel, mesh, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the Trainer is transformers'")
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    from lorafa_kernels.integrations.transformers import adapter_checkpoints

    model = runs.build()
    split(model, mesh, parallel.llama_plan(model, mesh))
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=r"is split over processes already .*a loop of your own"):
        adapter_checkpoints(transformers.Trainer(model, arguments))
