"""lora_B's gradient is corrected as LoRA-FA's second version says, whatever else goes on.

dB ← (1/s²) · dB · (A Aᵀ + εI)⁻¹,  ε = 1e-8
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import c_oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accuracy import assert_same, check_budget
from conftest import implementation_cases
from processes import start
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lorafa_kernels import (
    LoRAFAConfig,
    LoRAFALinear,
    LoRAFALinearGroup,
    LoRAFASwiGLU,
    apply_lorafa,
    load_adapter,
    lorafa_linear,
    lorafa_parameters,
    save_adapter,
)
from lorafa_kernels.correction import correct, gram_inverse

EPSILON = 1e-8
K, N, R, ALPHA = 24, 48, 8, 12


def formula(dB: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """The corrected gradient in fp64."""
    A = lora_A.detach().double()
    return dB.double() @ torch.linalg.inv(A @ A.T + EPSILON * torch.eye(len(A)).to(A)) / scaling**2


def assert_near(got: list[Tensor], want: list[Tensor]) -> None:
    """What docs/design.md promises of fp64: 1e-6 relative."""
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype == torch.float64
        assert (one - other).norm() / other.norm() < 1e-6


def switch(model: nn.Module, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, LoRAFALinear):
            module.gradient_correction = on


def layers_of(model: nn.Module) -> list[LoRAFALinear]:
    return [module for module in model.modules() if isinstance(module, LoRAFALinear)]


def linears(*shapes: tuple[int, int], dtype=torch.float32) -> dict[str, nn.Linear]:
    return {f"layer{i}": nn.Linear(*shape, dtype=dtype) for i, shape in enumerate(shapes)}


def layer(**options) -> LoRAFALinear:
    return LoRAFALinear(K, N, **options)


def group(*, dtype=torch.float32, **options) -> LoRAFALinearGroup:
    return LoRAFALinearGroup.from_linears(linears((K, N), (K, 40), dtype=dtype), **options)


def partly(*, dtype=torch.float32, gradient_correction, **options) -> LoRAFALinearGroup:
    """A corrected member, one without an adapter and one that is not corrected."""
    made = linears((K, N), (K, 40), (K, 36), dtype=dtype)
    for name, on in (("layer0", gradient_correction), ("layer2", False)):
        made[name] = LoRAFALinear.from_linear(made[name], gradient_correction=on, **options)
    return LoRAFALinearGroup(made)


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "layer": layer,
    "group": group,
    "partly": partly,
    "share_A": lambda **options: group(share_A=True, **options),
    "mlp": lambda **options: LoRAFASwiGLU(K, N, **options),
}


def build(block: str, *, on: bool = True, dtype=torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    adapter_dtype = torch.promote_types(dtype, torch.float32)
    options = {"r": R, "lora_alpha": ALPHA, "init_lora_weights": False, "dtype": dtype} | options
    return BLOCKS[block](adapter_dtype=adapter_dtype, gradient_correction=on, **options)


def data(dtype=torch.float32, rows: int = 40) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(outputs) -> Tensor:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(y.float().square().mean() if y.dtype != torch.float64 else y.square().mean() for y in outputs)


def gradients(model: nn.Module, x: Tensor, run: Callable | None = None) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(2)
    return list(torch.autograd.grad(loss_of((model if run is None else run)(x)), trained))


def plain_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the same model without the correction."""
    on = [layer.gradient_correction for layer in layers_of(model)]
    switch(model, False)
    found = gradients(model, x)
    for one, flag in zip(layers_of(model), on, strict=True):
        one.gradient_correction = flag
    return found


# ---- values ----


@pytest.mark.numerics
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("block", BLOCKS)
def test_gradient_is_that_of_the_formula(block, dropout):
    model = build(block, dtype=torch.float64, lora_dropout=dropout)
    x = data(torch.float64).requires_grad_()
    got, plain = gradients(model, x), plain_gradients(model, x)
    want = [
        formula(dB, one.lora_A, one.scaling) if one.gradient_correction else dB
        for dB, one in zip(plain, layers_of(model), strict=True)
    ]
    assert_near(got, want)
    dx = []
    for on in (True, False):
        switch(model, on)
        torch.manual_seed(3)
        dx.append(torch.autograd.grad(loss_of(model(x)), x)[0])
    assert_same(*dx)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device, impl", implementation_cases())
def test_error_is_within_the_budget(device, impl, dtype):
    model = build("layer", dtype=dtype).to(device)
    model.impl = impl
    x = data(dtype).to(device).requires_grad_()
    dy = torch.randn(len(x), N, generator=torch.Generator().manual_seed(4)).to(device, dtype)

    def plain(to: torch.dtype) -> dict[str, Tensor]:
        A, B, W, b = (
            t.detach().to(dtype).to(to) for t in (model.lora_A, model.lora_B, model.weight, model.bias)
        )
        B.requires_grad_()
        y = F.linear(x.detach().to(to), W, b) + model.scaling * F.linear(F.linear(x.detach().to(to), A), B)
        (dB,) = torch.autograd.grad(y, B, dy.to(to))
        wide = torch.promote_types(to, torch.float32)
        A = model.lora_A.detach().to(wide)
        return {
            "dB": dB.to(wide) @ torch.linalg.inv(A @ A.T + EPSILON * torch.eye(R).to(A)) / model.scaling**2
        }

    (dB,) = torch.autograd.grad(model(x), model.lora_B, dy)
    assert dB.dtype == torch.float32
    # The gradient is stored in fp32, but what it is summed from is rounded to dtype: so is the plain one.
    own = {name: value.float() for name, value in plain(dtype).items()}
    check_budget({"dB": dB}, plain(torch.float64), own)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("R", [1, 3, 16])
def test_c_oracle_agrees(R, dtype):
    of = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[dtype]
    draw = torch.Generator().manual_seed(5)
    dB = torch.randn(256, R, generator=draw).to(of)
    A = torch.randn(R, 20, generator=draw, dtype=torch.float64 if dtype == "fp64" else torch.float32)
    got = correct(dB, gram_inverse(A), 0.7)
    want = torch.from_numpy(c_oracle.correct(dB.double().numpy(), A.double().numpy(), 0.7, "fp64"))
    if dtype == "fp64":
        assert_near([got], [want])
        return
    assert got.dtype == of
    own = (dB.float() @ torch.linalg.inv(A @ A.T + EPSILON * torch.eye(R)) / 0.7**2).to(of)
    check_budget({"dB": got}, {"dB": want}, {"dB": own})


@pytest.mark.numerics
def test_directions_that_A_has_not_are_left_out():
    """R > K, and rows that depend on each other: A Aᵀ + εI has directions of rounding alone."""
    A = torch.randn(12, 5, generator=torch.Generator().manual_seed(6))
    inverse = gram_inverse(A)
    values = torch.linalg.eigvalsh(inverse.double())
    smallest = torch.linalg.svdvals(A.double())[-1] ** 2
    assert values.max() <= 1.01 / smallest and (values.abs() > 1e-3 * values.max()).sum() == 5
    assert gram_inverse(torch.zeros(3, 4)).isfinite().all()


@pytest.mark.numerics
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    model = build("layer")
    with torch.no_grad():
        model.lora_A[0, 0] = bad
    assert gram_inverse(model.lora_A).isnan().all()
    assert gradients(model, data())[0].isnan().all()


@pytest.mark.numerics
def test_orthogonal_rows_make_it_a_constant():
    model = build("layer", dtype=torch.float64, init_lora_weights="orthogonal")
    with torch.no_grad():
        model.lora_B.normal_()
    x = data(torch.float64)
    assert_near(gradients(model, x), [3 / model.scaling**2 * dB for dB in plain_gradients(model, x)])


# ---- optimizers ----


class Lion(torch.optim.Optimizer):
    """Signs of a momentum (arXiv 2302.06675)."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for set_ in self.param_groups:
            for p in set_["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_((0.9 * m + 0.1 * p.grad).sign(), alpha=set_["lr"])
                m.mul_(0.99).add_(p.grad, alpha=0.01)


class Eager(nn.Module):
    """LoRA-FA in plain PyTorch around the tensors of a LoRAFALinear, its lora_B a copy."""

    def __init__(self, of: LoRAFALinear) -> None:
        super().__init__()
        self.of = [of]
        self.lora_B = nn.Parameter(of.lora_B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        (of,) = self.of
        return F.linear(x, of.weight, of.bias) + of.scaling * F.linear(F.linear(x, of.lora_A), self.lora_B)

    def correct(self) -> None:
        (of,) = self.of
        self.lora_B.grad = formula(self.lora_B.grad, of.lora_A, of.scaling)


def deep(dtype=torch.float64, **options) -> nn.Sequential:
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 10, "gradient_correction": True} | options
    model = nn.Sequential(nn.Linear(K, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)).to(
        dtype
    )
    model = apply_lorafa(model, LoRAFAConfig(target_modules=["0", "2", "4"], **options))
    # PEFT's lora_B has the dtype of the weight, ours is fp32 unless it is told otherwise.
    return model.to(dtype)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "lion": lambda p: Lion(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.numerics
@pytest.mark.parametrize("clip", [None, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_the_formula(name, accumulate, clip):
    """The gradient is corrected once, after accumulation as before, and what is clipped is corrected."""
    ours = deep()
    eager = nn.Sequential(*(Eager(m) if isinstance(m, LoRAFALinear) else m for m in ours))
    steps = {}
    for model in (ours, eager):
        trained = [m.lora_B for m in model if hasattr(m, "lora_B")]
        optimizer = OPTIMIZERS[name](trained)
        draw, norms = torch.Generator().manual_seed(7), []
        for _ in range(20):
            for _ in range(accumulate):
                x = torch.randn(16, K, generator=draw, dtype=torch.float64)
                (model(x).square().mean() - model(x).mean()).backward()
            if model is eager:
                for one in eager:
                    if isinstance(one, Eager):
                        one.correct()
            if clip is not None:
                norms.append(nn.utils.clip_grad_norm_(trained, clip))
            optimizer.step()
            optimizer.zero_grad()
        steps[model] = [p.detach() for p in trained], norms
    assert_near(steps[ours][0], steps[eager][0])
    if clip is not None:
        assert max(steps[ours][1]) > clip
        assert_near(steps[ours][1], steps[eager][1])


@pytest.mark.numerics
def test_twenty_steps_of_adamw_equal_pefts_optimizer():
    peft = pytest.importorskip("peft", reason="the optimizer is PEFT's")
    optimizers = pytest.importorskip("peft.optimizers")
    ours = deep()
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    fields = {"r": 4, "lora_alpha": 10, "target_modules": ["0", "2", "4"]}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**fields), autocast_adapter_dtype=False).double()
    pairs = list(zip(layers_of(ours), (theirs.base_model.model[i] for i in (0, 2, 4)), strict=True))
    for mine, other in pairs:
        assert_same(mine.weight, other.base_layer.weight)
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(mine.lora_A)

    other = deep(gradient_correction=False)
    optimizer = optimizers.create_lorafa_optimizer(theirs, r=4, lora_alpha=10, lr=0.01)
    for set_ in optimizer.param_groups:
        # PEFT's AdamW adds its eps, another one, before the bias correction, torch's after it.
        set_["eps"] = 0.0

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        draw, losses = torch.Generator().manual_seed(8), []
        for _ in range(20):
            x = torch.randn(16, K, generator=draw, dtype=torch.float64)
            loss = (model(x) - x[:, :4]).square().mean()
            losses.append(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses

    found, without = (
        train(m, torch.optim.AdamW(lorafa_parameters(m), lr=0.01, weight_decay=0.0, eps=0.0))
        for m in (ours, other)
    )
    assert_near(found, train(theirs, optimizer))
    assert_near([mine.lora_B for mine, _ in pairs], [of.lora_B["default"].weight for _, of in pairs])
    with pytest.raises(AssertionError):
        assert_near(found, without)


@pytest.mark.numerics
def test_grad_scaler_scales_it_like_any_other_gradient():
    model, x = build("layer"), data()
    (want,) = gradients(model, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD([model.lora_B], lr=1.0)
    scaler.scale(loss_of(model(x))).backward()
    assert_same(model.lora_B.grad, want * 2**10)
    scaler.unscale_(optimizer)
    assert_same(model.lora_B.grad, want)


# ---- the inverse: when it is made, and what is kept ----


def test_inverse_is_made_once():
    model, x = build("mlp"), data()
    gradients(model, x)
    made = [gram_inverse(one.lora_A) for one in layers_of(model)]
    gradients(model, x)
    model.eval()
    model(x)
    model.train()
    for one in layers_of(model):
        one.merge()
        one.unmerge()
    gradients(model, x)
    assert all(
        gram_inverse(one.lora_A) is inverse for one, inverse in zip(layers_of(model), made, strict=True)
    )
    assert all(inverse.dtype == torch.float32 and not inverse.requires_grad for inverse in made)


def in_place(model):
    with torch.no_grad():
        model.lora_A.mul_(-2)


def loaded(model):
    state = model.state_dict()
    model.load_state_dict(state | {"lora_A": state["lora_A"] * 3})


def assigned(model):
    state = model.state_dict()
    model.load_state_dict(state | {"lora_A": state["lora_A"] * 3}, assign=True)


def other_data(model):
    model.lora_A.data = model.lora_A.data * 5


def other_parameter(model):
    model.lora_A = nn.Parameter(torch.randn(R, K), requires_grad=False)


def from_meta(model):
    model.to_empty(device="meta")
    model.to_empty(device="cpu")
    model.reset_parameters()


CHANGES = {
    "in place": in_place,
    "loaded": loaded,
    "assigned": assigned,
    "data": other_data,
    "parameter": other_parameter,
    "drawn": LoRAFALinear.reset_lora_parameters,
    "double": lambda model: model.double(),
    "meta": from_meta,
}


@pytest.mark.numerics
@pytest.mark.parametrize("name", CHANGES)
def test_inverse_follows_lora_A(name):
    model, x = build("layer"), data()
    before = gram_inverse(model.lora_A).clone()
    gradients(model, x)
    CHANGES[name](model)
    x = x.to(model.weight.dtype)
    after = gram_inverse(model.lora_A)
    assert after.dtype == (torch.float64 if name == "double" else torch.float32)
    assert name == "double" or not torch.equal(after, before)
    A = model.lora_A.detach().double()
    want = torch.linalg.inv(A @ A.T + EPSILON * torch.eye(R, dtype=torch.float64))
    # By another algorithm: R² roundings are far below what another lora_A would make.
    assert (after - want).norm() < torch.finfo(after.dtype).eps * R**2 * want.norm()
    assert_same(gradients(model, x), [correct(dB, after, model.scaling) for dB in plain_gradients(model, x)])


@pytest.mark.numerics
def test_layers_with_one_lora_A_have_one_inverse():
    model, x = build("share_A"), data()
    one, other = layers_of(model)
    assert gram_inverse(one.lora_A) is gram_inverse(other.lora_A)
    model.to(torch.float64)
    assert one.lora_A is other.lora_A
    gradients(model, x.double())
    assert gram_inverse(one.lora_A) is gram_inverse(other.lora_A)


@pytest.mark.numerics
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("block", BLOCKS)
def test_copies_correct_by_their_own_lora_A(block, copied):
    model, x = build(block), data()
    want = gradients(model, x)
    other = copied(model)
    assert_same(gradients(other, x), want)
    with torch.no_grad():
        for one in layers_of(other):
            one.lora_A.mul_(2)
    changed = gradients(other, x)
    assert_same(gradients(model, x), want)
    assert not any(torch.equal(a, b) for a, b in zip(changed[:1], want, strict=False))


def test_inverse_stays_where_it_is():
    """A CUDA graph has recorded its address."""
    model, x = build("layer"), data()
    gradients(model, x)
    inverse = gram_inverse(model.lora_A)
    before = inverse.clone()
    in_place(model)
    gradients(model, x)
    assert gram_inverse(model.lora_A) is inverse and not torch.equal(inverse, before)


def test_inverse_goes_with_its_lora_A():
    import gc
    import weakref

    model = build("layer")
    gradients(model, data())
    inverse = weakref.ref(gram_inverse(model.lora_A))
    del model
    gc.collect()
    assert inverse() is None


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_kept_for_backward_is_what_is_kept_anyway_and_the_inverse_itself(block, needs_dx):
    model, x = build(block), data().requires_grad_(needs_dx)

    def kept(on: bool) -> list[Tensor]:
        for one in layers_of(model)[:1] if block == "partly" else layers_of(model):
            one.gradient_correction = on
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            model(x)
        return found

    inverses = {gram_inverse(one.lora_A).data_ptr() for one in layers_of(model)}
    own, without = kept(True), kept(False)
    more = [t for t in own if t.data_ptr() in inverses]
    assert len(own) == len(without) + len(more)
    assert {tuple(t.shape) for t in more} == {(R, R)}
    corrected = 1 if block == "partly" else len({id(one.lora_A) for one in layers_of(model)})
    assert len(more) == corrected


@pytest.mark.parametrize("block", ["layer", "group", "mlp"])
def test_frozen_lora_B_and_no_grad_make_no_inverse(block, monkeypatch):
    made = []
    for user in ("linear.api", "group.operands"):
        monkeypatch.setattr(
            f"lorafa_kernels.{user}.gram_inverse", lambda A: made.append(A) or gram_inverse(A)
        )
    model, x = build(block), data().requires_grad_()
    with torch.no_grad():
        model(x)
    for one in layers_of(model):
        one.lora_B.requires_grad_(False)
    model(x)
    assert not made
    layers_of(model)[0].lora_B.requires_grad_()
    model(x)
    assert len(made) == 1


# ---- autocast, compilers, checkpointing, engines ----


@pytest.mark.numerics
@pytest.mark.parametrize("block", BLOCKS)
def test_autocast_does_not_reach_it(block):
    """Backward may run within the region, where torch's own products would be rounded to 16 bits."""
    model, x = build(block), data()
    found = {}
    for inside in (True, False):
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model(x))
            if inside:
                found[inside] = list(torch.autograd.grad(loss, trained))
        if not inside:
            found[inside] = list(torch.autograd.grad(loss, trained))
    assert_same(found[True], found[False])
    switch(model, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model(x))
    plain = torch.autograd.grad(loss, trained)
    for got, dB, one in zip(found[True], plain, layers_of(model), strict=True):
        if block == "partly" and one is not layers_of(model)[0]:
            assert_same(got, dB)
        else:
            assert_same(got, correct(dB, gram_inverse(one.lora_A), one.scaling))


@pytest.mark.numerics
@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_compiled_whole_it_is_the_same(block):
    model, x = build(block), data()
    want = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, x, compiled), want)
    with torch.no_grad():
        for one in layers_of(model):
            one.lora_A.mul_(-0.5)
    assert_same(gradients(model, x, compiled), gradients(model, x))


@pytest.mark.numerics
def test_a_trace_differentiates_to_it():
    model, x = build("layer", dtype=torch.float64), data(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
    assert_near(gradients(model, x, traced), gradients(model, x))
    y = model(x)
    assert_near([traced(x)], [y])


@pytest.mark.numerics
@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant", "selective"])
@pytest.mark.parametrize("block", BLOCKS)
def test_checkpointing_changes_nothing(block, mode):
    model, x = build(block), data().requires_grad_()
    # Selective checkpointing has operators, which are called otherwise than the functions behind them.
    fresh = copy.deepcopy(model)
    want = gradients(fresh, x)
    options = {"use_reentrant": mode == "reentrant"}
    if mode == "selective":

        def policy(context, operator, *_, **__):
            return (
                CheckpointPolicy.MUST_SAVE
                if operator is torch.ops.aten.mm.default
                else CheckpointPolicy.PREFER_RECOMPUTE
            )

        options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss_of(checkpoint(model, x, **options)).backward()
    assert_same([p.grad for p in trained], want)


ENGINES = ("ddp", "fsdp2")
WORLD = 2


def _engine_steps(engine: str, rank: int, world: int) -> dict[str, list]:
    """What each of some changes of lora_A leaves: corrected gradients, plain ones, and the whole lora_A."""
    # The gradients have 416 elements together.
    model = deep(torch.float32, r=8, lora_alpha=20)
    # As ranks that were seeded each by itself, or from the file system, have them.
    torch.manual_seed(rank)
    for one in layers_of(model):
        one.reset_lora_parameters()
    if engine == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for one in model:
            if isinstance(one, LoRAFALinear):
                fully_shard(one)
        wrapped = fully_shard(model)
    x = data(rows=8).chunk(world)[rank]

    def whole(tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()

    def step(on: bool) -> list[Tensor]:
        switch(model, on)
        wrapped.zero_grad()
        wrapped(x).square().mean().backward()
        return [whole(p.grad) for p in lorafa_parameters(model)]

    def change(factor: float) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_A"):
                    parameter.mul_(factor)

    def load() -> None:
        state = wrapped.state_dict()
        wrapped.load_state_dict({k: v * 3 if k.endswith("lora_A") else v for k, v in state.items()})

    found = {}
    for name, do in (("start", lambda: None), ("in place", lambda: change(-2.0)), ("loaded", load)):
        do()
        found[name] = [
            step(True),
            step(True),
            step(False),
            [whole(p) for n, p in model.named_parameters() if n.endswith("lora_A")],
        ]
    return found


def _worker(rank: int, world: int, folder: str) -> None:
    found = {engine: _engine_steps(engine, rank, world) for engine in ENGINES}
    if rank == 0:
        torch.save(found, f"{folder}/result")


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_engines_correct_by_the_lora_A_that_they_gathered(tmp_path):
    start(_worker, WORLD, tmp_path)
    scaling = 20 / 8
    for engine, found in torch.load(tmp_path / "result").items():
        for name, (first, second, plain, As) in found.items():
            assert_same(second, first, name=f"{engine}, {name}")
            # The gradient is corrected before ranks are summed, here after it: other roundings, as many.
            own = [
                dB @ torch.linalg.inv(A @ A.T + EPSILON * torch.eye(len(A))) / scaling**2
                for dB, A in zip(plain, As, strict=True)
            ]
            want = [formula(dB, A, scaling) for dB, A in zip(plain, As, strict=True)]
            of_kinds = ({"dB": torch.cat([t.flatten() for t in kind])} for kind in (first, want, own))
            check_budget(*of_kinds)


# ---- configuration, files, errors ----


def toy() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"q": nn.Linear(6, 6), "up": nn.Linear(6, 4)})


@pytest.mark.numerics
@pytest.mark.parametrize("on", [True, False])
def test_files_hold_the_field_where_it_is_true_and_peft_loads_them(on, tmp_path):
    import json

    config = LoRAFAConfig(
        target_modules=["q"], r=2, init_lora_weights=False, init_seed=3, gradient_correction=on
    )
    model = apply_lorafa(toy(), config)
    save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields.get("gradient_correction", False) is on and "init_seed" not in fields
    assert ("gradient_correction" in fields) is on
    again = load_adapter(toy(), tmp_path)
    assert again["q"].gradient_correction is on and again.lorafa_config.gradient_correction is on
    assert_same(again["q"].lora_A, model["q"].lora_A)

    peft = pytest.importorskip("peft", reason="PEFT reads the file")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(toy(), str(tmp_path))
    told = [str(w.message) for w in caught if "gradient_correction" in str(w.message)]
    assert bool(told) is on, told
    assert_same(theirs.base_model.model["q"].lora_A["default"].weight, model["q"].lora_A)


def test_a_layer_that_was_switched_by_hand_is_saved_as_it_is(tmp_path):
    model = apply_lorafa(toy(), LoRAFAConfig(target_modules=["q"], r=2))
    model["q"].gradient_correction = True
    save_adapter(model, tmp_path)
    assert load_adapter(toy(), tmp_path)["q"].gradient_correction is True


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_a_value_that_is_no_bool_is_refused(value):
    with pytest.raises(ValueError, match="gradient_correction must be"):
        LoRAFAConfig(target_modules=["q"], gradient_correction=value)
    with pytest.raises(TypeError, match="gradient_correction must be"):
        LoRAFALinear(4, 4, gradient_correction=value)
    tensors = torch.zeros(3, 4), torch.zeros(4, 4), torch.zeros(2, 4), torch.zeros(4, 2)
    with pytest.raises(TypeError, match="gradient_correction must be"):
        lorafa_linear(*tensors, gradient_correction=value)


def test_a_scaling_of_zero_is_refused():
    with pytest.raises(ValueError, match="lora_alpha must not be 0"):
        LoRAFALinear(4, 4, lora_alpha=0, gradient_correction=True)
    with pytest.raises(ValueError, match="lora_alpha must not be 0"):
        LoRAFAConfig(target_modules=["q"], alpha_pattern={"q": 0}, gradient_correction=True)
    model = build("layer")
    model.scaling = 0.0
    with pytest.raises(ValueError, match="scaling is 0"):
        model(data())


def test_members_that_share_lora_A_agree():
    with pytest.raises(ValueError, match="gradient_correction"):
        members = {n: LoRAFALinear(4, 4, r=2, gradient_correction=n == "a") for n in "ab"}
        members["b"].lora_A = members["a"].lora_A
        LoRAFALinearGroup(members, share_A=True)
    model = build("share_A")
    layers_of(model)[0].gradient_correction = False
    with pytest.raises(ValueError, match="gradient_correction"):
        model(data())


def test_a_layer_from_before_is_not_corrected():
    """Its pickle has no such attribute."""
    model = build("layer", on=False)
    del model.__dict__["gradient_correction"]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert again.gradient_correction is False
    assert_same(gradients(again, data()), gradients(build("layer", on=False), data()))
