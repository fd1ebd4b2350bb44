"""Whatever is in a folder or a configuration, loading it is right or a ValueError that says what is wrong,
soon, and leaves the model untouched.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import threading
import time
import tracemalloc
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lorafa_kernels import (
    LoRAFAConfig,
    LoRAFALinear,
    apply_lorafa,
    load_adapter,
    lorafa_state_dict,
    save_adapter,
)
from lorafa_kernels.model import checkpoint
from lorafa_kernels.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE

FIELDS = [
    "r",
    "lora_alpha",
    "target_modules",
    "lora_dropout",
    "use_rslora",
    "init_lora_weights",
    "exclude_modules",
]
FIELDS += ["modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"]


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"q": nn.Linear(6, 6), "layers": nn.Sequential(nn.Linear(6, 4)), "norm": nn.LayerNorm(6)}
    )


def adapted() -> nn.Module:
    return apply_lorafa(base(), LoRAFAConfig(target_modules=["q", "0"], r=2))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(adapted(), folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes((original / name).read_bytes())
    return tmp_path


def state(model):
    return [(n, id(m), type(m), sorted(vars(m)), {k: (id(p), p.requires_grad, p.tolist()) for k, p in m._parameters.items() if p is not None}) for n, m in model.named_modules()]  # fmt: skip  # noqa: E501


MODELS = {"fresh": base(), "adapted": adapted()}


def assert_refused(folder, words: str, error=ValueError) -> None:
    for model in MODELS.values():
        before = state(model)
        with pytest.raises(error, match=words):
            load_adapter(model, folder)
        assert state(model) == before


@contextmanager
def little_memory():
    """Fails where Python takes 256 MiB at once, which reading a file of a terabyte would."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 256 << 20


def edit(folder, **fields) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DEEP = "[" * 5000 + "]" * 5000
CONFIGS = {
    "deep": ("target_modules", DEEP),
    "deep in a field of others": ("eva_config", DEEP),
    "an integer of 5,000 digits": ("r", "9" * 5000),
    "an integer of 400 digits": ("r", "9" * 400),
    "an alpha of 400 digits": ("lora_alpha", "9" * 400),
    "a dropout of 400 digits": ("lora_dropout", "9" * 400),
    "an infinite alpha": ("lora_alpha", "1e999"),
    "a NaN": ("lora_alpha", "NaN"),
    "a rank of 400 digits": ("rank_pattern", '{"q": ' + "9" * 400 + "}"),
    "an index that is none": ("layers_to_transform", "[1.5]"),
    "a list of lists": ("target_modules", "[[]]"),
    "a number": ("target_modules", "3"),
    "an object": ("modules_to_save", "{}"),
    "a long value of an unsupported field": ("a_field_of_tomorrow", '"' + "x" * 100_000 + '"'),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_of_absurd_values_names_the_field(case, folder):
    field, text = CONFIGS[case]
    fields = json.loads((folder / CONFIG_FILE).read_text())
    fields[field] = "here"
    (folder / CONFIG_FILE).write_text(json.dumps(fields).replace('"here"', text))
    words = "not valid JSON" if case.startswith("deep") or "5,000" in case else re.escape(field)
    assert_refused(folder, words)
    try:
        load_adapter(MODELS["fresh"], folder)
    except ValueError as error:
        assert len(str(error)) < 2000


def test_a_rank_that_no_file_has_is_refused_before_memory_is_taken(folder):
    edit(folder, r=2**31 - 1)
    assert_refused(folder, r"r=2|expected \(2147483647, 6\)")


@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_an_expression_that_never_ends_does_not_hang(field, folder):
    expression = "(q|q|qq)*(" + "(l*a*y*e*r*s*)*" * 8 + ")*!"
    edit(folder, **{field: expression if field == "target_modules" else {expression: 2}})
    model = nn.ModuleDict({"q": nn.Linear(6, 6), "q" * 60: nn.Linear(6, 6), "layers" * 12: nn.Linear(6, 4)})
    began = time.thread_time()
    with pytest.raises(ValueError, match=r"target_modules|missing|unexpected"):
        load_adapter(model, folder)
    assert time.thread_time() - began < 10


def test_a_config_of_absurd_size_is_refused_without_being_read(folder, monkeypatch):
    with open(folder / CONFIG_FILE, "r+b") as file:
        file.truncate(1 << 30)
    with little_memory():
        assert_refused(folder, "not an adapter's config")


def header(length: int) -> bytes:
    return struct.pack("<Q", length)


def entry(dtype="F32", shape=(2, 6), offsets=(0, 48)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


KEY = "base_model.model.q.lora_A.weight"
WEIGHTS = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a header past the end": header(1 << 40) + b"{}",
    "a header of all the file and more": header(2**64 - 1) + b"{}",
    "not JSON": header(3) + b"{]}",
    "a list": header(2) + b"[]",
    "deep": header(len(DEEP)) + DEEP.encode(),
    "not text": header(2) + b"\xff\xfe",
    "an entry without a shape": header(20) + b'{"a": {"dtype": "F"}}'[:20],
    "huge shapes": (lambda h: header(len(h)) + h)(json.dumps({KEY: entry(shape=(10**30, 6))}).encode()),
    "negative": (lambda h: header(len(h)) + h + b"\0" * 48)(json.dumps({KEY: entry(shape=(-2, 6))}).encode()),
    "infinite": (lambda h: header(len(h)) + h)(
        json.dumps({KEY: {"dtype": "F32", "shape": [math.inf], "data_offsets": [0, 4]}}).encode()
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_damaged_are_said_to_be(case, folder):
    (folder / WEIGHTS_FILE).write_bytes(WEIGHTS[case])
    assert_refused(folder, "damaged|is missing|expected")


def test_weights_are_not_read_further_than_the_model_takes(folder):
    """A file of a terabyte, of which the disk has a few bytes."""
    content = json.dumps({KEY: entry(shape=(2**38,), offsets=(0, 1 << 40))}).encode()
    with open(folder / WEIGHTS_FILE, "wb") as file:
        file.write(header(len(content)) + content)
        file.truncate(8 + len(content) + (1 << 40))
    with little_memory():
        assert_refused(folder, rf"{re.escape(KEY)} has shape \(274877906944,\), expected \(2, 6\)")
    content = json.dumps({"x": entry(shape=(2**38,), offsets=(0, 1 << 40))}).encode()
    with open(folder / WEIGHTS_FILE, "r+b") as file:
        file.write(header(len(content)) + content)
    assert_refused(folder, "missing|damaged")


def test_a_header_of_absurd_size_is_refused_without_being_read(folder):
    with open(folder / WEIGHTS_FILE, "wb") as file:
        file.write(header(1 << 39))
        file.truncate(1 << 40)
    assert_refused(folder, "damaged: its header has")


def test_every_cut_and_every_flipped_header_byte_is_an_error_or_the_same_adapter(folder):
    content = (folder / WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    expected = {key: value.tolist() for key, value in lorafa_state_dict(load_adapter(base(), folder)).items()}
    model = adapted()
    for place in range(0, 8 + length, 7):
        for change in (1, 128):
            changed = bytearray(content)
            changed[place] ^= change
            (folder / WEIGHTS_FILE).write_bytes(changed)
            try:
                load_adapter(model, folder)
            except ValueError:
                continue
            got = {key: value.tolist() for key, value in lorafa_state_dict(model).items()}
            assert got.keys() == expected.keys()
    for cut in range(0, len(content), 41):
        (folder / WEIGHTS_FILE).write_bytes(content[:cut])
        with pytest.raises(ValueError, match="damaged"):
            load_adapter(model, folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX's")
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_neither_read_nor_replaced(kind, name, folder):
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    done = []

    def work():
        assert_refused(folder, f"{name} is not a regular file")
        with pytest.raises(IsADirectoryError, match=f"{name} is not a regular file"):
            save_adapter(MODELS["adapted"], folder)
        done.append(True)

    # A pipe without a writer would keep it waiting for ever.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert done
    assert sorted(os.listdir(folder)) == sorted([CONFIG_FILE, WEIGHTS_FILE])


class Bytes:
    def __fspath__(self):
        return b"folder"


NO_PATHS = {
    "int": 3,
    "None": None,
    "bytes": b"folder",
    "list": ["folder"],
    "bytes by fspath": Bytes(),
    "bool": True,
}


@pytest.mark.parametrize("case", NO_PATHS)
def test_a_path_that_is_none_is_a_type_error(case):
    for function in (save_adapter, load_adapter):
        with pytest.raises(TypeError, match=r"path must be a str or os\.PathLike"):
            function(MODELS["adapted"], NO_PATHS[case])


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_path_that_names_no_folder_is_a_value_error(path):
    for function in (save_adapter, load_adapter):
        with pytest.raises(ValueError, match="path must name a folder"):
            function(MODELS["adapted"], path)


@pytest.mark.parametrize("model", [None, 3, "model", {}])
def test_a_model_that_is_none_is_a_type_error(model, folder):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        load_adapter(model, folder)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        save_adapter(model, folder)


# Options of a layer and of a config.


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


WRONG = {
    "r": [
        0,
        -1,
        1.5,
        True,
        "8",
        None,
        2**31,
        10**5000,
        math.nan,
        numpy.float32(2),
        numpy.bool_(True),
        Unprintable(),
    ],
    "lora_alpha": [
        "16",
        None,
        math.inf,
        math.nan,
        10**400,
        True,
        1j,
        [8],
        Unprintable(),
        numpy.float64("nan"),
    ],
    "lora_dropout": ["0", None, -0.1, 1, 1.0, math.nan, True, 10**400, torch.tensor(0.1)],
    "use_rslora": ["yes", 1, 0, None, numpy.bool_(True), []],
    "init_lora_weights": ["pissa", 1, 0, None, 1.0, ["gaussian"], Unprintable()],
}
OF_THE_LAYER = {
    "in_features": ["6", 6.0, None, True, -1, 2**63],
    "out_features": ["6", 6.0, None, True, -1],
    "bias": [1, None, "no"],
    "dtype": ["float32", torch.int8, torch.complex64, 3, numpy.float32, torch.float8_e4m3fn],
    "adapter_dtype": ["float32", torch.int8, None, 3, numpy.array([1, 2])],
    "device": [3.5, "nowhere", b"cpu", True, ["cpu"], "cpu:x"],
}


@pytest.mark.parametrize("name", [*WRONG, *OF_THE_LAYER])
def test_wrong_options_of_a_layer_are_named(name):
    for value in {**WRONG, **OF_THE_LAYER}[name]:
        with pytest.raises((ValueError, TypeError), match=name):
            LoRAFALinear(**{"in_features": 6, "out_features": 6, name: value})
        if name in WRONG or name == "adapter_dtype":
            linear = nn.Linear(6, 6)
            with pytest.raises((ValueError, TypeError), match=name):
                LoRAFALinear.from_linear(linear, **{name: value})
            assert linear.weight.requires_grad


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_of_a_config_are_named(name):
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=name):
            LoRAFAConfig(**{"target_modules": ["q"], name: value})


@pytest.mark.parametrize("r", [4, numpy.int64(4), numpy.uint8(4)], ids=["int", "int64", "uint8"])
@pytest.mark.parametrize("alpha", [8, numpy.float32(8), numpy.int32(8), Fraction(8)], ids=str)
def test_numbers_of_numpy_are_as_good_and_become_pythons(r, alpha, tmp_path):
    layer = LoRAFALinear(
        numpy.int64(6), numpy.int32(6), r=r, lora_alpha=alpha, lora_dropout=numpy.float32(0.5)
    )
    assert (layer.r, layer.scaling, layer.lora_dropout) == (4, 2.0, 0.5)
    pattern = {"q": numpy.int16(3)}
    layers = numpy.array([0])
    config = LoRAFAConfig(r=r, lora_alpha=alpha, target_modules=["q", "0"], rank_pattern=pattern)
    assert {type(config.r), type(config.rank_pattern["q"])} == {int} and type(config.lora_alpha) in (
        int,
        float,
    )
    assert LoRAFAConfig(target_modules=["q"], layers_to_transform=layers).layers_to_transform == [0]
    save_adapter(apply_lorafa(base(), config), tmp_path)
    assert load_adapter(base(), tmp_path)["q"].r == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
expressions = st.text("ql0.*+?()[]{}|^$\\d,9:!=<ai", max_size=12)
near_misses = st.one_of(
    json_values,
    expressions,
    st.lists(expressions, max_size=3),
    st.dictionaries(expressions, st.integers(-1, 4) | st.floats(-1, 4), max_size=3),
    st.sampled_from(["q", ["q"], ["q", "0"], "all-linear", 0, 1, 2, 0.5, True, [0], {"q": 2}, "layers"]),
)
fields = st.dictionaries(
    st.sampled_from([*FIELDS, "peft_type", "use_dora", "tomorrow"]), near_misses, max_size=4
)
FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FUZZ
@given(fields)
def test_any_fields_make_a_config_or_a_value_error(changed):
    changed = {"target_modules": ["q"]} | {key: value for key, value in changed.items() if key in FIELDS}
    model = MODELS["fresh"]
    before = state(model)
    try:
        config = LoRAFAConfig(**changed)
        checkpoint.adaptation_of(model, config)
    except (ValueError, TypeError) as error:
        assert str(error)
    assert state(model) == before


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(fields)
def test_any_config_file_loads_or_is_a_value_error_and_the_model_untouched(
    original, tmp_path_factory, changed
):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / WEIGHTS_FILE).write_bytes((original / WEIGHTS_FILE).read_bytes())
    known = json.loads((original / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(known | changed))
    for model in MODELS.values():
        before = state(model)
        try:
            checkpoint._read_config(folder)
            loaded = load_adapter(base() if model is MODELS["fresh"] else model, folder)
        except ValueError as error:
            assert len(str(error)) < 5000
            assert state(model) == before
        else:
            assert (
                lorafa_state_dict(loaded).keys() == safetensors.torch.load_file(folder / WEIGHTS_FILE).keys()
            )


@FUZZ
@given(st.binary(max_size=64) | st.text(max_size=32).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_for_a_config_are_a_value_error(original, tmp_path_factory, content):
    folder = Path(tmp_path_factory.mktemp("bytes"))
    (folder / WEIGHTS_FILE).write_bytes((original / WEIGHTS_FILE).read_bytes())
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ValueError):
        load_adapter(MODELS["fresh"], folder)
