"""No test and no example compares numbers with a tolerance of its own or with torch's defaults: the same bits
(accuracy.assert_same, torch.equal), or the error budget (accuracy.check_budget, Budget).
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    str(path.relative_to(ROOT)) for folder in ("tests", "examples") for path in (ROOT / folder).rglob("*.py")
)
# What compares within a tolerance, and pytest.approx, by the last part of its name.
COMPARING = {
    "assert_close",
    "assert_allclose",
    "assert_almost_equal",
    "assert_approx_equal",
    "assert_array_almost_equal",
    "assert_array_almost_equal_nulp",
    "assert_array_max_ulp",
    "allclose",
    "isclose",
    "approx",
    "assertAlmostEqual",
}
# How a tolerance is called where something takes one.
TOLERANCES = {"rtol", "atol", "rel", "abs_tol", "rel_tol", "tol"}
# Sites that may stay, by file and function. None compares tensors or results of a kernel.
WRITTEN = "a number of a report beside the one it was rounded from"
MODELLED = "times and rates of a model of the cost, floats of Python beside published figures"
COUNTED = "a quotient of byte counts beside the number that the documents print"
PROMISED = "what docs/design.md promises of fp64 beside another implementation, or of 50 steps"
PROCESSES = "losses of a whole training, floats of Python, on two processes beside one: what docs promise"
ALLOWED = {
    ("tests/bench/test_bench_cases.py", "test_floor_is_the_larger_of_arithmetic_and_bytes"): MODELLED,
    ("tests/bench/test_bench_memory.py", "test_units_of_a_llama_block"): COUNTED,
    ("tests/bench/test_bench_memory.py", "test_error_of_one_gradient_in_a_chain_is_pooled"): (
        "a mean of floats of Python, of squares whose root is taken"
    ),
    (
        "tests/bench/test_bench_report.py",
        "test_a_change_is_beyond_the_spread_if_the_intervals_are_apart",
    ): WRITTEN,
    ("tests/bench/test_bench_training.py", "test_contenders_train_alike"): WRITTEN,
    ("tests/bench/test_bench_training.py", "test_training_at_the_largest_batch"): WRITTEN,
    ("tests/plan/test_cost.py", "test_ceilings_of_the_reference_gpu_are_those_measured_there"): MODELLED,
    ("tests/plan/test_cost.py", "test_a_guess_is_near_the_published_figures_of_a_relative"): MODELLED,
    ("tests/plan/test_cost.py", "test_a_mask_made_again_in_every_column_of_blocks_costs_more"): MODELLED,
    ("tests/model/test_adapters.py", "assert_near"): PROMISED,
    ("tests/model/test_paper_models.py", "check_near"): PROMISED,
    ("tests/nn/test_correction.py", "assert_near"): PROMISED,
    ("tests/nn/test_quantised_processes.py", "assert_near"): PROMISED,
    ("tests/test_train_llama.py", "assert_near"): PROCESSES,
    ("tests/model/test_placing_models.py", "test_a_llama_layer_keeps_at_most_11_6_units"): COUNTED,
}


def sites(source: str) -> list[tuple[str, int, str]]:
    """(function, line, name) of every comparison within a tolerance; of a name that is only imported, too:
    under another name its calls would not be seen.
    """
    found = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.Attribute) and node.attr in COMPARING:
            found.append((function, node.lineno, node.attr))
        if isinstance(node, ast.Name) and node.id in COMPARING:
            found.append((function, node.lineno, node.id))
        if isinstance(node, ast.ImportFrom):
            found.extend(
                (function, node.lineno, alias.name) for alias in node.names if alias.name in COMPARING
            )
        # getattr(torch, "allclose") as well.
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and a.value in COMPARING]
            found.extend((function, node.lineno, name) for name in names)
        if isinstance(node, ast.Compare) and isinstance(node.ops[-1], (ast.Lt, ast.LtE)):
            limits = [part.value for part in ast.walk(node.comparators[-1]) if isinstance(part, ast.Constant)]
            if any(isinstance(limit, float) and 0 < limit < 0.05 for limit in limits):
                found.append((function, node.lineno, "a bound by hand"))
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in TOLERANCES:
                    found.append((function, keyword.value.lineno, keyword.arg))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def test_no_comparison_is_within_a_tolerance():
    found = {path: sites((ROOT / path).read_text(encoding="utf-8")) for path in FILES}
    wrong = [
        f"{path}:{line}: {name}"
        for path in FILES
        for where, line, name in found[path]
        if (path, where) not in ALLOWED
    ]
    assert not wrong, "compare by accuracy.assert_same or by accuracy.check_budget: " + ", ".join(wrong)
    present = {(path, where) for path in FILES for where, _, _ in found[path]}
    assert set(ALLOWED) <= present, "remove from ALLOWED what is there no more"


@pytest.mark.parametrize(
    "line",
    [
        "torch.testing.assert_close(a, b)",
        "assert torch.allclose(a, b)",
        "assert math.isclose(a, b)",
        "assert a == pytest.approx(b)",
        "np.testing.assert_allclose(a, b)",
        "from torch.testing import assert_close as same",
        "compare = torch.testing.assert_close",
        "getattr(torch, 'isclose')(a, b)",
        "near(a, b, rtol=1e-3)",
        "near(a, b, atol=1e-3)",
        "assert (a - b).norm() / b.norm() < 1e-5",
        "assert (a - b).abs().max() <= 1e-3 * b.abs().max()",
    ],
)
def test_each_way_of_it_is_seen(line):
    assert sites(f"def test():\n    {line}\n")


def test_equality_and_the_budget_are_not():
    assert sites("def test():\n    assert torch.equal(a, b)\n    check_budget(got, exact, plain)\n") == []
