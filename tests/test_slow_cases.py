"""What `make test` leaves out has a quicker sibling, or is too long for it whatever it shows."""

from __future__ import annotations

import slow_cases
from slow_cases import KEPT, LIMIT, LONGEST, slow, split


def test_a_case_is_slow_beside_quicker_ones_alone():
    times = {"a.py::test_x[1]": LIMIT, "a.py::test_x[2]": 2 * LIMIT, "a.py::test_x[3]": 0.0}
    assert slow(times) == {"a.py::test_x": ["[2]"]}


def test_the_quickest_case_of_a_test_stays():
    times = {"a.py::test_x[1]": LONGEST, "a.py::test_x[2]": LONGEST + 1, "b.py::test_y": LONGEST}
    assert slow(times) == {"a.py::test_x": ["[2]"]}
    assert slow({"b.py::test_y": LONGEST + 0.1}) == {"b.py::test_y": [""]}


def test_what_is_kept_is_never_slow():
    assert slow({f"{test}[1]": 1e9 for test in KEPT}) == {}


def test_a_report_gives_the_names_that_pytest_collects(tmp_path):
    report = tmp_path / "all.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_x[1-b]" time="0.5"/>'
        '<testcase classname="tests.bench.test_b" name="test_y" time="0.25"/>'
        '<testcase classname="tests.bench.test_b.TestZ" name="test_z" time="0.75"/></testsuite></testsuites>'
    )
    assert slow_cases.times_of(report) == {
        "test_a.py::test_x[1-b]": 0.5,
        "bench/test_b.py::test_y": 0.25,
        "bench/test_b.py::TestZ::test_z": 0.75,
    }
    assert slow_cases.name_of("tests/test_a.py::test_x[1-b]") == "test_a.py::test_x[1-b]"
    assert split("test_a.py::test_x[1-[b]]") == ("test_a.py::test_x", "[1-[b]]")
