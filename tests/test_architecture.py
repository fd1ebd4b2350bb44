"""Imports point downward, kernels and the reference never meet, and nothing optional is imported at the
top.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from installed import OF_PEFT, OF_TRITON

import bench
import lorafa_kernels

PACKAGE = Path(lorafa_kernels.__file__).parent
# Lowest first: a folder, or a module outside of folders, may import what stands on a lower floor. What stands
# on one floor does not import each other; the modules of a folder may, without a circle.
FLOORS = (
    {"_safe_path", "_version", "command_line", "engines", "files", "flops", "operands", "philox"},
    {"plan"},
    {"kernels"},
    {"dispatch"},
    {"base", "correction"},
    {"linear"},
    {"group"},
    {"mixed", "mlp", "norm"},
    {"nn"},
    {"model"},
    {"checks", "integrations", "memory"},
    {"tune"},
    {"__main__"},
)
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}
ALLOWED_THIRD_PARTY = {"torch", "safetensors", "triton"}
# The command `tune` shows its progress with it, and says so where it is missing.
# doctor says whether Triton's interpreter can run, which needs numpy.
# The planner of memory builds transformers' models, and draws with matplotlib where asked.
OPTIONAL = {
    "tune.command": {"rich"},
    "checks.doctor": {"numpy"},
    "integrations.peft": {"peft"},
    "integrations.transformers": {"transformers"},
    "model.targets": {"peft"},
    "model.layouts": {"transformers"},
    "memory.models": {"transformers"},
    "memory.plot": {"matplotlib"},
    "base.bnb": {"bitsandbytes"},
}
# Written on top of a library, and imported by a function of the module beside them.
BUILT_ON = {
    "integrations.peft_adapter": {"peft"},
    "integrations.peft_layers": {"peft", "transformers"},
    "integrations.peft_linear4bit": {"peft"},
    "integrations.peft_quantised": {"peft"},
}
# They compose kernels, and are imported where those are.
COMPOSED = ("linear.fused", "group.fused", "mixed.fused")


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


def unit_of(name: str) -> str:
    return name.partition(".")[0]


def test_what_only_an_optional_package_makes_importable_is_known_by_its_name():
    """Where the package is installed without Triton and PEFT, the rest is imported by these names."""
    for prefix, names in ((OF_TRITON, COMPOSED), (OF_PEFT, BUILT_ON)):
        found = {name for name in modules() if f"lorafa_kernels.{name}".startswith(prefix)}
        assert found - {name for name in found if name.startswith("kernels.")} == set(names)


def test_every_module_has_its_floor():
    assert {unit_of(name) for name in PLAIN} == set(FLOOR)


@pytest.mark.parametrize("name", PLAIN)
def test_imports_point_downward(name):
    for other in own(imported(name, modules()[name])):
        if unit_of(other) != unit_of(name):
            assert FLOOR[unit_of(other)] < FLOOR[unit_of(name)], f"{name} imports {other}"


# bench/: what measures, what runs it and keeps the results, what reads them; then the commands.
BENCH = Path(bench.__file__).parent
BENCH_FLOORS = {"measure": 0, "run": 1, "report": 2, "gate": 3, "gpu": 3, "quality": 3}


@pytest.mark.parametrize("folder", BENCH_FLOORS)
def test_imports_of_bench_point_downward(folder):
    allowed = {name for name, floor in BENCH_FLOORS.items() if floor < BENCH_FLOORS[folder]}
    for path in (BENCH / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module:
                assert node.module.split(".")[0] in allowed, f"{folder}/{path.name}, line {node.lineno}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: own(imported(name, path)) - {name} for name, path in modules().items()}
    circle = circle_in(graph)
    assert circle is None, " -> ".join(circle)


def circle_in(graph: dict[str, set[str]]) -> list[str] | None:
    """Return nodes of which each has an edge to the next, and the last is the first, or None."""
    done: set[str] = set()

    def follow(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for other in sorted(graph.get(node, ())):
            if found := follow(other, [*path, node]):
                return found
        done.add(node)
        return None

    return next((found for node in sorted(graph) if (found := follow(node, []))), None)


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def private_names(name: str, path: Path) -> set[str]:
    """Names with an underscore that a module takes from other modules of this package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own_modules, found = set(), set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        of_package = node.level or (node.module or "").split(".")[0] == "lorafa_kernels"
        for alias in node.names if of_package else ():
            if alias.name.startswith("_") and alias.name not in {"_safe_path", "_version", "__version__"}:
                found.add(alias.name)
            own_modules.add(alias.asname or alias.name)
    for node in ast.walk(tree):
        # A class, too, is imported; its own names with one underscore are as private.
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and node.value.id in own_modules:
                found.add(f"{node.value.id}.{node.attr}")
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_underscore_name_crosses_a_file(name):
    assert not private_names(name, modules()[name])


@pytest.mark.parametrize("name", PLAIN)
def test_third_party_imports(name):
    names = {n.split(".")[0] for n in imported(name, modules()[name])}
    third_party = names - set(sys.stdlib_module_names) - {"lorafa_kernels"}
    third_party -= BUILT_ON.get(name, set())
    assert third_party - OPTIONAL.get(name, set()) <= ALLOWED_THIRD_PARTY
    top = {n.split(".")[0] for n in imported(name, modules()[name], top_level_only=True)}
    assert not top & OPTIONAL.get(name, set())
    if not name.startswith("kernels.") and name not in COMPOSED:
        assert "triton" not in top, "Triton is imported lazily outside of kernels/"


def test_reference_and_kernels_never_meet():
    known = modules()
    for name in PLAIN:
        found = own(imported(name, known[name]))
        if name.startswith("kernels.") or name in COMPOSED:
            assert not found & {"linear.reference", "linear.library"}
        if name in ("linear.reference", "linear.library"):
            assert found == {"philox"}
        if name in ("philox", "plan.config", "tune.models"):
            assert not found
        if name == "plan.defaults":
            assert found == {"plan.config"}


def test_public_names():
    names = {n for n in lorafa_kernels.__all__ if n != "__version__"}
    assert names == {
        "LoRAFAConfig",
        "LoRAFAGeGLU",
        "LoRAFALinear",
        "LoRAFALinearGroup",
        "LoRAFASwiGLU",
        "adapter_index",
        "adapter_names",
        "add_adapter",
        "apply_lorafa",
        "delete_adapter",
        "disable_adapter",
        "explain",
        "load_adapter",
        "lorafa_linear",
        "lorafa_parameters",
        "lorafa_state_dict",
        "merge_adapter",
        "quantize_base",
        "save_adapter",
        "set_adapter",
        "unload_adapter",
        "unmerge_adapter",
    }
    assert all(hasattr(lorafa_kernels, name) for name in names)
