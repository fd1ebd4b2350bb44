"""Imports point downward, kernels and the reference never meet, and nothing optional is imported at the
top.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import lorafa_kernels

PACKAGE = Path(lorafa_kernels.__file__).parent
# Lowest first: a module may import what stands before it. Modules of one level do not import each other.
LEVELS = [
    {
        "_safe_path",
        "_version",
        "group.operands",
        "command_line",
        "files",
        "engines",
        "model.patterns",
        "model.exchange",
        "flops",
        "philox",
        "plan.config",
        "tune.models",
    },
    {"memory.planner", "linear.reference", "linear.library", "plan.recipe", "kernels.tile"},
    {"plan.cost", "plan.tables", "plan.pin"},
    {"plan.make"},
    {"plan.choice"},
    {"kernels.shrink", "kernels.expand_tma", "kernels.gated", "kernels.grad", "kernels.recompute"},
    {"kernels.expand", "kernels.group_tma"},
    {"linear.fused", "kernels.group"},
    {"group.fused"},
    {"group.reference", "group.library", "mlp.activation"},
    {"linear.ops"},
    {"linear.node", "group.ops", "mlp.ops"},
    {"linear.api"},
    {"checks.budget", "group.api", "norm", "nn.linear"},
    {"mlp.api", "nn.group"},
    {"nn.mlp", "model.placing.shield", "model.placing.guards", "model.placing.bypass"},
    {"model.placing.symbolic", "model.placing.projections", "model.placing.first_steps"},
    {"model.placing.recognise", "model.placing.members"},
    {"model.placing.fused"},
    {"model.placing.place"},
    {"model.adapt", "checks.blocks", "nn.explain", "tune.search"},
    {"model.checkpoint", "checks.doctor", "tune.command"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
ALLOWED_THIRD_PARTY = {"torch", "safetensors", "triton"}
# The command `tune` shows its progress with it, and says so where it is missing.
# doctor says whether Triton's interpreter can run, which needs numpy.
OPTIONAL = {"tune.command": {"rich"}, "checks.doctor": {"numpy"}}


def modules() -> dict[str, Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in files}


def imported(name: str, path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of what a module imports."""
    package = ["lorafa_kernels", *name.split(".")[:-1]]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    """Reduce imported names to modules of this package."""
    known = modules()
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] != "lorafa_kernels":
            continue
        for end in (len(parts), len(parts) - 1):
            candidate = ".".join(parts[1:end])
            if candidate in known:
                found.add(candidate)
                break
            if f"{candidate}.__init__" in known:
                break
    return found


PLAIN = [name for name in modules() if not name.endswith("__init__")]


def test_every_module_has_its_level():
    assert set(PLAIN) == set(LEVEL)


@pytest.mark.parametrize("name", PLAIN)
def test_imports_point_downward(name):
    for other in own(imported(name, modules()[name])):
        assert LEVEL[other] < LEVEL[name], f"{name} imports {other}"


@pytest.mark.parametrize("name", PLAIN)
def test_third_party_imports(name):
    names = {n.split(".")[0] for n in imported(name, modules()[name])}
    third_party = names - set(sys.stdlib_module_names) - {"lorafa_kernels"}
    assert third_party - OPTIONAL.get(name, set()) <= ALLOWED_THIRD_PARTY
    top = {n.split(".")[0] for n in imported(name, modules()[name], top_level_only=True)}
    assert not top & OPTIONAL.get(name, set())
    if not name.startswith("kernels."):
        assert "triton" not in top, "Triton is imported lazily outside of kernels/"


def test_reference_and_kernels_never_meet():
    known = modules()
    for name in PLAIN:
        found = own(imported(name, known[name]))
        if name.startswith("kernels."):
            assert not found & {"linear.reference", "linear.library"}
        if name in ("linear.reference", "linear.library"):
            assert found == {"philox"}
        if name in ("philox", "plan.config", "tune.models"):
            assert not found


def test_public_names():
    names = {n for n in lorafa_kernels.__all__ if n != "__version__"}
    assert names == {
        "LoRAFAConfig",
        "LoRAFAGeGLU",
        "LoRAFALinear",
        "LoRAFALinearGroup",
        "LoRAFASwiGLU",
        "apply_lorafa",
        "disable_adapter",
        "explain",
        "load_adapter",
        "lorafa_linear",
        "lorafa_parameters",
        "lorafa_state_dict",
        "merge_adapter",
        "save_adapter",
        "unload_adapter",
        "unmerge_adapter",
    }
    assert all(hasattr(lorafa_kernels, name) for name in names)
