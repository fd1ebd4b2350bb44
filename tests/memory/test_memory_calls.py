"""memory answers every wrong call with one clear line and exit code 2, and every other with numbers."""

from __future__ import annotations

import contextlib
import io
import json
import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lorafa_kernels.__main__ import main
from lorafa_kernels.memory.planner import MOST_CONFIG_BYTES, ModelSizes

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
FIELDS = [*LLAMA, "head_dim", "tie_word_embeddings"]
DEEP = "[" * 5000 + "]" * 5000


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors. Whatever else is raised is a traceback for the user."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(["memory", *arguments])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def assert_refused(*arguments: str) -> str:
    code, out, err = call(*arguments)
    assert (code, out) == (2, ""), (code, out, err)
    assert err.count("\n") == 1 and err.endswith("\n") and len(err) < 1000, err
    return err


def assert_answered(*arguments: str) -> None:
    """With a plan, or with a refusal in one line."""
    code, out, err = call(*arguments)
    if code == 0:
        assert (
            err == ""
            and "kept for backward: " in out
            and "nan" not in out
            and "inf" not in out.replace("infer", "")
        )
    else:
        assert code == 2 and out == "" and err.count("\n") == 1 and len(err) < 1000, (code, out, err)


@pytest.fixture
def sound(tmp_path) -> str:
    (tmp_path / "sound.json").write_text(json.dumps(LLAMA))
    return str(tmp_path / "sound.json")


def test_what_is_damaged_below_is_sound(sound):
    assert call(sound)[0] == 0


@pytest.mark.parametrize("option", ["--batch", "--sequence", "--rank"])
@pytest.mark.parametrize(
    "value",
    [
        "0",
        "-1",
        "1.5",
        "x",
        "",
        "nan",
        "inf",
        "1e3",
        "²",
        "٣",
        " 4",
        "4 ",
        "0x10",
        "9" * 25,
        "9" * 5000,
        "a\nb",
    ],
    ids=lambda value: repr(value)[:12],
)
def test_numbers_that_are_none(sound, option, value):
    assert f"argument {option}: " in assert_refused(sound, f"{option}={value}")


@pytest.mark.parametrize("value", ["0", "-1", "x", "", "nan", "inf", "-inf", "1e300", "9" * 5000, "1e-400"])
def test_memory_that_is_none(sound, value):
    assert "argument --memory: " in assert_refused(sound, f"--memory={value}")


def test_the_largest_numbers_that_are_taken(sound):
    most = str(1 << 40)
    code, out, _ = call(sound, "--batch", most, "--sequence", most, "--rank", most, "--memory", "1")
    assert code == 0 and "not even 1" in out
    code, out, _ = call(sound, "--memory", "1e-9")
    assert code == 0 and "not even 1" in out


@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "b"], ["--batch"], ["config.json", "--fast"], ["config.json", "--dtype", "int8"], ["--x\ny"]],
    ids=str,
)
def test_calls_that_argparse_refuses(arguments):
    assert_refused(*arguments)


TEXTS = {
    "empty": "",
    "cut": '{"model_type": "llama"',
    "list": "[]",
    "number": "5",
    "null": "null",
    "nan": "NaN",
    "deep": DEEP,
    "deep-inside": '{"model_type": ' + DEEP + "}",
    "as-deep-as-is-read": '{"model_type": ' + "[" * 900 + "]" * 900 + "}",
    "digits": '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}",
    "large": " " * (MOST_CONFIG_BYTES + 1),
    "long-type": json.dumps({"model_type": "x" * 100_000}),
    "type-of-lines": json.dumps({"model_type": "a\nb\u2028c"}),
    "bom": "\ufeff" + json.dumps(LLAMA),
}


@pytest.mark.parametrize("text", TEXTS)
def test_files_that_are_no_configuration(tmp_path, text):
    (tmp_path / "config.json").write_text(TEXTS[text], encoding="utf-8")
    for path in (tmp_path, tmp_path / "config.json"):
        assert str(tmp_path / "config.json") in assert_refused(str(path))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", bytes(range(256)), b"\x00" * 100], ids=["bom", "all", "nul"]
)
def test_files_that_are_no_text(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert_refused(str(tmp_path))


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "kind", ["pipe", "folder", "endless", "loop", "nothing", "below-a-file", "long", "lines"]
)
def test_paths_that_are_no_file(tmp_path, kind):
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "below-a-file":
        path.write_text(json.dumps(LLAMA))
        path = path / "config.json"
    elif kind == "long":
        path = tmp_path / ("x" * 300)
    elif kind == "lines":
        path = tmp_path / "a\nb"
    assert_refused(str(path))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_must_not_be_read(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert "Permission denied" in assert_refused(str(tmp_path / "closed" / "config.json"))


def test_heads_that_do_not_share_evenly():
    with pytest.raises(
        ValueError, match="num_attention_heads is 4, expected a multiple of num_key_value_heads"
    ):
        ModelSizes.from_config({**LLAMA, "num_key_value_heads": 3})


@pytest.mark.parametrize("field", [name for name in LLAMA if name != "model_type"] + ["head_dim"])
@pytest.mark.parametrize(
    "value", [10**400, (1 << 40) + 1, -1, True, 64.0, "64", [64]], ids=lambda v: str(v)[:8]
)
def test_sizes_that_no_model_has(tmp_path, field, value):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, field: value}))
    assert f"{field} is " in assert_refused(str(tmp_path))


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.sampled_from([10**400, -(10**400), 1 << 40, (1 << 40) + 1, 1 << 63]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(0, 3), max_size=1),
)
numbers = st.one_of(
    st.integers(-(10**25), 10**25).map(str),
    st.integers(1, 5000).map(str),
    st.floats().map(str),
    st.text(max_size=6),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=3),
    st.sets(st.sampled_from(FIELDS), max_size=1),
    st.dictionaries(st.sampled_from(["--batch", "--sequence", "--rank", "--memory"]), numbers, max_size=2),
)
@example({"hidden_size": 1 << 40, "vocab_size": 1 << 40, "num_hidden_layers": 1 << 40}, set(), {})
@example({"num_attention_heads": True}, set(), {"--batch": "²"})
def test_whatever_is_asked_there_is_an_answer(tmp_path, changed, missing, options):
    config = {name: value for name, value in {**LLAMA, **changed}.items() if name not in missing}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert_answered(str(path), *(f"{name}={value}" for name, value in options.items()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.binary(max_size=60), st.text(alphabet='{}[]":,0123456789.eE-+ntfalseruN \n', max_size=60))
)
def test_whatever_a_file_holds_there_is_an_answer(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(str(path))


def test_the_old_name_says_so_and_goes_on_working(tmp_path, capsys):
    assert main(["plan", str(tmp_path)]) == main(["memory", str(tmp_path)]) == 2
    old, now = capsys.readouterr().err.splitlines()[:2], "memory: "
    assert "plan is now called memory" in old[0] and old[1].startswith(now)
