"""explain says what runs: its steps are compared with the launches and products that a layer makes."""

from __future__ import annotations

import importlib
from dataclasses import asdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorafa_kernels import LoRAFALinear
from lorafa_kernels.linear import ops
from lorafa_kernels.nn.explain import explain
from lorafa_kernels.plan.choice import choose
from lorafa_kernels.plan.config import KNOWN_DEVICES, DeviceLimits, KernelConfig, KernelPlan
from lorafa_kernels.plan.defaults import default_config
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import Recipe

M, N, K, R = 12, 24, 40, 4


@pytest.fixture(autouse=True)
def unwatched(monkeypatch):
    """Products run as they do where no mode records them."""
    monkeypatch.setattr("lorafa_kernels.dispatch.watching_modes", lambda: 0)


class Products(TorchDispatchMode):
    """Records the library products that run, and casts of tensors of the weight's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            self.calls.append(name)
        elif name == "_to_copy" and args[0].shape == (N, K):
            self.calls.append("cast")
        return func(*args, **(kwargs or {}))


def products(steps, bias: bool) -> list[str]:
    """The products that PyTorch runs for an explanation's steps."""
    names = {"matmul": "mm", "linear": "addmm" if bias else "mm"}
    return [names.get(step.call, step.call) for step in steps]


def run(layer, dtype=torch.float32, autocast=None) -> tuple[list[str], list[str]]:
    """The products of one forward and one backward of `layer` on the CPU."""
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    with Products() as forward, torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = layer(x)
    dy = torch.randn_like(y)
    with Products() as backward:
        y.backward(dy)
    return forward.calls, backward.calls


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("frozen", [False, True], ids=["dx-and-dB", "dx-alone"])
@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_library_products_are_those_that_run(impl, corrected, frozen, bias):
    layer = LoRAFALinear(K, N, bias=bias, r=R, gradient_correction=corrected)
    layer(torch.randn(M, K))  # makes the inverse, once
    layer.impl = impl
    layer.lora_B.requires_grad_(not frozen)
    told = explain(layer, M=M)
    assert (told.impl, told.M, told.N, told.K, told.R) == (impl, M, N, K, R)
    assert (products(told.forward, bias), products(told.backward, bias)) == run(layer)
    assert told.limits is None and not told.plans
    assert ("bias" in str(told)) == bias
    assert ("inverse" in str(told)) == (corrected and not frozen)


def test_autocast_casts_the_weight_each_time(monkeypatch):
    # Under autocast the operators run, whose insides the recorder does not see: call what they call.
    for name in ("forward", "backward"):
        monkeypatch.setattr(ops, f"_{name}_op", getattr(ops, f"_{name}"))
    layer = LoRAFALinear(K, N, r=R)
    told = explain(layer, M=M, device="cpu", dtype=torch.bfloat16)
    assert told.forward[0].call == "cast"
    forward, backward = run(layer, autocast=torch.bfloat16)
    assert (products(told.forward, True), products(told.backward, True)) == (forward, backward)


@pytest.mark.parametrize("state", ["merged", "switched off"])
def test_merged_or_disabled_layer_is_a_plain_linear(state):
    layer = LoRAFALinear(K, N, r=R).eval()
    if state == "merged":
        layer.merge()
    else:
        layer.adapter_enabled = False
    told = explain(layer, M=M)
    assert told.impl == "linear" and state in told.reason
    assert (products(told.forward, True), products(told.backward, True)) == run(layer)


KERNELS = {
    "shrink": "shrink",
    "shrink_sum": "shrink",
    "expand": "expand",
    "expand_tma": "expand_tma",
    "recompute": "recompute",
    "grad": "grad",
    "grad_sum": "grad",
}
PORTABLE = KernelConfig(32, 32, 16, 16, 2, 4, 1)
SPLIT = KernelConfig(32, 0, 16, 16, 1, 4, 1, SPLIT_K=2)
ONE_CHUNK = KernelConfig(32, 32, 0, 16, 1, 4, 1)
PINNED = {
    "heuristic": None,
    "one-pass": Recipe("fused", KernelPlan(expand=PORTABLE, grad=ONE_CHUNK)),
    "two-passes": Recipe("fused", KernelPlan(expand=PORTABLE, shrink=SPLIT, one_pass=False)),
    "library-one-pass": Recipe("library", KernelPlan()),
    "library-three-products": Recipe("library", KernelPlan(one_pass=False)),
}


class Launches:
    """Records the kernels that are launched, with their options."""

    def __init__(self, monkeypatch) -> None:
        self.found: list[tuple[str, dict]] = []
        for name, file in KERNELS.items():
            module = importlib.import_module(f"lorafa_kernels.kernels.{file}")
            kernel = f"_{name}_kernel"
            monkeypatch.setattr(module, kernel, self.recording(name, getattr(module, kernel)))

    def recording(self, name, kernel):
        found = self.found

        class Recording:
            def __getitem__(self, grid):
                def launch(*args, **options):
                    found.append((name.removesuffix("_tma"), options))
                    return kernel[grid](*args, **options)

                return launch

        return Recording()


@pytest.mark.parametrize(
    ("pin", "dtype", "rows"),
    [
        pytest.param("heuristic", torch.float32, 12, id="fp32-few-rows"),
        pytest.param("heuristic", torch.bfloat16, 12, id="bf16-few-rows"),
        pytest.param("heuristic", torch.bfloat16, 300, id="bf16"),
        *(pytest.param(pin, torch.float32, 70, id=pin) for pin in PINNED),
    ],
)
@pytest.mark.parametrize("frozen", [False, True], ids=["dx-and-dB", "dx-alone"])
def test_launches_and_configs_are_those_that_run(triton_device, monkeypatch, pin, dtype, rows, frozen):
    K, N = 80, 72
    recipe = PINNED[pin]
    back = "backward_input" if frozen else "backward"
    impl = "auto" if recipe and recipe.name == "library" else "triton"
    recipes = {op: recipe for op in ("forward", back)} if recipe else {}
    layer = LoRAFALinear(K, N, r=R, device=triton_device, dtype=dtype)
    layer.impl = impl
    layer.lora_B.requires_grad_(not frozen)
    launches = Launches(monkeypatch)
    with pin_plan(recipes):
        y = layer(torch.randn(rows, K, device=triton_device, dtype=dtype, requires_grad=True))
        forward = list(launches.found)
        y.backward(torch.randn_like(y))
        backward = launches.found[len(forward) :]
        told = explain(layer, M=rows)

    for op, steps, ran in (("forward", told.forward, forward), (back, told.backward, backward)):
        kernels = [step.call for step in steps if step.call in KERNELS]
        assert kernels == [name for name, _ in ran]
        planned = told.plans.get(op)
        configs = planned.configs if planned else {}
        used = {"expand" if name == "recompute" else name.removesuffix("_sum") for name in kernels}
        assert set(configs) == used
        assert all(name in str(told) for name in kernels)
        for name, options in ran:
            config = configs.get("expand" if name == "recompute" else name)
            config = asdict(config) if config else {}
            for option in config.keys() & options.keys():
                assert options[option] == config[option], f"{op} {name}: {option}"
        if recipe and planned:
            assert planned.plan.source == "pinned" and "source: pinned (by pin_plan)" in str(told)
    if pin == "library-one-pass" and not frozen:
        assert [step.call for step in told.backward] == ["grad", "grad_sum", "mm", "addmm_"]
    if pin == "two-passes":
        assert "shrink_sum" in {step.call for step in told.backward}


UNKNOWN = DeviceLimits("sm_990", 40 * 1024, 7)


@pytest.fixture
def unknown_gpu(fake_gpu):
    """A GPU of an architecture that nobody has heard of, with little shared memory."""
    fake_gpu(UNKNOWN, "Unheard-of 9000", (99, 0))


def test_unknown_gpu_gets_defaults_that_fit(unknown_gpu):
    told = explain((2048, 4096, 4096, 16))
    assert (told.impl, told.device, told.dtype) == ("triton", torch.device("cuda"), torch.bfloat16)
    assert "Unheard-of 9000" in told.reason and "sm_990" in str(told)
    for planned in told.plans.values():
        assert planned.plan.source == "heuristic" and planned.plan.predicted_us > 0
        assert "guessed from 7 multiprocessors of sm_990" in planned.plan.reason
    fused = explain((2048, 4096, 4096, 16), impl="triton")
    configs = {name: c for planned in fused.plans.values() for name, c in planned.configs.items()}
    assert {"shrink", "expand", "grad"} == set(configs)
    for op, config in configs.items():
        assert config == default_config(op, UNKNOWN, 2, 2048, 16)


def test_text_has_plan_source_and_predictions(fake_gpu):
    fake_gpu(DeviceLimits("sm_90", 227 * 1024, 132), "NVIDIA H200", (9, 0))
    told = explain((8192, 4096, 4096, 16))
    text = str(told)
    assert text.isascii()
    assert "source: heuristic (least predicted time, published figures of H200)" in text
    assert "; dB beside dx gains less than 3%, and was not timed)" in text
    for op in ("forward", "backward"):
        plan = told.plans[op].plan
        # dB beside dx must gain more than the model of the cost can be off.
        others = [us for name, us in plan.predicted if name != "fused, dB beside dx"]
        assert plan.predicted_us == min(others)
        assert {name.split(",")[0] for name, _ in plan.predicted} == {"fused", "library"}
        assert f"predicted: {plan.predicted[0][0]} {plan.predicted_us:.1f} us; " in text


def test_text_says_what_runs_beside_what(fake_gpu):
    fake_gpu(KNOWN_DEVICES["sm_90"], "NVIDIA H100 80GB HBM3", (9, 0))
    words = "dB beside dx: the kernel of dB, which nothing waits for, runs while that of dx does"
    told = explain((8192, 4096, 4096, 64))
    assert words in str(told)
    assert [step.call for step in told.backward] == ["shrink", "expand", "grad", "grad_sum"]
    # Of few rows dx and dz are one launch, whatever is pinned.
    with pin_plan({"backward": Recipe("fused", KernelPlan(one_pass=False, beside=True))}):
        assert words in str(explain((8192, 4096, 4096, 16))) and words not in str(explain((16, 64, 64, 16)))
    assert words not in str(explain((8192, 4096, 4096, 16)))


def test_old_gpu_and_fp64_say_why_not_triton(unknown_gpu, monkeypatch):
    assert "float64" in explain((8, 8, 8, 8), dtype=torch.float64).reason
    choose.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    told = explain((8, 8, 8, 8))
    assert told.impl == "torch" and "7.5" in told.reason


def test_defaults_come_from_the_layer():
    layer = LoRAFALinear(K, N, r=R, dtype=torch.float64)
    layer.impl = "reference"
    told = explain(layer)
    assert (told.impl, told.dtype, told.device) == ("reference", torch.float64, torch.device("cpu"))
    assert (told.N, told.K, told.R) == (N, K, R) and told.M > 0
    assert explain(layer, impl="torch").impl == "torch"


def test_dropout_shows_while_training(fake_gpu):
    """In the formulas of the kernels and of the products, and in the plan; not in eval()."""
    layer = LoRAFALinear(64, 96, r=4, lora_dropout=0.25)
    plain = str(explain(layer.eval()))
    text = str(explain(layer.train()))
    dropped = "z = s/(1 - p) * ((x * keep) @ lora_A.T)", "dx += keep/(1 - p) * (dz @ lora_A)"
    for words in ("dropout: p=0.25", *dropped):
        assert words in text and words not in plain
    fake_gpu(KNOWN_DEVICES["sm_90"], "NVIDIA H200", (9, 0))
    layer = LoRAFALinear(4096, 4096, r=16, lora_dropout=0.25, device="meta", dtype=torch.bfloat16)
    found = [explain(layer.train(mode), M=8192, device="cuda", impl="triton") for mode in (True, False)]
    dropping, idle = (one.plans["backward"].configs["expand"] for one in found)
    assert dropping.EPILOGUE_SUBTILE > idle.EPILOGUE_SUBTILE
    assert "keep/(1 - p) * (dz @ lora_A)" in str(found[0]) and "keep" not in str(found[1])


def test_shapes_on_the_cpu():
    told = explain((M, N, K, R), device="cpu")
    assert (told.impl, told.dtype) == ("torch", torch.float32)
    assert told.reason == choose("auto", torch.device("cpu"), torch.float32).reason
    assert explain([0, N, K, R], device="cpu").M == 0


def test_layer_without_data():
    layer = LoRAFALinear(K, N, r=R, device="meta")
    told = explain(layer)
    assert told.device.type == "meta" and "pass device=" in told.reason
    assert explain(layer, device="cpu") == explain((2048, N, K, R), device="cpu")


def test_text_is_ascii_and_complete():
    text = str(explain((M, N, K, R), device="cpu"))
    assert text.isascii()
    for fact in ("M=12 N=24 K=40 R=4", "float32 on cpu", "torch (x is on the CPU", "forward", "backward"):
        assert fact in text


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        pytest.param(torch.nn.Linear(2, 2), {}, TypeError, "expected a LoRAFALinear or", id="layer"),
        pytest.param((1, 2, 3), {}, ValueError, "3 sizes .1, 2, 3., expected four", id="three-sizes"),
        pytest.param((1, 2, 3, 0), {}, ValueError, "R is 0, expected at least 1", id="rank-0"),
        pytest.param((-1, 2, 3, 4), {}, ValueError, "M is -1", id="negative"),
        pytest.param((1, 2.0, 3, 4), {}, TypeError, "N is 2.0, expected an integer", id="float"),
        pytest.param((1, 2, True, 4), {}, TypeError, "K is True", id="bool"),
        pytest.param((1, 2, 3, 4), {"M": 5}, TypeError, "M=5 with shapes", id="M-twice"),
        pytest.param((1, 2, 3, 4), {"impl": "cuda"}, ValueError, "impl='cuda' is not known", id="impl"),
        pytest.param((1, 2, 3, 4), {"dtype": torch.int8}, TypeError, "int8, expected one of", id="dtype"),
        pytest.param((1, 2, 3, 4), {"device": "gpu"}, ValueError, "device is 'gpu'", id="device"),
        pytest.param((1, 2, 3, 4), {"device": "cuda:99"}, ValueError, "cuda:99 is not there", id="no-gpu"),
        pytest.param(
            (1, 2, 3, 4),
            {"impl": "triton", "device": "cpu", "dtype": torch.float64},
            RuntimeError,
            "cannot run",
            id="triton-impossible",
        ),
    ],
)
def test_errors(shapes, options, error, message):
    with pytest.raises(error, match=message):
        explain(shapes, **options)
