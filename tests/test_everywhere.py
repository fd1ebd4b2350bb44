"""make test-everywhere: a configuration counts where it acts, is red where a test is, and can be repeated."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import everywhere
import pytest
from everywhere import Configuration, chosen_by, configurations, main, obstacle, report_of

# As the libraries print them, on an AMD processor that obeys one restriction of MKL and not another.
REPORT = """torch AVX2
MKL_VERBOSE oneMKL 2024.0 Update 2 Product build 20240605 for Intel(R) 64 architecture processors, Lnx 2.45GHz
MKL_VERBOSE SGEMM(N,N,64,64,64,0x7ffc,64,64) 2.70ms CNR:COMPATIBLE Dyn:0 FastMM:1 TID:0  NThr:1
onednn_verbose,v1,info,oneDNN v3.12.0 (commit 80afa71049cd69a3df32adcccb623b12cd7baa22)
onednn_verbose,v1,info,cpu,isa:Intel SSE4.1
onednn_verbose,v1,primitive,exec,cpu,eltwise,jit:sse41,forward_training
"""
KNOWN = {one.name: one for one in configurations(7)}


def test_the_modes_of_the_libraries_are_read():
    assert report_of(REPORT) == {"torch": "AVX2", "MKL": "COMPATIBLE", "oneDNN": "SSE4.1"}
    assert report_of("Segmentation fault") == {}


@pytest.mark.parametrize(
    ("name", "flags", "reported", "reason"),
    [
        pytest.param("two-threads", (), {}, None, id="nothing-asked"),
        pytest.param("mkl-compatible", (), {"MKL": "COMPATIBLE"}, None, id="obeyed"),
        pytest.param(
            "mkl-avx2", (), {"MKL": "AUTO"}, "MKL does not obey: it reports AUTO, not AVX2", id="ignored"
        ),
        pytest.param(
            "onednn-sse41", (), {}, "oneDNN does not obey: it reports nothing, not SSE4.1", id="silent"
        ),
        pytest.param(
            "aten-avx512", ("avx2",), {"torch": "AVX512"}, "this processor has no avx512f", id="no-processor"
        ),
        pytest.param("aten-avx512", ("avx512f",), {"torch": "AVX512"}, None, id="processor"),
    ],
)
def test_what_cannot_act_is_not_run(name, flags, reported, reason):
    assert obstacle(KNOWN[name], set(flags), reported) == reason


def test_torch_is_restricted_where_it_says_so():
    configuration = KNOWN["aten-default"]
    assert everywhere.obstacle_here(configuration) is None
    assert everywhere.obstacle_here(replace(configuration, environment={})) is not None


def test_every_commit_has_its_configuration_and_every_configuration_its_commits():
    names = list(KNOWN)
    assert len(set(names)) == len(configurations(0))
    chosen = [chosen_by(f"{number:040x}", names) for number in range(100)]
    assert {name for name, _ in chosen} == set(names)
    assert chosen_by("d8981ac", names) == chosen_by("d8981ac", names)


def planted(monkeypatch, outcomes: dict[str, bool]) -> list[Configuration]:
    """Run nothing: each configuration passes or fails as said, and is not obeyed where nothing is said."""
    ran = []

    def run(configuration, tests):
        ran.append(configuration)
        return outcomes[configuration.name], "3 tests", 1.5

    monkeypatch.setattr(everywhere, "run", run)
    monkeypatch.setattr(everywhere, "report", lambda environment: {})
    monkeypatch.setattr(
        everywhere, "obstacle_here", lambda one: None if one.name in outcomes else "no such processor"
    )
    return ran


def test_one_red_configuration_makes_it_red_and_the_others_still_run(monkeypatch, capsys):
    ran = planted(monkeypatch, {"one-process": True, "two-threads": False, "random-order": True})
    assert main([]) == 1
    out = capsys.readouterr().out
    assert [one.name for one in ran] == ["one-process", "two-threads", "random-order"]
    assert re.search(r"^two-threads +2  FAILED: 3 tests$", out, re.MULTILINE)
    assert re.search(r"^one-process +2  ok: 3 tests$", out, re.MULTILINE)
    assert re.search(r"^aten-avx512 +-  not run: no such processor$", out, re.MULTILINE)
    assert main(["--only", "one-process"]) == 0


def test_the_command_that_is_printed_repeats_what_a_commit_chose(monkeypatch, capsys):
    ran = planted(monkeypatch, {"random-order": True})
    assert main(["--by-commit", "4b1d"]) == 0
    (command,) = re.findall(r"^ +python tests/everywhere.py (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert main(shlex.split(command)) == 0
    assert ran[0] == ran[1] and "--shuffle" in ran[0].arguments


@pytest.mark.parametrize("arguments", [["--by-commit", "main"], ["--only", "three-threads"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and arguments[1] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tests", "code"),
    [
        pytest.param(["tests/nn/test_engines.py", "-k", "accumulation"], 0, id="green"),
        pytest.param(["tests/nn/test_engines.py", "-k", "no such test"], 1, id="nothing-collected"),
    ],
)
def test_pytest_runs_in_the_configuration(tests, code, capsys):
    assert main(["--only", "two-threads", "--", *tests]) == code
    out = capsys.readouterr().out
    assert "--threads 2" in out and ("ok: 1 passed" in out) == (code == 0)
