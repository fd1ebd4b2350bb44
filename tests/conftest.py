"""Decides, before anything imports Triton, whether kernels are interpreted (no GPU) or compiled (GPU), and
offers the cases.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import random
import sys
import tempfile

import pytest
import slow_cases
import torch
from installed import OF_PEFT, OF_TRITON
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

GPU = torch.cuda.is_available()
if not GPU:
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before conftest could set TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"

# Neither a plan that the user pinned nor one that was measured on this machine may change what is tested.
os.environ.pop("LORAFA_KERNELS_PLAN", None)
os.environ["LORAFA_KERNELS_CACHE"] = os.path.join(tempfile.gettempdir(), "lorafa-kernels-no-such-cache")

try:
    import triton  # noqa: F401

    TRITON = True
except ImportError:
    TRITON = False

try:
    import hypothesis
except ImportError:
    hypothesis = None

DEVICES = ("cpu", "cuda")
# In one process Triton either interprets or compiles, so on a machine with a GPU its kernels do not run on
# CPU tensors.
TRITON_DEVICE = "cuda" if GPU else "cpu"


def on_device(device: str, *values, id: str | None = None):
    """Return a pytest case that carries the marker `gpu` if it needs a GPU."""
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return pytest.param(device, *values, marks=marks, id=id or "-".join((device, *map(str, values))))


def implementation_cases() -> list:
    """Cases (device, impl) for every implementation on every device."""
    cases = [on_device(device, impl) for device in DEVICES for impl in ("reference", "torch")]
    cases += [on_device(device, "triton") for device in (("cpu",) if not GPU else ("cuda",))]
    return cases


def pytest_addoption(parser):
    group = parser.getgroup("lorafa_kernels")
    group.addoption(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="run the files, and the tests of each, in the random order of this seed",
    )
    group.addoption(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads of torch in each process (default 1: several workers, pytest -n, share the cores)",
    )


def pytest_configure(config):
    torch.set_num_threads(config.getoption("threads"))
    # torch keeps compiled graphs by what was traced, which leaves out the schemas of operators: code compiled
    # for another version of this library would run here.
    torch.compiler.config.force_disable_caches = True
    import_everything()
    if hypothesis is not None:
        # Neither is a property of what is tested: a busy machine is slow.
        hypothesis.settings.register_profile(
            "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
        )
        hypothesis.settings.load_profile("any machine")


def import_everything() -> None:
    """Import every module of the package now. One that is imported first while a test has replaced a function
    would keep the replacement for good, if it takes functions by name.
    """
    import lorafa_kernels

    for module in pkgutil.walk_packages(lorafa_kernels.__path__, "lorafa_kernels."):
        # What is built on another library is imported when it is used: peft takes seconds.
        if module.name == "lorafa_kernels.__main__" or module.name.startswith(OF_PEFT):
            continue
        if TRITON or not module.name.startswith(OF_TRITON):
            # What an optional package is missing for is tested where it is needed; so is a name that another
            # Triton does not have in Gluon.
            of_gluon = module.name.startswith("lorafa_kernels.kernels.expand_ws")
            with contextlib.suppress(ImportError if of_gluon else ModuleNotFoundError):
                importlib.import_module(module.name)


def pytest_report_header(config):
    kernels = "not installed" if not TRITON else "compiled" if GPU else "interpreted"
    gpu = "yes" if GPU else "none, gpu tests deselected"
    seed = config.getoption("shuffle")
    order = "as written" if seed is None else f"random (again: --shuffle {seed})"
    return [
        f"torch {torch.__version__}, Triton kernels {kernels}, GPU: {gpu}",
        f"order {order}, threads {torch.get_num_threads()}, instructions {cpu_capability()}",
    ]


def cpu_capability() -> str:
    """The instruction set of torch's own CPU kernels, which ATEN_CPU_CAPABILITY restricts."""
    return torch.backends.cpu.get_cpu_capability()


# First: pytest deselects by markers.
@pytest.hookimpl(tryfirst=True, specname="pytest_collection_modifyitems")
def pytest_mark_slow_cases(config, items):
    """Mark what slow_cases.json lists. A case that is listed and not there has another name by now."""
    if GPU:
        return
    listed = slow_cases.read()
    for item in items:
        if slow_cases.name_of(item.nodeid) in listed:
            item.add_marker(pytest.mark.slow)
            listed.remove(slow_cases.name_of(item.nodeid))
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    if whole and listed:
        raise pytest.UsageError(f"tests/slow_cases.json lists what is not there: {sorted(listed)[:5]}")


# Last: pytest itself sorts by the fixtures of modules and sessions.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    needs_gpu = [] if GPU else [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    if (seed := config.getoption("shuffle")) is not None:
        items[:] = shuffled(items, seed)


def shuffled(items: list, seed: int) -> list:
    """The tests in a random order, those of a file still one after another: a file's fixtures are made once.
    The same in each worker of pytest -n, which must agree on the order.
    """
    draw = random.Random(seed)
    files: dict[str, list] = {}
    for item in items:
        files.setdefault(str(item.path), []).append(item)
    groups = list(files.values())
    draw.shuffle(groups)
    for group in groups:
        draw.shuffle(group)
    return [item for group in groups for item in group]


@pytest.fixture(params=[on_device(device) for device in DEVICES])
def device(request) -> str:
    return request.param


@pytest.fixture(params=[on_device(TRITON_DEVICE)])
def triton_device(request) -> str:
    pytest.importorskip("triton")
    return request.param


@pytest.fixture
def fake_gpu(monkeypatch):
    """A function (limits, name, capability) that makes torch see one GPU, to choose what would run there."""
    pytest.importorskip("triton")
    from lorafa_kernels.plan.choice import forget_plans

    def install(limits, name: str, capability: tuple[int, int]) -> None:
        tile = importlib.import_module("lorafa_kernels.kernels.tile")
        monkeypatch.setattr(tile, "device_limits", lambda device: limits)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        forget_plans()

    yield install
    forget_plans()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# pytest's own; torch's, of its compiler's first use; bench's, of its profiler's; Lightning's, of its import.
MAY_CHANGE = (
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "KINETO_LOG_LEVEL",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
)
COMPILERS_OWN = "_TORCHINDUCTOR_"


def process_state() -> dict[str, object]:
    """What belongs to the whole process and a test may change for its own time alone."""
    from lorafa_kernels.plan.pin import pinned

    precision = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    hooks = nn.modules.module
    variables = {
        f"variable {name}": value
        for name, value in os.environ.items()
        if name not in MAY_CHANGE and not name.startswith(COMPILERS_OWN)
    }
    return {
        **variables,
        "folder": os.getcwd(),
        # setuptools, which torch's compiler imports, adds its own packages.
        "import path": [folder for folder in sys.path if not folder.endswith("setuptools/_vendor")],
        "modules that cannot be imported": {name for name, module in sys.modules.items() if module is None},
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "memory filled": torch.utils.deterministic.fill_uninitialized_memory,
        "precision of fp32 products": precision,
        "hooks of all modules": (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "modes": len(_get_current_dispatch_mode_stack()),
        "pinned plan": pinned(),
        # setuptools keeps Python's own distutils once anyone looks for pip in Python < 3.12; torch's compiler
        # needs setuptools' own.
        "distutils of Python": sum("spec_for_distutils" in vars(finder) for finder in sys.meta_path),
    }


def nothing_is_left():
    """A test that leaves something behind for the next ones fails itself, whatever order they run in."""
    before = process_state()
    yield
    after = process_state()
    left = {
        name: (before.get(name), after.get(name))
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name)
    }
    assert not left, f"left behind (before, after): {left}"


_process_state = pytest.fixture(autouse=True)(nothing_is_left)
# Fixtures of a module are there before a test's own state is read.
_process_state_of_module = pytest.fixture(autouse=True, scope="module")(nothing_is_left)


@pytest.fixture(autouse=True)
def launches_of_its_own():
    """A kernel that a test replaces is looked up again: nothing is kept from tests before."""
    if launch := sys.modules.get("lorafa_kernels.kernels.launch"):
        launch.forget_launches()
