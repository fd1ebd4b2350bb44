"""Which cases `make test` leaves to `make test-all`, because they take long and others of their kind do not.

    python -m pytest -n 2 -m "not gate_all" --junitxml=all.xml
    python tests/slow_cases.py all.xml          writes slow_cases.json, which conftest.py reads

A case is quick if it takes at most LIMIT seconds. Of a test without such a case the quickest one is quick if
it takes at most LONGEST. KEPT are quick however long they take: nothing quicker shows what they show. What a
test itself marks slow stays slow. Where kernels are compiled, on a GPU, all of this does not count.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

FILE = Path(__file__).resolve().parent / "slow_cases.json"
LIMIT = 0.1
LONGEST = 1.0
KEPT = {
    "kernels/test_compile_gate.py::test_defaults_compile",
    "kernels/test_compile_gate.py::test_defaults_compile_with_dropout",
    "kernels/test_compile_gate.py::test_fp32_products_are_tf32_only_on_request",
    "kernels/test_compile_gate.py::test_hopper_kernels_keep_what_makes_them_fast",
    "kernels/test_compile_gate.py::test_committed_result_covers_the_heuristics",
    "kernels/test_launch.py::test_core_is_launched_without_fault",
    "test_no_default_tolerances.py::test_no_comparison_is_within_a_tolerance",
}


def name_of(nodeid: str) -> str:
    """A test's name from this folder on."""
    return nodeid.removeprefix("tests/")


def read() -> set[str]:
    """The cases that are slow, by name_of."""
    return {
        test + case for test, cases in json.loads(FILE.read_text(encoding="utf-8")).items() for case in cases
    }


def split(name: str) -> tuple[str, str]:
    """A test's name, and its case in brackets, or ""."""
    test, bracket, case = name.partition("[")
    return test, bracket + case


def slow(times: dict[str, float]) -> dict[str, list[str]]:
    """{test: its slow cases} from the seconds of every case, by name_of."""
    by_test: dict[str, dict[str, float]] = defaultdict(dict)
    for name, seconds in times.items():
        test, case = split(name)
        by_test[test][case] = seconds
    found = {}
    for test, cases in by_test.items():
        if test in KEPT:
            continue
        quickest = min(cases, key=lambda case: (cases[case], case))
        left = {case for case, seconds in cases.items() if seconds > LIMIT}
        if cases[quickest] <= LONGEST:
            left.discard(quickest)
        if left:
            found[test] = sorted(left)
    return dict(sorted(found.items()))


def times_of(report: Path) -> dict[str, float]:
    """The seconds of every case in a report that pytest wrote with --junitxml."""
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        parts = case.get("classname").split(".")
        last = next(place for place, part in enumerate(parts, 1) if part.startswith("test_"))
        file = "/".join(parts[parts[0] == "tests" : last]) + ".py"
        # What follows the file are classes.
        found["::".join([file, *parts[last:], case.get("name")])] = float(case.get("time"))
    return found


def main(reports: list[str]) -> int:
    times: dict[str, float] = {}
    for report in reports:
        times |= times_of(Path(report))
    FILE.write_text(json.dumps(slow(times), indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    left = read()
    quick = [seconds for name, seconds in times.items() if name not in left]
    whole = sum(times.values())
    print(f"{len(quick)} of {len(times)} cases are quick, and take {sum(quick):.0f} of {whole:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
