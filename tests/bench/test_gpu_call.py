"""python3 -m bench.gpu: stages that hide nothing from each other, within their time, and that go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench.gpu import __main__ as command
from bench.gpu import cache, driver
from bench.gpu.driver import STAGES, TOTAL, Call, Stage
from bench.run.store import read
from bench.run.stub import VARIABLE

ROOT = driver.ROOT
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals as on Linux")
PLANTED = {
    "right": "print('verdict: all is well')",
    "wrong": "import sys; print('verdict: two are wrong'); sys.exit(1)",
    "raises": "raise RuntimeError('a plain exception')",
    "crashes": "import os, signal; print('going', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "exits": "import os; os._exit(77)",
    "out-of-memory": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "import time; print('waiting', flush=True); time.sleep(60)",
    "hangs-deaf": "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)",
    "leaves-a-child": "import subprocess, sys; subprocess.Popen([sys.executable, '-c', "
    "'import time; time.sleep(60)']); print('verdict: gone')",
    "prints-much": "print('x' * 10**6); print('verdict: much')",
    "unfinished": "import sys; print('verdict: half'); sys.exit(3)",
    "no-gpu": "import sys; print('verdict: none'); sys.exit(4)",
}


def planted(name: str, limit: float = 20.0, **more) -> Stage:
    return Stage(name, "?", limit, command=(sys.executable, "-c", PLANTED[name]), **more)


@pytest.fixture
def call(tmp_path) -> Call:
    return make_call(tmp_path)


def make_call(folder: Path, budget: float = 300.0, **more) -> Call:
    return Call(folder / "gpu.jsonl", folder / "gpu.log", "r", budget, time.monotonic(), **more)


def stage_lines(call: Call) -> dict[str, dict]:
    """Return by name the last line of each stage."""
    lines = [json.loads(line) for line in call.file.read_text().splitlines()]
    return {line["name"]: line for line in lines if line["kind"] == "stage"}


@linux
@pytest.mark.parametrize(
    ("name", "verdict", "said"),
    [
        ("wrong", "failed", "two are wrong"),
        ("raises", "failed", "RuntimeError: a plain exception"),
        ("crashes", "failed", "SIGSEGV"),
        ("exits", "failed", "code 77"),
        ("out-of-memory", "failed", "SIGKILL"),
        ("leaves-a-child", "passed", "gone"),
        ("prints-much", "passed", "much"),
        ("unfinished", "unfinished", "half"),
    ],
    ids=lambda value: value if value in PLANTED else "",
)
def test_a_stage_does_not_hide_the_next(call, capsys, name, verdict, said):
    began = time.monotonic()
    code = driver.run((planted(name), planted("right")), call)
    assert time.monotonic() - began < 20
    lines = stage_lines(call)
    assert (lines[name]["verdict"], lines["right"]["verdict"]) == (verdict, "passed")
    assert said in lines[name]["said"]
    shown = capsys.readouterr().out
    assert f"{name}: {verdict.upper()}" in shown and "right: PASSED" in shown and "all is well" in shown
    assert code == (1 if verdict == "failed" else 0)


@linux
@pytest.mark.parametrize("name", ["hangs", "hangs-deaf"])
def test_a_stage_that_hangs_is_ended_at_its_limit(call, name):
    began = time.monotonic()
    assert driver.run((planted(name, 3.0), planted("right")), call) == 1
    assert time.monotonic() - began < 15
    lines = stage_lines(call)
    assert (lines[name]["verdict"], lines["right"]["verdict"]) == ("failed", "passed")
    if name == "hangs-deaf":
        assert "within 3 s and was killed" in lines[name]["said"]


@linux
def test_what_a_stage_has_started_ends_with_it(call):
    began = time.monotonic()
    driver.run((planted("leaves-a-child"),), call)
    assert time.monotonic() - began < 15, "its child held the pipe open"


def test_a_call_in_which_nothing_ran_is_no_success(tmp_path):
    call = make_call(tmp_path, 10.0)
    call.started -= 20
    assert driver.run((planted("right"), planted("right")), call) == 1
    assert stage_lines(call)["right"]["said"] == "no time was left"


@linux
def test_without_a_gpu_the_rest_is_not_tried(call):
    assert driver.run((planted("no-gpu"), planted("right")), call) == 2
    assert stage_lines(call)["right"]["verdict"] == "not run"


@linux
def test_a_broken_process_is_started_again_and_remembered(call, tmp_path):
    marker = tmp_path / "tried"
    text = f"import os, sys; from pathlib import Path; p = Path({str(marker)!r})\n"
    text += "if not p.exists(): p.touch(); print('verdict: the GPU is lost', flush=True); os._exit(75)\n"
    stage = Stage(
        "twice", "?", 60.0, restarts=2, command=(sys.executable, "-c", f"{text}print('verdict: rest')")
    )
    assert driver.run((stage,), call) == 1
    line = stage_lines(call)["twice"]
    assert line["verdict"] == "failed"
    assert "rest" in line["said"] and "the GPU is lost" in line["said"]


@linux
def test_a_line_stands_for_each_stage_before_it_runs(call):
    show = "import os, json; from pathlib import Path\n"
    show += "print('verdict: ' + Path(json.loads(os.environ['LORAFA_GPU_CALL'])['file']).read_text().strip())"
    driver.run((Stage("looks", "?", 20.0, command=(sys.executable, "-c", show)),), call)
    assert '"verdict":"begun"' in stage_lines(call)["looks"]["said"]


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_kill_at_any_moment_keeps_what_there_is(tmp_path, number):
    text = f"""
import signal, sys, time
from pathlib import Path
from bench.gpu import __main__ as command, driver
from tests.bench.test_gpu_call import make_call, planted
signal.signal(signal.SIGTERM, command.interrupted)
# A shell starts what runs in its background with this one ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
stages = (planted("right"), planted("hangs", 50.0), planted("right"))
sys.exit(driver.run(stages, make_call(Path({str(tmp_path)!r}))))
"""
    with subprocess.Popen(
        [sys.executable, "-c", text],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as child:
        for line in child.stdout:
            if b"hangs:" in line:
                break
        time.sleep(0.3)
        child.send_signal(number)
        rest = child.stdout.read().decode()
    lines = stage_lines(make_call(tmp_path))
    assert lines["right"]["verdict"] == "passed"
    if number == signal.SIGKILL:
        assert lines["hangs"]["verdict"] == "begun"
    else:
        assert child.returncode == 130
        assert lines["hangs"]["verdict"] == "interrupted"
        assert str(tmp_path / "gpu.jsonl") in rest


def test_the_stages_fit_nine_minutes_and_come_in_order():
    assert TOTAL <= 540
    assert sum(stage.limit for stage in STAGES) + driver.RESERVE <= TOTAL
    names = [stage.name for stage in STAGES]
    assert names == ["environment", "kernels", "ceilings", "tests", "memory", "suite"]
    for budget in (60.0, 300.0, 540.0):
        assert sum(driver.limits(STAGES, budget).values()) <= budget
    own = {stage.name: stage.limit for stage in STAGES}
    assert driver.limits(STAGES, TOTAL) == own
    assert driver.limits(STAGES, 3 * TOTAL) == {name: 3 * limit for name, limit in own.items()}
    assert driver.limits(STAGES[:1], 100.0) == {"environment": own["environment"]}


@linux
def test_time_that_is_left_over_goes_to_a_stage_that_stretches(tmp_path, capsys):
    call = make_call(tmp_path, 100.0)
    driver.run(
        (planted("right", 50.0), planted("wrong", 10.0, stretches=True), planted("unfinished", 30.0)), call
    )
    shown = capsys.readouterr().out
    limit = int(shown.split("wrong: ? (at most ")[1].split()[0])
    assert 40 < limit < 70
    assert "unfinished: ? (at most 30 s)" in shown


@linux
def test_a_stage_that_is_done_is_not_done_again(tmp_path):
    call = make_call(tmp_path, tree="t")
    about = {"machine": {"gpu": {"name": "a GPU"}}, "versions": {}, "tree": "t"}
    call.write("run", environment=about, identity="", grid="gpu", command="c")
    driver.run((planted("right"), planted("unfinished")), call)
    for tree, device, done in (("t", "a GPU", {"right"}), ("u", "a GPU", set()), ("t", "another", set())):
        assert driver.earlier((tmp_path,), tree, device)[0] == done
    with call.file.open("a") as file:
        file.write('{"kind":"stage","run":"r","name":"unfinished","verdict":"pas')
    later = make_call(tmp_path, done=driver.earlier((tmp_path,), "t", "a GPU")[0])
    later.run = "s"
    driver.run((planted("right"), planted("unfinished")), later)
    lines = [json.loads(line) for line in later.file.read_text().splitlines() if line.endswith("}")]
    assert [line["name"] for line in lines if line["run"] == "s"] == ["unfinished", "unfinished"]


# Triton's cache


def make_cache(folder: Path, count: int, size: int = 2000) -> Path:
    for number in range(count):
        entry = folder / f"KEY{number:03d}"
        entry.mkdir(parents=True)
        for name in ("k.cubin", "k.json", "__grp__k.json", "launcher.so"):
            (entry / name).write_bytes(os.urandom(size))
        (entry / "k.ptx").write_bytes(b"left out")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_cache_travels_in_parts(tmp_path):
    made = make_cache(tmp_path / "made", 40)
    assert cache.pack(made, tmp_path / "out", part_bytes=150_000) == 0
    parts = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert parts == ["triton-cache-0.tar.gz", "triton-cache-1.tar.gz", "triton-cache-2.tar.gz"]
    assert all(path.stat().st_size <= 150_000 for path in (tmp_path / "out").iterdir())
    count, problems = cache.unpack([tmp_path / "out"], tmp_path / "taken")
    assert (count, problems) == (40, [])
    expected = {name: data for name, data in contents(made).items() if not name.endswith(".ptx")}
    assert contents(tmp_path / "taken") == expected


def test_what_does_not_fit_is_counted_and_old_parts_go(tmp_path):
    made = make_cache(tmp_path / "made", 40)
    assert cache.pack(made, tmp_path / "out", part_bytes=100_000, most_parts=2) > 0
    assert len(list((tmp_path / "out").iterdir())) == 2
    small = make_cache(tmp_path / "small", 1)
    assert cache.pack(small, tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["triton-cache-0.tar.gz"]


def test_a_damaged_part_costs_its_own_entries_alone(tmp_path):
    made = make_cache(tmp_path / "made", 20)
    cache.pack(made, tmp_path / "out", part_bytes=100_000)
    first = tmp_path / "out" / "triton-cache-0.tar.gz"
    first.write_bytes(first.read_bytes()[:1000])
    count, problems = cache.unpack([tmp_path / "out"], tmp_path / "taken")
    assert 0 < count < 20 and len(problems) == 1 and "triton-cache-0" in problems[0]
    for name, data in contents(tmp_path / "taken").items():
        assert data == (made / name).read_bytes()


def test_a_part_writes_nowhere_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with tarfile.open(out / "triton-cache-0.tar.gz", "w:gz") as tar:
        for name in ("../escaped", "/escaped", "a/../../escaped", "a/b/c", "..", "plain"):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("a/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert cache.unpack([out], tmp_path / "deep" / "taken") == (0, [])
    assert contents(tmp_path) == {"out/triton-cache-0.tar.gz": (out / "triton-cache-0.tar.gz").read_bytes()}


# The command


def test_it_needs_a_gpu_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(command, "gpu_is_there", lambda: False)
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--stages", "test"], ["--budget", "0"], ["--budget", "nan"], ["--out", "bench/results/gpu"], ["more"]],
)
def test_a_wrong_call_is_one_line(monkeypatch, capsys, arguments):
    monkeypatch.setenv(VARIABLE, "sm_90")
    monkeypatch.chdir(ROOT)
    try:
        code = command.main(arguments)
    except SystemExit as end:
        code = end.code
    assert (code, len(capsys.readouterr().err.strip().splitlines())) == (2, 1)
    assert not (ROOT / "bench" / "results" / "gpu").exists()


def test_it_imports_no_torch():
    text = "import sys; import bench.gpu.__main__; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


@linux
def test_a_call_writes_few_files_and_marks_a_stub_in_every_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(VARIABLE, "sm_90")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(make_cache(tmp_path / "cache", 3)))
    monkeypatch.setattr(command, "STAGES", (planted("crashes"), planted("right")))
    monkeypatch.setattr(command, "STARTED", time.monotonic())
    out = tmp_path / "out"
    assert command.main(["--out", str(out), "--budget", "100", "--past", str(tmp_path / "none")]) == 1
    assert sorted(path.name for path in out.iterdir()) == ["gpu.jsonl", "gpu.log", "triton-cache-0.tar.gz"]
    lines = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    assert all(line["stub"] is True for line in lines)
    about = lines[0]["environment"]
    assert (
        about["machine"]["gpu"]["name"] == "STUB sm_90" and about["stub"] is True and len(about["tree"]) == 64
    )
    records, warnings = read(out / "gpu.jsonl")
    assert not warnings and len(records) == len(lines)
    assert "going" in (out / "gpu.log").read_text()
    assert "STUB sm_90" in capsys.readouterr().out
    # A later call takes up what there is: the stage that passed, and the cache.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "fresh"))
    assert command.main(["--out", str(tmp_path / "later"), "--budget", "100", "--past", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "right: done by an earlier call" in shown and "3 entries of earlier calls" in shown
    assert len(list((tmp_path / "fresh").iterdir())) == 3


def test_the_folder_of_earlier_calls_is_ignored_by_git():
    assert command.PAST == ROOT / ".gpu"
    assert ".gpu/" in (ROOT / ".gitignore").read_text().splitlines()
