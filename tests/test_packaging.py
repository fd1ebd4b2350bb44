"""What is installed is what is in the tree: the wheel works away from it, the sdist tests itself."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import lorafa_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lorafa_kernels"
# Beside the package. Folders of tools and of results that nobody committed are no part of it.
FOLDERS = ("bench", "csrc_reference", "docs", "examples", "tests")
FILES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
)
MADE = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.o", ".*")
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]
for build in (build_meta.build_sdist, build_meta.build_wheel):
    print("made", build(out))
"""

pytestmark = pytest.mark.skipif(
    not all((ROOT / name).exists() for name in (*FOLDERS, *FILES)), reason="needs the whole checkout"
)


def files(folder: Path) -> set[str]:
    """Paths below a folder, relative to it, without what is made by running the code."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not set(MADE(str(path.parent), [*path.relative_to(folder).parts, path.name]))
    }


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, both made of a copy of the tree, offline."""
    metadata = pytest.importorskip("importlib.metadata")
    try:
        setuptools = metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        setuptools = "0"
    if int(setuptools.partition(".")[0]) < 77:
        pytest.skip(f"setuptools 77 builds the package, here is {setuptools}")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("lorafa_kernels", *FOLDERS):
        shutil.copytree(ROOT / name, tree / name, ignore=MADE)
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    done = run(sys.executable, "-I", "-c", BUILD, str(out), cwd=tree)
    assert done.stdout.count("made ") == 2, done.stdout
    return out


def run(*command: str, cwd: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run a command that does not know of the checkout, and expect its exit code."""
    hidden = ("PYTHONPATH", "TRITON_INTERPRET", "LORAFA_KERNELS_CACHE")
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == code, (
        f"{command}: {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    )
    return done


def the_wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


def test_the_wheel_has_the_package_s_files_and_no_others(dist):
    with zipfile.ZipFile(the_wheel(dist)) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = {name.rpartition("/")[2] for name in wheel.namelist() if ".dist-info/" in name}
    assert inside == {f"lorafa_kernels/{name}" for name in files(PACKAGE)}
    assert {"lorafa_kernels/py.typed", "lorafa_kernels/model/placing/place.py"} <= inside
    assert metadata == {"METADATA", "WHEEL", "RECORD", "LICENSE", "entry_points.txt", "top_level.txt"}


def test_the_sdist_has_the_tree_s_files(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames() if not sdist.getmember(name).isdir()}
    expected = {
        f"{folder}/{name}" for folder in ("lorafa_kernels", *FOLDERS) for name in files(ROOT / folder)
    }
    assert expected | set(FILES) <= inside
    beside = {name for name in inside - expected - set(FILES) if ".egg-info/" not in name}
    assert beside == {"PKG-INFO", "setup.cfg"}


def test_what_git_has_is_in_the_sdist(dist):
    """Whatever folder it is in: a new one needs its line in MANIFEST.in."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0 or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    known = {name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}
    hidden = {name for name in known if any(part.startswith(".") for part in name.split("/"))}
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert known - hidden <= inside


@pytest.fixture(scope="module")
def environment(dist, tmp_path_factory) -> Path:
    """A fresh environment with the wheel; torch and the other requirements are those of this one."""
    # Looked up as a distribution: see "distutils of Python" in conftest.
    if not list(importlib.metadata.distributions(name="pip")):
        pytest.skip("needs pip")
    folder = tmp_path_factory.mktemp("fresh") / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    arguments = ("install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        *arguments,
        str(the_wheel(dist)),
        cwd=folder.parent,
    )
    (own,) = folder.glob("lib/python*/site-packages")
    # Added by a .pth file, so that theirs, such as an editable install of this package, are not read.
    outer = [*site.getsitepackages(), site.getusersitepackages()]
    (own / "outer.pth").write_text("".join(f"{path}\n" for path in outer if Path(path).is_dir()))
    return folder


def test_the_installed_wheel_imports_trains_and_saves(environment, tmp_path):
    script = shutil.copy(ROOT / "tests" / "installed.py", tmp_path)
    done = run(str(environment / "bin" / "python"), "-I", script, str(environment), cwd=tmp_path)
    assert lorafa_kernels.__version__ in done.stdout


def test_the_installed_script_answers(environment, tmp_path):
    script = str(environment / "bin" / "lorafa-kernels")
    assert run(script, "--version", cwd=tmp_path).stdout == f"{lorafa_kernels.__version__}\n"


@pytest.mark.slow
def test_the_installed_command_is_called_what_it_was_called_by(environment, tmp_path):
    script = str(environment / "bin" / "lorafa-kernels")
    assert run(script, "plan", "--help", cwd=tmp_path).stdout.startswith("usage: lorafa-kernels plan ")
    done = run(str(environment / "bin" / "python"), "-m", "lorafa_kernels", "plan", "--help", cwd=tmp_path)
    assert done.stdout.startswith("usage: python -m lorafa_kernels plan ")


@pytest.mark.slow
def test_the_installed_doctor_finds_nothing_wrong(environment, tmp_path):
    done = run(str(environment / "bin" / "lorafa-kernels"), "doctor", "--device", "cpu", cwd=tmp_path)
    assert done.stdout.startswith("PASSED: all ") and not done.stderr


@pytest.fixture(scope="module")
def unpacked(dist, tmp_path_factory) -> Path:
    (path,) = dist.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(path) as sdist:
        # What was made here a moment ago; older Pythons have no filter.
        sdist.extractall(folder)
    (tree,) = folder.iterdir()
    return tree


@pytest.mark.slow
def test_the_unpacked_sdist_has_all_of_the_tests_and_passes_some_of_each_kind(unpacked):
    """Of the package, of the C oracle, which it builds, of the benchmarks, and of the tables in its pages."""
    assert {path.name for path in (unpacked / "tests").rglob("*.py")} == {
        path.name for path in (ROOT / "tests").rglob("*.py")
    }
    run("make", "-C", "csrc_reference", cwd=unpacked)
    chosen = ("architecture", "tables", "layer", "bench_cases", "packaging", "c_oracle")
    chosen = " or ".join(f"test_{name}.py" for name in chosen)
    # All are collected, and those of these files run.
    done = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", "-m", "not slow"),
        *("-k", chosen),
        cwd=unpacked,
    )
    assert re.search(r"[1-9]\d* passed, .*[1-9]\d{3,} deselected", done.stdout), done.stdout[-500:]


def metadata_of(dist: Path):
    with zipfile.ZipFile(the_wheel(dist)) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(wheel.read(name).decode())


def test_the_requirements_are_what_is_imported(dist):
    from test_architecture import BUILT_ON, OPTIONAL, imported, modules

    needed = set()
    for name, path in modules().items():
        roots = {found.split(".")[0] for found in imported(name, path)}
        roots -= OPTIONAL.get(name, set()) | BUILT_ON.get(name, set())
        needed |= roots - set(sys.stdlib_module_names) - {"lorafa_kernels"}
    required = [line for line in metadata_of(dist).get_all("Requires-Dist") if "extra ==" not in line]
    # An extra of a requirement is what that one imports for us: safetensors saves through numpy.
    assert {re.match(r"[\w-]+", line)[0] for line in required} | {"triton"} == needed


def test_python_versions_are_claimed_only_where_a_run_is_recorded(dist):
    claimed = re.findall(
        r"^Classifier: Programming Language :: Python :: (3\.\d+)$", str(metadata_of(dist)), re.M
    )
    recorded = set()
    for path in (ROOT / "bench" / "results").rglob("*.json*"):
        recorded |= set(re.findall(r'"python": ?"(3\.\d+)', path.read_text(encoding="utf-8")))
    assert claimed and set(claimed) <= recorded


def test_the_metadata_names_the_script_the_licence_and_the_types(dist):
    with zipfile.ZipFile(the_wheel(dist)) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "lorafa-kernels = lorafa_kernels.__main__:main" in wheel.read(name).decode()
    found = metadata_of(dist)
    assert found["License-Expression"] == "Apache-2.0" and found["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in found.get_all("Classifier")
    assert found["Description-Content-Type"] == "text/markdown" and found.get_payload().startswith("# lorafa")
    extras = {"triton", "interpreter", "tune", "memory", "demo", "bench", "dev"}
    assert extras == set(found.get_all("Provides-Extra"))
