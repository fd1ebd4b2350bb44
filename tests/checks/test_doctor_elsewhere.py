"""The doctor in odd surroundings: packages missing, modules of other people in the folder, other devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorafa_kernels.__main__ import main
from lorafa_kernels.checks import doctor

ROOT = Path(__file__).resolve().parents[2]
PLANTED = "raise SystemExit('the planted {name} was imported')\n"
# Only what the package itself is blocked from; the checks are cut to one, which is what takes time.
BLOCKED = """
import sys
for name in {names!r}:
    sys.modules[name] = None
from lorafa_kernels.checks import doctor
from lorafa_kernels.__main__ import main
doctor.CHECKED_DTYPES = {{"fp32": doctor.CHECKED_DTYPES["fp32"]}}
doctor.check_blocks = lambda *arguments: []
doctor.CPU_SHAPES = ((20, 18, 17, 16),)
raise SystemExit(main(["doctor", "--device", "cpu"]))
"""


def run(*command: str, cwd, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.parametrize(
    "device", ["meta", "mps", "xla:0", "vulkan", "cuda:-1", "", "cpu\nx", "tpu"], ids=repr
)
def test_a_device_where_nothing_can_be_checked_is_refused_in_one_line(capsys, device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--device", device])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and "argument --device: device is " in said.err
    assert ("which holds no data" in said.err) == (device == "meta")


@pytest.mark.parametrize("device", ["", "cuda:99999999999999999999", "gpu", "cuda:-1"], ids=repr)
def test_tune_refuses_such_a_device_likewise(capsys, device):
    with pytest.raises(SystemExit) as stop:
        main(["tune", "--model", "MiniLM", "--device", device])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "argument --device: " in said


OPTIONAL = ("platformdirs", "rich", "numpy", "safetensors", "triton", "transformers", "peft", "matplotlib")


def test_the_doctor_needs_nothing_optional(tmp_path):
    """Not safetensors and numpy either, which only files need; PyTorch warns where numpy is missing."""
    done = run("-W", "ignore", "-c", BLOCKED.format(names=OPTIONAL), cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("PASSED: all ") and "triton is not installed" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["numpy", "triton"])
def test_the_doctor_needs_none_of_these(tmp_path, name):
    done = run("-W", "ignore", "-c", BLOCKED.format(names=(name,)), cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("PASSED: all ")
    if name == "numpy" and "not installed" not in done.stdout:
        assert "interpreter needs numpy: pip install 'lorafa-kernels[interpreter]'" in done.stdout


def plant(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(PLANTED.format(name=name))


NAMES = ("torch", "triton", "numpy", "safetensors", "argparse", "json", "platform", "sympy")


def test_the_interpreter_s_process_imports_nothing_from_the_current_folder(monkeypatch, tmp_path):
    plant(tmp_path, *NAMES)
    monkeypatch.chdir(tmp_path)
    # As after python -c, and in an interactive session.
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(
        doctor, "_INTERPRETED", doctor._INTERPRETED.rpartition("from {name}.doctor")[0] + "print('[]')\n"
    )
    assert doctor.interpreted_checks() == []


def test_in_a_checkout_the_package_is_found_and_nothing_else(tmp_path):
    """Where the package itself lies in the current folder, as on a machine where it is not installed."""
    (tmp_path / "lorafa_kernels").symlink_to(ROOT / "lorafa_kernels")
    plant(tmp_path, *NAMES)
    done = run("-m", "lorafa_kernels", "memory", ".", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 2 and "memory: config.json: No such file" in done.stderr, done.stderr


# The same of a small package that has the module, in whose folder lies a module of the user's.
PACKAGE = {
    "small/__init__.py": "from . import _safe_path\n",
    "small/__main__.py": "import beside\n",
    "small/_safe_path.py": (ROOT / "lorafa_kernels" / "_safe_path.py").read_text(encoding="utf-8"),
    "mine.py": "import small, beside\n",
    "beside.py": "print('beside was imported')\n",
}
OWN_P = [] if sys.version_info < (3, 11) else ["-P"]


@pytest.mark.parametrize(
    ("arguments", "variables", "imported"),
    [
        pytest.param(["-m", "small"], {}, False, id="-m"),
        pytest.param(["-msmall"], {}, False, id="-m-in-one-word"),
        pytest.param(["-W", "ignore", "-m", "small", "-m", "other"], {}, False, id="other-options"),
        # Put there by the user, or another program that looks for its own modules.
        pytest.param(["-m", "small"], {"PYTHONPATH": "."}, True, id="in-PYTHONPATH"),
        pytest.param([*OWN_P, "-m", "small"], {"PYTHONPATH": "."}, True, id="in-PYTHONPATH-with-P"),
        pytest.param(["-m", "mine"], {}, True, id="-m-of-another"),
        pytest.param(["-m", "mine", "-m", "small"], {}, True, id="-m-of-another-with-options"),
        pytest.param(["mine.py"], {}, True, id="a-script"),
        pytest.param(["-c", "import small, beside"], {}, True, id="-c"),
    ],
)
def test_only_the_module_s_own_command_leaves_the_folder_out(tmp_path, arguments, variables, imported):
    (tmp_path / "small").mkdir()
    for name, text in PACKAGE.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = run(*arguments, cwd=tmp_path, **{"PYTHONPATH": "", **variables})
    assert (done.stdout == "beside was imported\n") == imported, done.stderr
    assert imported == (done.returncode == 0) and ("No module named 'beside'" in done.stderr) != imported


def test_a_missing_safetensors_is_named_where_a_file_is_written_or_read(monkeypatch, tmp_path):
    from lorafa_kernels import LoRAFAConfig, apply_lorafa, load_adapter, save_adapter

    def model():
        return torch.nn.Sequential(torch.nn.Linear(8, 8))

    adapted = apply_lorafa(model(), LoRAFAConfig(r=2, target_modules=["0"]))
    save_adapter(adapted, tmp_path / "sound")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        ImportError, match=r"adapter files need safetensors .*pip install 'safetensors\[numpy\]'"
    ):
        save_adapter(adapted, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ImportError, match="adapter files need safetensors"):
        load_adapter(model(), tmp_path / "sound")
