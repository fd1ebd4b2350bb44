"""The gated MLP: its activation, one node for the whole block, and the modules. Results within the error
budget, what is kept, what is launched, and the contract of the layers it is made of.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from accuracy import SMALL_OUTPUT, assert_same, check_budget
from conftest import implementation_cases
from kernel_plans import grid, slow_reference
from memory_beds import far_rows
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bench.measure.memory import allocations
from lorafa_kernels import LoRAFAGeGLU, LoRAFALinear, LoRAFASwiGLU, disable_adapter, lorafa_linear
from lorafa_kernels.checks.budget import allowed_error, relative_error
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.mlp import ops as gated_ops
from lorafa_kernels.mlp.activation import ACTIVATIONS
from lorafa_kernels.mlp.api import lorafa_gated_mlp
from lorafa_kernels.philox import keep_mask

pytestmark = pytest.mark.numerics
implementations = pytest.mark.parametrize(("device", "impl"), implementation_cases())
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
LAYERS = ("gate", "up", "down")
# Different ones, so that a mistaken one would not fit. N·R of each layer is at least 256.
M, K, INTERMEDIATE, N = 26, 32, 40, 36
RANKS = {"gate": 8, "up": 9, "down": 10}
SCALINGS = {"gate": 0.7, "up": 1.5, "down": 0.5}
SEED = 11
DROPOUT = {"gate": 0.1, "up": 0.5, "down": 0.3}


def act(g: Tensor, activation: str) -> Tensor:
    """The activation as eager PyTorch computes it."""
    if activation == "silu":
        return F.silu(g)
    return F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")


# The activation product and its gradients.


def draw_gated(dtype, device, shape=(37, 70)) -> tuple[Tensor, Tensor, Tensor]:
    """g, u and dh."""
    generator = torch.Generator().manual_seed(1)
    return tuple((2 * torch.randn(shape, generator=generator)).to(device, dtype) for _ in range(3))


def plain_gated(g: Tensor, u: Tensor, dh: Tensor, activation: str, dtype=None) -> dict[str, Tensor]:
    g, u = (tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in (g, u))
    h = act(g, activation) * u
    dg, du = torch.autograd.grad(h, (g, u), dh.to(h.dtype))
    return {"h": h.detach(), "dg": dg, "du": du}


def run_gated(g: Tensor, u: Tensor, dh: Tensor, activation: str, impl: str) -> dict[str, Tensor]:
    h = gated_ops.gated(g, u, activation, impl)
    dg, du = gated_ops.gated_backward(dh.clone(), g, u, activation, impl)
    return {"h": h, "dg": dg, "du": du}


@implementations
@dtypes
@activations
def test_gated_accuracy(device, impl, dtype, activation):
    operands = draw_gated(dtype, device)
    got = run_gated(*operands, activation, impl)
    assert all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in got.values())
    exact = plain_gated(*operands, activation, torch.float64)
    check_budget(got, exact, plain_gated(*operands, activation))


@implementations
@dtypes
@activations
def test_gated_at_extreme_values(device, impl, dtype, activation):
    """No |g| overflows; NaN and Inf go where the plain formula lets them go, with the sign it gives them.

    impl="torch" is that formula in its own dtype, and has its bits: in fp32 PyTorch's gelu of Inf is NaN on
    some CPUs. The others follow it in fp64, whose results for these gates are numbers of every dtype after
    one rounding.
    """
    gates = [1e4, -1e4, 0.0, float("inf"), -float("inf"), float("nan")]
    values = [1.0, -2.5, 0.0, float("inf"), float("nan")]
    cube = torch.cartesian_prod(torch.tensor(gates), torch.tensor(values), torch.tensor(values))
    operands = tuple(cube.to(device, dtype)[:, i : i + 1].contiguous() for i in range(3))
    got = run_gated(*operands, activation, impl)
    plain = plain_gated(*operands, activation, dtype if impl == "torch" else torch.float64)
    assert_same(got, {name: tensor.to(dtype) for name, tensor in plain.items()}, equal_nan=True)


@implementations
@activations
def test_gated_with_strides(device, impl, activation):
    """Rows within larger matrices and transposed matrices give what their contiguous copies give, from the
    kernels the same bits; the gradient is written into dh wherever it lies, and nowhere else.
    """
    operands = draw_gated(torch.bfloat16, device)
    plain, exact = (plain_gated(*operands, activation, dtype) for dtype in (None, torch.float64))
    want = run_gated(*operands, activation, impl)

    def in_rows(tensor):
        wide = torch.full((tensor.shape[0], 133), float("nan"), dtype=tensor.dtype, device=device)
        wide[:, 5:75] = tensor
        return wide[:, 5:75]

    def transposed(tensor):
        return tensor.t().contiguous().t()

    for change in (in_rows, transposed):
        g, u, dh = (change(tensor) for tensor in operands)
        h = gated_ops.gated(g, u, activation, impl)
        dg, du = gated_ops.gated_backward(dh, g, u, activation, impl)
        assert dg is dh and h.is_contiguous() and du.is_contiguous()
        got = {"h": h, "dg": dg, "du": du}
        check_budget(got, exact, plain)
        if impl == "triton":
            assert_same(got, want)
    around = in_rows(operands[2])
    gated_ops.gated_backward(around, operands[0], operands[1], activation, impl)
    assert around._base[:, :5].isnan().all() and around._base[:, 75:].isnan().all()


@implementations
@activations
def test_one_gradient_alone(device, impl, activation):
    """dg or du alone: the same bits, in dh's memory; g and u are read only."""
    g, u, dh = draw_gated(torch.float16, device)
    want = run_gated(g, u, dh, activation, impl)
    before = g.clone(), u.clone()
    only = dh.clone()
    dg, du = gated_ops.gated_backward(only, g, u, activation, impl, need_du=False)
    assert du is None and dg is only and torch.equal(dg, want["dg"])
    only = dh.clone()
    dg, du = gated_ops.gated_backward(only, g, None, activation, impl)
    assert dg is None and du is only and torch.equal(du, want["du"])
    assert torch.equal(g, before[0]) and torch.equal(u, before[1])


@implementations
def test_gated_of_no_rows(device, impl):
    empty = torch.empty(0, 24, device=device)
    got = run_gated(empty, empty, empty, "silu", impl)
    assert all(tensor.shape == (0, 24) for tensor in got.values())


@pytest.mark.parametrize("operand", ["g", "u", "dh"])
def test_gated_offsets_past_32_bits(triton_device, operand):
    """Rows of a view whose last one starts more than 2³² elements behind the first."""
    operands = dict(zip(("g", "u", "dh"), draw_gated(torch.float16, triton_device, (5, 7)), strict=True))
    want = run_gated(**operands, activation="gelu", impl="triton")
    operands[operand] = far_rows(operands[operand])
    h = gated_ops.gated(operands["g"], operands["u"], "gelu", "triton")
    dg, du = gated_ops.gated_backward(operands["dh"], operands["g"], operands["u"], "gelu", "triton")
    for name, tensor in (("h", h), ("dg", dg), ("du", du)):
        assert torch.equal(tensor, want[name]), name


@dtypes
@pytest.mark.parametrize("columns", [7, 64], ids=["ragged", "even"])
def test_gated_kernels_write_their_results_and_nothing_else(triton_device, monkeypatch, dtype, columns):
    """Results lie between canaries, and are filled with NaN before the launch."""
    g, u, dh = draw_gated(dtype, triton_device, (37, columns))
    kernels = importlib.import_module("lorafa_kernels.kernels.gated")
    empty, made = torch.empty, []

    def guarded_empty(shape, **options):
        count = shape[0] * shape[1]
        buffer = empty(count + 4096, **options).fill_(float("nan"))
        made.append(buffer)
        return buffer[2048 : 2048 + count].view(shape)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    around = guarded_empty(dh.shape, dtype=dtype, device=triton_device)
    around.copy_(dh)
    h = kernels.gated(g, u, "silu")
    du = kernels.gated_backward(around, g, u, "silu", True)
    assert len(made) == 3
    for buffer, tensor in zip(made, (around, h, du), strict=True):
        assert torch.isfinite(tensor).all()
        assert buffer[:2048].isnan().all() and buffer[2048 + tensor.numel() :].isnan().all()


def gated_arguments(name: str, impl: str, device: str, u: bool = True, need_du: bool = True) -> tuple:
    g, other, dh = draw_gated(torch.bfloat16, device, (9, 12))
    if name == "gated":
        return g, other, "silu", impl
    return dh, g, other if u else None, "gelu", need_du, impl


GATED_CALLS = [("gated", True, True), ("gated_backward_", True, True)]
GATED_CALLS += [("gated_backward_", True, False), ("gated_backward_", False, True)]


@implementations
@pytest.mark.parametrize(("name", "u", "need_du"), GATED_CALLS)
def test_gated_operators(device, impl, name, u, need_du):
    """PyTorch's own check of an operator, and fakes of the right shape and strides for any layout."""
    operator = getattr(torch.ops.lorafa_kernels, name).default
    arguments = gated_arguments(name, impl, device, u, need_du)
    torch.library.opcheck(operator, arguments)
    assert torch.Tag.pt2_compliant_tag in operator.tags
    arguments = [a.t().contiguous().t() if isinstance(a, Tensor) else a for a in arguments]
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


# The MLP.


class Case:
    """x (rows, K), dy (rows, N), and the operands of gate, up and down, of widths K, INTERMEDIATE and N.

    plain: those without an adapter. dropout: the probability of each layer that has one.
    """

    def __init__(
        self,
        device,
        dtype=torch.float32,
        *,
        rows=M,
        widths=(K, INTERMEDIATE, N),
        bias=True,
        plain=(),
        factor_dtype=None,
        dropout=None,
    ):
        generator = torch.Generator().manual_seed(3)

        def draw(*shape, scale=1.0, dtype=dtype):
            wide = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return (scale * wide).to(device, dtype)

        self.x = draw(rows, widths[0]).requires_grad_()
        self.dy = draw(rows, widths[2])
        self.layers = {}
        for name, (inputs, outputs) in zip(LAYERS, (widths[:2], widths[:2], widths[1:]), strict=True):
            R = RANKS[name]
            weight, bias_ = draw(outputs, inputs, scale=inputs**-0.5), draw(outputs)
            lora_A = draw(R, inputs, scale=inputs**-0.5)
            lora_B = draw(outputs, R, scale=R**-0.5, dtype=factor_dtype or dtype).requires_grad_()
            dropout_p = (dropout or {}).get(name, 0.0)
            adapter = () if name in plain else (lora_A, lora_B, SCALINGS[name], dropout_p)
            self.layers[name] = LinearOperands(weight, bias_ if bias else None, *adapter)

    @property
    def lora_Bs(self) -> dict[str, Tensor]:
        return {name: layer.lora_B for name, layer in self.layers.items() if layer.lora_B is not None}

    def trained(self) -> dict[str, Tensor]:
        """What a gradient is asked for, by the gradient's name."""
        found = {"dx": self.x, **{f"dB of {name}": B for name, B in self.lora_Bs.items()}}
        return {name: tensor for name, tensor in found.items() if tensor.requires_grad}

    def run(self, impl: str, activation: str = "silu", x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        torch.manual_seed(SEED)
        return lorafa_gated_mlp(x, **self.layers, activation=activation, impl=impl)

    def results(self, impl: str, activation: str = "silu") -> dict[str, Tensor]:
        return self.gradients(self.run(impl, activation))

    def gradients(self, y: Tensor, retain_graph: bool = False) -> dict[str, Tensor]:
        """y and the gradients of what is trained."""
        wanted = self.trained()
        found = torch.autograd.grad(y, tuple(wanted.values()), self.dy, retain_graph=retain_graph)
        return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}

    def asked_for(self, got: dict[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
        """got, and the same results in fp64 and by the plain formula, which gives all gradients."""
        exact, plain = self.eager(dtype=torch.float64), self.eager()
        return got, *({name: found[name] for name in got} for found in (exact, plain))

    def eager(self, activation: str = "silu", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The plain formula by eager PyTorch, in `dtype` (default: x's). lora_B is rounded to the dtype of x
        first, which is what the operator promises to do with it.
        """
        own = self.x.dtype
        to = dtype or own

        def cast(tensor):
            return None if tensor is None else tensor.detach().to(own).to(to)

        torch.manual_seed(SEED)
        seeds = torch.randint(-(2**63), 2**63 - 1, (3,), dtype=torch.int64, device=self.x.device)
        x = cast(self.x).requires_grad_()
        Bs = {name: cast(B).requires_grad_() for name, B in self.lora_Bs.items()}

        def linear(name, rows):
            layer = self.layers[name]
            y = F.linear(rows, cast(layer.weight), cast(layer.bias))
            if name not in Bs:
                return y
            dropped = rows
            if p := layer.dropout_p:
                turn = LAYERS.index(name)
                dropped = rows * keep_mask(seeds[turn : turn + 1], p, *rows.shape) / (1 - p)
            return y + layer.scaling * F.linear(F.linear(dropped, cast(layer.lora_A)), Bs[name])

        y = linear("down", act(linear("gate", x), activation) * linear("up", x))
        wanted = {"dx": x, **{f"dB of {name}": B for name, B in Bs.items()}}
        found = torch.autograd.grad(y, tuple(wanted.values()), self.dy.to(to))
        return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


@grid(("device,impl", implementation_cases()), ("dtype", DTYPES), ("activation", ACTIVATIONS), each_once=True)
def test_accuracy(device, impl, dtype, activation):
    case = Case(device, dtype)
    check_budget(
        case.results(impl, activation), case.eager(activation, torch.float64), case.eager(activation)
    )


@implementations
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
def test_accuracy_with_fp32_lora_B(device, impl, dtype):
    case = Case(device, dtype, bias=False, factor_dtype=torch.float32)
    got = case.results(impl)
    assert all(got[f"dB of {name}"].dtype == torch.float32 for name in LAYERS)
    check_budget(got, case.eager(dtype=torch.float64), case.eager())


SUBSETS = [set_ for size in range(4) for set_ in itertools.combinations(LAYERS, size)]


@implementations
@pytest.mark.parametrize("plain", SUBSETS, ids=lambda plain: "-".join(plain) or "none")
def test_layers_without_an_adapter(device, impl, plain):
    case = Case(device, plain=plain)
    check_budget(case.results(impl), case.eager(dtype=torch.float64), case.eager())


@grid(
    ("device,impl", implementation_cases()),
    ("frozen", [pytest.param(names, id="-".join(names)) for names in SUBSETS[1:]]),
    ("need_dx", [pytest.param(True, id="dx"), pytest.param(False, id="no-dx")]),
    each_once=True,
)
def test_frozen_adapters(device, impl, frozen, need_dx):
    """What is asked for has the value that it has when everything is: of the library and the reference the
    same bits, of the kernels, which may read dy once for two results, values within the budget. Nothing else
    is computed.
    """
    case = Case(device)
    full = case.results(impl)
    for name in frozen:
        case.layers[name].lora_B.requires_grad_(False)
    case.x.requires_grad_(need_dx)
    if not case.trained():
        assert case.run(impl).grad_fn is None
        return
    got = case.results(impl)
    check_budget(*case.asked_for(got))
    if impl != "triton":
        assert_same(got, {name: full[name] for name in got})


@grid(
    ("device,impl", implementation_cases()),
    ("dtype", DTYPES),
    ("dropped", [pytest.param(names, id="-".join(names)) for names in (LAYERS, ("up",), ("down",))]),
    ("need_dx", [pytest.param(True, id="dx"), pytest.param(False, id="no-dx")]),
)
def test_dropout_accuracy(device, impl, dtype, dropped, need_dx):
    """Each layer drops by a mask of its own, that of the seed drawn for it; the gradients carry it."""
    case = Case(device, dtype, dropout={name: DROPOUT[name] for name in dropped})
    case.x.requires_grad_(need_dx)
    check_budget(*case.asked_for(case.results(impl)))


# What is kept.


def kept_by(forward) -> tuple[Tensor, list[Tensor]]:
    """y = forward() and every tensor that autograd saved for it."""
    tensors = []

    def pack(tensor):
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return forward(), tensors


def activations_of(case: Case, to: torch.dtype, activation: str) -> dict[str, Tensor]:
    """What backward could need, by the plain formula in the dtype `to`."""

    def linear(name, rows):
        weight, bias, lora_A, lora_B = (tensor.detach().to(to) for tensor in case.layers[name][:4])
        scaling = case.layers[name].scaling
        z = scaling * F.linear(rows, lora_A)
        return F.linear(rows, weight, bias) + F.linear(z, lora_B), z

    x = case.x.detach().to(to)
    (g, z_gate), (u, z_up) = linear("gate", x), linear("up", x)
    h = act(g, activation) * u
    return {"g": g, "u": u, "z": torch.cat([z_gate, z_up], 1), "z of down": linear("down", h)[1]}


def describe_kept(case: Case, tensors: list[Tensor], activation: str = "silu") -> set[str]:
    """Names of what was kept: an operand by being it, an activation by its value, which is within the budget
    of it. Nothing else may be there, nothing twice, and each in a storage of its own size.
    """
    objects = {}
    for name, layer in case.layers.items():
        for field in ("weight", "lora_A", "lora_B"):
            objects[id(getattr(layer, field))] = f"{field} of {name}"
    plain, exact = (activations_of(case, to, activation) for to in (case.x.dtype, torch.float64))
    found = []
    for tensor in tensors:
        if id(tensor) in objects:
            found.append(objects[id(tensor)])
            continue
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        names = [
            name
            for name, value in exact.items()
            if value.shape == tensor.shape
            and value.numel() >= SMALL_OUTPUT
            and relative_error(tensor, value)
            <= allowed_error(relative_error(plain[name], value), tensor.dtype)
        ]
        assert len(names) == 1, f"{tuple(tensor.shape)} is {names or 'unknown'}"
        found += names
    assert len(set(found)) == len(found)
    return set(found)


OBJECTS = {f"{field} of {name}" for field in ("weight", "lora_A", "lora_B") for name in LAYERS}
OF_DOWN = {"weight of down", "lora_A of down", "lora_B of down"}
# Which lora_B and whether x is trained; what is kept for it.
KEPT = {
    "all": (LAYERS, True, {"g", "u", "z", "z of down"} | OBJECTS),
    "first-layer": (LAYERS, False, {"g", "u", "z", "z of down", "lora_B of gate", "lora_B of up"} | OF_DOWN),
    "dx-alone": ((), True, {"g", "u"} | OBJECTS),
    "dx-and-down": (("down",), True, {"g", "u", "z of down"} | OBJECTS),
    "down-alone": (("down",), False, {"z of down", "lora_B of down"}),
    # The other lora_B tells where its part of z ends.
    "gate-alone": (("gate",), False, {"g", "u", "z", "lora_B of gate", "lora_B of up"} | OF_DOWN),
    "up-alone": (("up",), False, {"g", "z", "lora_B of gate", "lora_B of up"} | OF_DOWN),
    "nothing": ((), False, set()),
}


@implementations
@pytest.mark.parametrize(("trained", "need_dx", "wanted"), KEPT.values(), ids=KEPT)
def test_kept_tensors_by_name(device, impl, trained, need_dx, wanted):
    case = Case(device)
    case.x.requires_grad_(need_dx)
    for name, lora_B in case.lora_Bs.items():
        lora_B.requires_grad_(name in trained)
    y, tensors = kept_by(lambda: case.run(impl))
    assert describe_kept(case, tensors) == wanted
    assert (y.grad_fn is None) == (wanted == set())


@implementations
@pytest.mark.parametrize("dropped", [LAYERS, ("up",), ("down",)], ids="-".join)
def test_dropout_keeps_seeds(device, impl, dropped):
    """24 bytes beside what is kept without dropout."""
    case = Case(device, dropout={name: DROPOUT[name] for name in dropped})
    _, tensors = kept_by(lambda: case.run(impl))
    *_, wanted = KEPT["all"]
    seeds = [tensor for tensor in tensors if tensor.dtype == torch.int64]
    assert [tensor.untyped_storage().nbytes() for tensor in seeds] == [24]
    assert len(tensors) == len(wanted) + 1


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kept_bytes(device, impl, dtype):
    """2·M·I and M numbers for each rank; fewer than eager PyTorch, which keeps act(g) and h as well."""
    case = Case(device, dtype, factor_dtype=torch.float32)
    own = [tensor for layer in case.layers.values() for tensor in layer[:4]]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in own}
    _, tensors = kept_by(lambda: case.run(impl))
    storages = [t.untyped_storage() for t in tensors if t.untyped_storage().data_ptr() not in addresses]
    numbers = M * (2 * INTERMEDIATE + sum(RANKS.values()))
    assert sum(storage.nbytes() for storage in storages) == numbers * dtype.itemsize


@implementations
@pytest.mark.parametrize("backward_inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_autocast(device, impl, backward_inside):
    """Activations in autocast's dtype, fp32 operands kept as they are; the same numbers as with operands cast
    by hand.
    """
    case = Case(device)
    own = {id(tensor) for layer in case.layers.values() for tensor in layer[:4]}
    with torch.autocast(device, torch.bfloat16):
        y, tensors = kept_by(lambda: case.run(impl))
        assert y.dtype == torch.bfloat16
        case.dy = case.dy.bfloat16()
        if backward_inside:
            got = case.gradients(y)
    if not backward_inside:
        got = case.gradients(y)
    kept = [tensor for tensor in tensors if id(tensor) not in own]
    assert len(tensors) == 4 + len(OBJECTS) and len(kept) == 4
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept)
    assert all(got[name].dtype == torch.float32 for name in case.trained())

    by_hand = Case(device, torch.bfloat16, factor_dtype=torch.float32)
    for name, layer in case.layers.items():
        weight, bias, lora_A, lora_B, scaling, *_ = layer
        by_hand.layers[name] = LinearOperands(weight.bfloat16(), bias.bfloat16(), lora_A, lora_B, scaling)
    by_hand.x, by_hand.dy = case.x.detach().bfloat16().requires_grad_(), case.dy
    for name, tensor in by_hand.results(impl).items():
        assert torch.equal(got[name].to(tensor.dtype), tensor), name


@grid(
    ("device,impl", [case for case in implementation_cases() if case.values[1] != "reference"]),
    ("dtype", [torch.bfloat16, torch.float32]),
)
def test_temporary_bytes(device, impl, dtype):
    """Forward needs h, and backward two matrices of its size, beside what they return; one more would show.

    M·I is large beside everything else that is made, on some processors by oneDNN: a padded copy of some
    rows of x in a 16-bit product.
    """
    rows, wide = (1024, 1024) if impl == "torch" else (128, 256)
    mlp = LoRAFASwiGLU(8, wide, r=1, device=device, dtype=dtype, init_lora_weights=False)
    mlp.impl = impl
    x = torch.randn(rows, 8, device=device, dtype=dtype, requires_grad=True)
    trained = [x, *(p for p in mlp.parameters() if p.requires_grad)]

    def forward():
        y = mlp(x)
        # Triton's interpreter leaves cycles behind that hold a kernel's operands.
        gc.collect()
        return y

    def backward(y):
        return torch.autograd.grad(y, trained, torch.ones_like(y))

    backward(forward())
    gc.collect()
    _, of_forward, of_backward = allocations(forward, backward, device)
    matrix = rows * wide * dtype.itemsize
    assert of_forward < 1.5 * matrix
    assert of_backward < 2.5 * matrix


# Launches.


class Launches(TorchDispatchMode):
    """Counts launches of Triton kernels, and calls of those of PyTorch's operators that launch others."""

    COMPUTING = ("silu", "silu_backward", "mul", "mul_", "add", "add_", "copy_", "mm", "addmm", "addmm_")

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        # As where nothing watches.
        monkeypatch.setattr("lorafa_kernels.dispatch.watching_modes", lambda: 0)
        for file in ("shrink", "expand", "expand_tma", "recompute", "grad", "gated", "group", "group_tma"):
            module = importlib.import_module(f"lorafa_kernels.kernels.{file}")
            for name, kernel in vars(module).copy().items():
                if name.endswith("_kernel") and hasattr(kernel, "__getitem__"):
                    monkeypatch.setattr(module, name, self.recording(name, kernel))

    def recording(self, name, kernel):
        names = self.names

        class Recording:
            def __getitem__(self, grid):
                names.append(name)
                return kernel[grid]

        return Recording()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.COMPUTING:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_fewer_launches_than_separate_layers(triton_device, monkeypatch):
    case = Case(triton_device)

    def separate():
        def linear(name, rows):
            weight, bias, lora_A, lora_B, scaling, *_ = case.layers[name]
            return lorafa_linear(rows, weight, lora_A, lora_B, bias, scaling=scaling, impl="triton")

        return linear("down", F.silu(linear("gate", case.x)) * linear("up", case.x))

    counts = {}
    for key, forward in (("separate", separate), ("one node", lambda: case.run("triton"))):
        with monkeypatch.context() as patch, Launches(patch) as launches:
            y = forward()
            counts[key] = [len(launches.names)]
            case.gradients(y)
            counts[key].append(len(launches.names) - counts[key][0])
        if key == "one node":
            gated = [name for name in launches.names if "gated" in name]
            assert gated == ["_gated_kernel", "_gated_backward_kernel"]
            # But the copies that round fp32 factors.
            assert set(launches.names) & set(Launches.COMPUTING) <= {"copy_"}
    for few, many in zip(counts["one node"], counts["separate"], strict=True):
        assert few < many, counts


# The rest of the contract.


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_retain_graph_twice(device, impl, dtype):
    """Backward writes into what it made itself: not into dy, and not into what is kept."""
    case = Case(device, dtype)
    y, tensors = kept_by(lambda: case.run(impl))
    operands = [case.x, case.dy, *tensors]
    before = [tensor.detach().clone() for tensor in operands]
    first = case.gradients(y, retain_graph=True)
    assert all(torch.equal(tensor, copy_) for tensor, copy_ in zip(operands, before, strict=True))
    second = case.gradients(y)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(tensor, copy_) for tensor, copy_ in zip(operands, before, strict=True))


@implementations
@dtypes
def test_same_bits_from_run_to_run(device, impl, dtype):
    case = Case(device, dtype, rows=70 if device == "cpu" and impl == "triton" else 130)
    first, second = case.results(impl), case.results(impl)
    assert all(torch.equal(first[name], second[name]) for name in first)


@implementations
def test_output_may_be_written_by_the_caller(device, impl):
    case = Case(device)
    want = case.results(impl)
    for shape in ((M, K), (2, M // 2, K)):
        y = case.run(impl, x=case.x.view(shape))
        got = case.gradients(y.mul_(1.0).add_(1.0).view(M, N))
        assert all(torch.equal(got[name], want[name]) for name in case.trained())


@implementations
def test_x_and_dy_of_any_layout(device, impl):
    """What contiguous copies give: from the kernels the same bits, else values within the budget."""
    case = Case(device)
    want = case.results(impl)
    x, dy = case.x.detach(), case.dy
    wide = torch.full((M, 2 * K + 3), float("nan"), device=device)
    wide[:, 3::2] = x
    case.x = wide[:, 3::2].requires_grad_()
    case.dy = dy.t().contiguous().t()
    got = case.results(impl)
    check_budget(*case.asked_for(got))
    if impl == "triton":
        assert_same(got, want)
    # sum().backward() sends a dy of stride 0; a broadcast input has one as well.
    case.x, case.dy = x[:1].expand(M, K).requires_grad_(), dy[:1, :1].expand(M, N)
    got = case.results(impl)
    check_budget(*case.asked_for(got))
    case.x, case.dy = case.x.detach().contiguous().requires_grad_(), case.dy.contiguous()
    if impl == "triton":
        assert_same(got, case.results(impl))


@implementations
@pytest.mark.parametrize("shape", [(0, K), (3, 0, K), (K,), (2, 3, 4, K)], ids=str)
def test_shapes_of_x(device, impl, shape):
    case = Case(device)
    x = torch.randn(shape, device=device, requires_grad=True)
    y = case.run(impl, x=x)
    assert y.shape == (*shape[:-1], N)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for lora_B in case.lora_Bs.values():
        assert lora_B.grad.shape == lora_B.shape
        assert (lora_B.grad.count_nonzero() == 0) == (x.numel() == 0)
    assert_same(y.reshape(-1, N), case.run(impl, x=x.reshape(-1, K)))


@implementations
def test_non_finite_values_propagate(device, impl):
    """A NaN in x or dy reaches what the plain formula lets it reach, and no other row."""
    case = Case(device)
    with torch.no_grad():
        case.x[4, 3] = float("nan")
        case.dy[9, 5] = float("nan")
    got, want = case.results(impl), case.eager()
    for name, tensor in want.items():
        assert torch.equal(torch.isfinite(got[name]), torch.isfinite(tensor)), name
    assert torch.isfinite(got["y"][[0, 5, 25]]).all() and not torch.isfinite(got["y"][4]).any()


GRADCHECKS = [
    pytest.param(name, dropout, id=name + ("-dropout" if dropout else ""), marks=marks)
    for index, name in enumerate(ACTIVATIONS)
    for dropout, marks in (
        (DROPOUT, pytest.mark.slow if index else []),
        (None, [] if index else pytest.mark.slow),
    )
]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("activation", "dropout"), GRADCHECKS)
def test_gradcheck(impl, activation, dropout):
    """Against finite differences, with dropout at a fixed seed."""
    case = Case("cpu", torch.float64, rows=3, widths=(5, 6, 4), dropout=dropout)
    layers = case.layers

    def function(x, *lora_Bs):
        changed = {
            name: layer._replace(lora_B=lora_B)
            for (name, layer), lora_B in zip(layers.items(), lora_Bs, strict=True)
        }
        torch.manual_seed(SEED)
        return lorafa_gated_mlp(x, **changed, activation=activation, impl=impl)

    assert torch.autograd.gradcheck(function, (case.x, *case.lora_Bs.values()))


@implementations
def test_double_backward_is_refused(device, impl):
    case = Case(device)
    dx, dB = torch.autograd.grad(
        case.run(impl), (case.x, case.layers["up"].lora_B), case.dy, create_graph=True
    )
    for grad in (dx, dB):
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward(retain_graph=True)


@implementations
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["", "dropout"])
def test_checkpointing(device, impl, reentrant, dropout):
    """The same bits as without: dropout draws its seeds again from the state that checkpointing restores."""
    case = Case(device, dropout=dropout)
    want = case.results(impl)
    torch.manual_seed(SEED)
    y = checkpoint(lambda x: lorafa_gated_mlp(x, **case.layers, impl=impl), case.x, use_reentrant=reentrant)
    torch.manual_seed(SEED + 1)
    assert torch.equal(y, want["y"])
    y.backward(case.dy)
    for name, tensor in case.trained().items():
        assert torch.equal(tensor.grad, want[name]), name


@pytest.mark.parametrize(("device", "impl"), slow_reference())
@pytest.mark.parametrize("trained", [LAYERS, ("down",)], ids=["all", "down"])
def test_compile_fullgraph_with_dynamic_rows(device, impl, trained):
    torch._dynamo.reset()
    mlp = LoRAFASwiGLU(16, 24, r=4, init_lora_weights=False, device=device)
    mlp.impl = impl
    for name in LAYERS:
        getattr(mlp, f"{name}_proj").lora_B.requires_grad_(name in trained)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
    parameters = [p for p in mlp.parameters() if p.requires_grad]
    for rows in (5, 9, 30):
        x = torch.randn(rows, 16, device=device)
        results = []
        for module in (mlp, compiled):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            results.append((y, *torch.autograd.grad(y.square().sum(), (leaf, *parameters))))
        assert_same(results[1], results[0])


@pytest.mark.parametrize("make", [LoRAFASwiGLU, LoRAFAGeGLU])
def test_compile_with_inductor(make):
    torch._dynamo.reset()
    mlp = make(16, 24, r=16, init_lora_weights=False)
    check_module(mlp, torch.compile(mlp, fullgraph=True), torch.randn(4, 6, 16))


# Wrong arguments.

WRONG = {
    "activation": (dict(activation="relu"), ValueError, "activation='relu' is not known: expected one of"),
    "impl": (dict(impl="cuda"), ValueError, "impl='cuda' is not known"),
    "x": (dict(x=torch.zeros(3, 5)), ValueError, r"gate: x has shape \(3, 5\), expected \(\.\.\., 32\)"),
    "integer-x": (dict(x=torch.zeros(3, K, dtype=torch.int64)), TypeError, "gate: x has dtype torch.int64"),
    "up": (
        dict(up=LinearOperands(torch.zeros(41, K))),
        ValueError,
        r"up: weight has shape \(41, 32\), that of gate has \(40, 32\)",
    ),
    "up-dtype": (
        dict(up=LinearOperands(torch.zeros(INTERMEDIATE, K).bfloat16())),
        ValueError,
        "up: weight has dtype torch.bfloat16, that of gate has torch.float32",
    ),
    "up-device": (
        dict(up=LinearOperands(torch.empty(INTERMEDIATE, K, device="meta"))),
        ValueError,
        "up: weight has device meta, that of gate has cpu",
    ),
    "down": (
        dict(down=LinearOperands(torch.zeros(N, 39))),
        ValueError,
        r"down: weight has shape \(36, 39\), expected \(N, 40\): gate has 40 outputs",
    ),
    "down-dtype": (
        dict(down=LinearOperands(torch.zeros(N, INTERMEDIATE).bfloat16())),
        TypeError,
        "down: weight has dtype torch.bfloat16, x torch.float32",
    ),
    "vector": (dict(down=LinearOperands(torch.zeros(N))), ValueError, r"down: weight has shape \(36,\)"),
    "half-an-adapter": (
        dict(down=LinearOperands(torch.zeros(N, INTERMEDIATE), None, torch.zeros(2, INTERMEDIATE))),
        ValueError,
        "down: lora_B is None: pass both",
    ),
    "frozen": (
        dict(up=LinearOperands(torch.zeros(INTERMEDIATE, K, requires_grad=True))),
        ValueError,
        "up: weight requires grad",
    ),
}


@pytest.mark.parametrize(("changes", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(changes, error, words):
    case = Case("cpu")
    with pytest.raises(error, match=words):
        lorafa_gated_mlp(**{"x": case.x, **case.layers, **changes})


# The modules.


def make_modules(device: str, **options) -> list[nn.Module]:
    options = dict(r=8, init_lora_weights=False, device=device, **options)
    return [
        LoRAFASwiGLU(K, INTERMEDIATE, **options),
        LoRAFAGeGLU(K, INTERMEDIATE, **options),
        LoRAFAGeGLU(K, INTERMEDIATE, approximate="tanh", **options),
    ]


def check_module(mlp: nn.Module, forward, x: Tensor) -> None:
    """Assert that y and the gradients by `forward` are within the budget of the formula that people write for
    the layers of `mlp`, each in the state that it is in.
    """
    layers = dict(zip(LAYERS, (mlp.gate_proj, mlp.up_proj, mlp.down_proj), strict=True))
    dy = torch.randn(*x.shape[:-1], layers["down"].out_features, device=x.device).to(x.dtype)

    def results_of(forward, x, lora_Bs):
        x = x.detach().requires_grad_()
        y = forward(x)
        wanted = {"dx": x, **{f"dB of {name}": B for name, B in lora_Bs.items()}}
        found = torch.autograd.grad(y, tuple(wanted.values()), dy.to(x.dtype), allow_unused=True)
        return {"y": y, **dict(zip(wanted, found, strict=True))}

    def formula(to):
        own = x.dtype
        lora_Bs = {name: layer.lora_B.detach().to(own).to(to) for name, layer in layers.items()}
        lora_Bs = {name: lora_B.requires_grad_() for name, lora_B in lora_Bs.items()}

        def linear(name, rows):
            layer = layers[name]
            y = F.linear(rows, layer.weight.to(to), None if layer.bias is None else layer.bias.to(to))
            if layer.merged or not layer.adapter_enabled:
                return y
            return y + layer.scaling * F.linear(F.linear(rows, layer.lora_A.to(to)), lora_Bs[name])

        def forward(x):
            return linear("down", act(linear("gate", x), mlp.activation) * linear("up", x))

        return results_of(forward, x.to(to), lora_Bs)

    got = results_of(forward, x, {name: layer.lora_B for name, layer in layers.items()})
    exact, plain = formula(torch.float64), formula(x.dtype)
    missing = {name for name, tensor in exact.items() if tensor is None}
    assert missing == {name for name, tensor in got.items() if tensor is None}
    check_budget(*({n: tensor for n, tensor in of.items() if n not in missing} for of in (got, exact, plain)))


@implementations
@pytest.mark.parametrize("state", ["adapted", "merged", "disabled", "biased", "fp32 lora_B"])
def test_modules_equal_their_layers(device, impl, state):
    """In every state that the layers can be in."""
    dtype = torch.bfloat16 if state == "fp32 lora_B" else torch.float32
    modules = make_modules(device, bias=state == "biased", dtype=dtype)
    if device == "cpu" and impl == "triton":
        # Interpreted, one is enough: test_accuracy has all activations.
        del modules[1:]
    for mlp in modules:
        mlp.impl = impl
        x = torch.randn(3, 5, K, device=device, dtype=dtype)
        if state == "merged":
            mlp.eval()
            mlp.up_proj.merge()
        with disable_adapter(mlp) if state == "disabled" else contextlib.nullcontext():
            check_module(mlp, mlp, x)


@implementations
def test_dropout_of_modules(device, impl):
    """It acts while a layer is in training mode, by a new mask in each forward that manual_seed repeats."""
    mlp = LoRAFASwiGLU(K, INTERMEDIATE, lora_dropout=0.5, init_lora_weights=False, device=device)
    mlp.impl = impl
    x = torch.randn(M, K, device=device)
    torch.manual_seed(1)
    first, second = mlp(x), mlp(x)
    torch.manual_seed(1)
    assert torch.equal(mlp(x), first) and not torch.equal(second, first)
    mlp.eval()
    plain = mlp(x)
    assert torch.equal(mlp(x), plain) and not torch.equal(plain, first)
    check_module(mlp, mlp, x)


def test_a_merged_layer_is_not_trained():
    mlp = LoRAFASwiGLU(8, 12)
    mlp.down_proj.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        mlp(torch.zeros(2, 8))
    mlp.eval()(torch.zeros(2, 8))


def linears(bias=False, shapes=((K, INTERMEDIATE), (K, INTERMEDIATE), (INTERMEDIATE, K))) -> list[nn.Linear]:
    return [nn.Linear(*shape, bias=bias) for shape in shapes]


@pytest.mark.parametrize("make", [LoRAFASwiGLU, LoRAFAGeGLU])
def test_from_linears_shares_parameters(make):
    layers = linears(bias=True)
    objects = {id(p) for layer in layers for p in layer.parameters()}
    mlp = make.from_linears(*layers, r=3, lora_alpha=6)
    assert type(mlp) is make
    assert objects == {id(p) for name, p in mlp.named_parameters() if "lora" not in name}
    assert [name for name, p in mlp.named_parameters() if p.requires_grad] == [
        f"{name}_proj.lora_B" for name in LAYERS
    ]
    assert all(layer.r == 3 and layer.scaling == 2 for layer in mlp.children())
    # A new adapter adds nothing.
    x = torch.randn(9, K)

    def base(to):
        gate, up, down = ((layer.weight.to(to), layer.bias.to(to)) for layer in layers)
        h = act(F.linear(x.to(to), *gate), mlp.activation) * F.linear(x.to(to), *up)
        return {"y": F.linear(h, *down)}

    check_budget({"y": mlp(x)}, base(torch.float64), base(torch.float32))


def test_from_linears_leaves_what_it_is_told_to_leave():
    gate, up, down = linears()
    adapted = LoRAFALinear.from_linear(up, r=5)
    mlp = LoRAFASwiGLU.from_linears(gate, adapted, down.eval(), r=2, adapt=("down_proj",))
    assert mlp.gate_proj is gate and not gate.weight.requires_grad
    assert mlp.up_proj is adapted and adapted.r == 5
    assert mlp.down_proj.weight is down.weight and mlp.down_proj.r == 2 and not mlp.down_proj.training
    mlp(torch.randn(3, K)).sum().backward()
    assert adapted.lora_B.grad is not None and mlp.down_proj.lora_B.grad is not None


def test_from_linears_of_geglu_takes_the_form_of_gelu():
    assert LoRAFAGeGLU.from_linears(*linears(), approximate="tanh").activation == "gelu_tanh"
    assert LoRAFAGeGLU.from_linears(*linears()).activation == "gelu"
    for make in (LoRAFAGeGLU.from_linears, LoRAFAGeGLU):
        with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
            make(*(linears() if make is not LoRAFAGeGLU else (8, 8)), approximate="erf")


def test_from_linears_refuses_what_does_not_fit():
    def call(shapes=((8, 12), (8, 12), (12, 8)), **options):
        LoRAFASwiGLU.from_linears(*linears(shapes=shapes), **options)

    with pytest.raises(ValueError, match="up_proj has in_features 9, expected 8: gate_proj is 8 → 12"):
        call(((8, 12), (9, 12), (12, 8)))
    with pytest.raises(ValueError, match="up_proj has out_features 13, expected 12"):
        call(((8, 12), (8, 13), (12, 8)))
    with pytest.raises(ValueError, match="down_proj has in_features 8, expected 12"):
        call(((8, 12), (8, 12), (8, 12)))
    with pytest.raises(ValueError, match=r"adapt names \['gate'\]"):
        call(adapt=["gate"])
    with pytest.raises(ValueError, match="r must be an integer of at least 1"):
        call(r=0)
    gate, up, down = linears()
    with pytest.raises(TypeError, match=r"up_proj: Sequential is not a torch\.nn\.Linear"):
        LoRAFASwiGLU.from_linears(gate, nn.Sequential(up), down)
    with pytest.raises(ValueError, match=r"down_proj has dtype torch\.float64, gate_proj has torch\.float32"):
        LoRAFASwiGLU.from_linears(gate, up, down.double())
    assert gate.weight.requires_grad and not any(isinstance(m, LoRAFALinear) for m in (gate, up, down))


def test_modules_copy_pickle_and_load():
    for mlp in make_modules("cpu"):
        x = torch.randn(3, K)
        want = mlp(x)
        for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
            assert torch.equal(other(x), want) and other.activation == mlp.activation
        fresh = type(mlp).from_linears(*linears())
        assert fresh.state_dict().keys() == mlp.state_dict().keys()
        assert mlp.state_dict().keys() == {
            f"{name}_proj.{part}" for name in LAYERS for part in ("weight", "lora_A", "lora_B")
        }
    swiglu = make_modules("cpu")[0]
    fresh = LoRAFASwiGLU.from_linears(*linears(), r=8)
    fresh.load_state_dict(swiglu.state_dict())
    assert torch.equal(fresh(x), swiglu(x))


def test_modules_on_the_meta_device():
    mlp = LoRAFASwiGLU(K, INTERMEDIATE, device="meta")
    y = mlp(torch.empty(3, K, device="meta", requires_grad=True))
    assert y.shape == (3, K) and y.device.type == "meta"
