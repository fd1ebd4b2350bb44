"""memory answers every wrong call with one clear line and exit code 2, and every other with numbers."""

from __future__ import annotations

import contextlib
import io
import json
import os

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lorafa_kernels.__main__ import main
from lorafa_kernels.memory.models import MOST_CONFIG_BYTES, resolve
from tests.memory import families

pytest.importorskip("transformers")
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
        assert err == "" and "GiB at the peak" in out and "nan" not in out and "inf " not in out
    else:
        assert code == 2 and out == "" and err.count("\n") == 1 and len(err) < 1000, (code, out, err)


@pytest.fixture
def sound(tmp_path) -> str:
    (tmp_path / "sound.json").write_text(json.dumps(LLAMA))
    return str(tmp_path / "sound.json")


def test_what_is_damaged_below_is_sound(sound):
    assert call(sound, "--methods", "lora", "--dropout", "0")[0] == 0


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


def test_numbers_that_no_tensor_holds(sound):
    most = str(1 << 40)
    assert "does not run" in assert_refused(sound, "--batch", most, "--sequence", most)
    assert "r must be an integer from 1" in assert_refused(sound, "--rank", most)


@pytest.mark.slow
def test_a_memory_that_nothing_fits_into(sound):
    code, out, _ = call(sound, "--memory", "1e-9", "--methods", "lora,lorafa")
    assert code == 0 and "GiB: LoRA batch 0, LoRA-FA here 0" in out.splitlines()[0]


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


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=3),
    st.sets(st.sampled_from(FIELDS), max_size=1),
    st.dictionaries(st.sampled_from(["--batch", "--sequence", "--rank", "--memory"]), numbers, max_size=2),
)
@example({"hidden_size": 1 << 40, "vocab_size": 1 << 40, "num_hidden_layers": 1 << 40}, set(), {})
@example({"hidden_size": None}, set(), {})
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


def test_some_methods_are_printed(sound):
    code, out, err = call(sound, "--sequence", "64", "--methods", "lora,lorafa", "--dropout", "0")
    assert (code, err) == (0, "") and out.isascii()
    assert out.startswith("LoRA takes ") and " GiB less, " in out.splitlines()[0]
    assert "full fine-tuning" not in out and "dropout 0" not in out


@pytest.mark.slow
def test_the_plan_is_printed(sound):
    code, out, err = call(sound, "--batch", "2", "--sequence", "64", "--memory", "1")
    assert (code, err) == (0, "") and out.isascii()
    first = out.splitlines()[0]
    assert first.startswith("fits in 1 GiB: LoRA batch ") and ", LoRA-FA here " in first
    for text in ("full fine-tuning", "PEFT's default", "LoRA-FA in plain PyTorch", "not checked on a GPU"):
        assert text in out
    assert "taken as a causal language model" in out and "dropout 0.05" in out
    assert all(len(line) <= 110 for line in out.splitlines())


@pytest.mark.slow
def test_json_is_alone_and_holds_every_method(sound, tmp_path):
    plot = tmp_path / "plan.png"
    code, out, err = call(sound, "--json", "--plot", str(plot), "--sequence", "64", "--device", "cpu")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert list(found["methods"]) == ["full", "peft", "lora", "lorafa-plain", "lorafa", "lorafa-nf4"]
    for method in found["methods"].values():
        assert 0 < method["kept_bytes"] <= method["peak_bytes"] < method["total_bytes"]
        assert method["total_bytes"] == method["fixed_bytes"] + method["peak_bytes"]
        assert sum(method["kinds"].values()) == method["total_bytes"]
    assert found["methods"]["lorafa"]["kept_bytes"] < found["methods"]["lora"]["kept_bytes"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_json_has_what_fits(sound):
    short = ["--sequence", "64", "--methods", "lorafa", "--dropout", "0"]
    code, out, err = call(sound, "--json", "--memory", "1", *short)
    assert (code, err) == (0, "")
    [method] = json.loads(out)["methods"].values()
    assert method["largest_batch"]["plain"] > 0 and method["longest_sequence"]["plain"] % 64 == 0


@pytest.mark.parametrize(
    ("model", "close"), [("lama-3-8b", "Llama-3-8B"), ("roberta", "RoBERTa-base"), ("t5 base", "T5-base")]
)
def test_unknown_names_list_close_ones(model, close):
    assert f"Close names: {close}" in assert_refused(model) or close in assert_refused(model)


def test_an_unknown_model_type_lists_close_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "lama"}))
    assert "llama" in assert_refused(str(tmp_path)).rpartition("Close names")[2]


def test_names_take_sizes():
    few = "llama-3-8b:num_hidden_layers=2,hidden_size=64,intermediate_size=64,vocab_size=64,head_dim=4"
    code, out, _ = call(few, "--sequence", "8", "--methods", "lorafa", "--dropout", "0")
    assert code == 0 and "14 layers adapted" in out and "by its name" in out
    assert "expected size=number" in assert_refused("llama-3-8b:hidden_size=many")
    assert "num_hidden_layers is 0" in assert_refused("llama-3-8b:num_hidden_layers=0")


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("llama", "a causal language model"),
        ("t5", "a sequence-to-sequence model"),
        ("vit", "a classifier"),
        ("clip_vision_model", "the base model"),
    ],
)
def test_a_config_without_architectures_says_what_it_is_taken_for(tmp_path, family, said):
    config = families.config_of(family) if family in families.FAMILIES else {"model_type": family}
    config.pop("architectures", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"taken as {said}" in resolve(str(tmp_path)).title


@pytest.mark.slow
def test_images_ignore_the_sequence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(families.config_of("vit")))
    outputs = [call(str(tmp_path), "--sequence", n, "--methods", "lorafa") for n in ("16", "4000")]
    assert outputs[0] == outputs[1] and "does not matter for images" in outputs[0][1]


@pytest.mark.slow
def test_targets_and_shards(sound):
    def total(*arguments: str) -> dict:
        options = ["--json", "--sequence", "16", "--methods", "lora", "--dropout", "0"]
        return json.loads(call(sound, *options, *arguments)[1])

    one, some = total(), total("--targets", "q_proj,v_proj")
    assert (one["setting"]["adapted_layers"], some["setting"]["adapted_layers"]) == (14, 4)
    assert some["methods"]["lora"]["kept_bytes"] < one["methods"]["lora"]["kept_bytes"]
    shared = total("--devices", "4")["methods"]["lora"]["kinds"]
    weights = one["methods"]["lora"]["kinds"]["weights"]
    assert shared["weights"] == -(-weights // 4)
    assert "target_modules matches no module" in assert_refused(sound, "--targets", "q_prj")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "sgd"])
def test_optimizers(sound, optimizer):
    options = ["--json", "--sequence", "16", "--methods", "full", "--dropout", "0", "--device", "cpu"]
    found = json.loads(call(sound, *options, "--dtype", "fp32", "--optimizer", optimizer)[1])
    kinds = found["methods"]["full"]["kinds"]
    share = kinds["optimizer"] / kinds["weights"]
    assert {"adamw": 1.9 < share < 2.1, "adamw-8bit": 0.4 < share < 0.8, "sgd": share == 0}[optimizer]


@pytest.mark.slow
def test_a_plan_leaves_torch_as_it_was(sound):
    F = torch.nn.functional
    known = F.dropout, F.scaled_dot_product_attention, torch.get_rng_state, torch.get_default_dtype()
    for device in ("cuda", "cpu"):
        call(sound, "--sequence", "16", "--methods", "lora", "--device", device)
    now = F.dropout, F.scaled_dot_product_attention, torch.get_rng_state, torch.get_default_dtype()
    assert known == now
