"""A save that dies at any moment leaves the old adapter or the new one, for this library and for PEFT; what
is only partly there is not saved.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import types
from contextlib import contextmanager

import pytest
import torch
from processes import start
from torch import nn

from lorafa_kernels import (
    LoRAFAConfig,
    apply_lorafa,
    disable_adapter,
    load_adapter,
    lorafa_parameters,
    lorafa_state_dict,
    save_adapter,
)
from lorafa_kernels.model import exchange
from lorafa_kernels.model.card import CARD_FILE
from lorafa_kernels.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from lorafa_kernels.model.names import lorafa_layers

pytestmark = pytest.mark.numerics

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to be killed")


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()


def adapter(seed: int, **fields) -> nn.Sequential:
    model = apply_lorafa(base(), LoRAFAConfig(**{"target_modules": ["0", "2"], "r": 2, **fields}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lorafa_layers(model).values():
            for parameter in (layer.lora_A, layer.lora_B):
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
    return model.eval()


def described(model) -> dict:
    tensors = {key: tensor.tolist() for key, tensor in lorafa_state_dict(model).items()}
    return tensors | {name: layer.scaling for name, layer in lorafa_layers(model).items()}


def pair(folder) -> tuple[bytes | None, ...]:
    """What a reader finds under the two names."""
    paths = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    return tuple(path.read_bytes() if path.exists() else None for path in paths)


class Dying:
    """Counts the moments between the steps of a save, and ends the process at the n-th."""

    STEPS = ("replace", "rename", "symlink", "link", "mkdir", "unlink", "rmdir")

    def __init__(self, n: int) -> None:
        self.left = n

    def moment(self) -> None:
        self.left -= 1
        if self.left == 0:
            os._exit(9)

    def around(self, function):
        def call(*args, **kwargs):
            self.moment()
            result = function(*args, **kwargs)
            self.moment()
            return result

        return call

    def open(self, path, mode):
        """A file that may have half of its content when the process ends."""
        file = open(path, mode)  # noqa: SIM115
        write = file.write
        dying = self

        class Halves:
            def __enter__(self):
                dying.moment()
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, content):
                write(content[: len(content) // 2])
                file.flush()
                dying.moment()
                write(content[len(content) // 2 :])

            flush, fileno = file.flush, file.fileno

        return Halves()


def killed(action, n: int) -> bool:
    """Run `action` in a process that ends at its n-th moment. Returns whether it got so far."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            dying = Dying(n)
            for name in Dying.STEPS:
                setattr(os, name, dying.around(getattr(os, name)))
            # A process that ends takes no file with it that was not synced, and syncing takes its time.
            os.fsync = dying.around(lambda descriptor: None)
            exchange.open = dying.open
            action()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the save failed"
    return code == 9


# The older adapter, and the new one.
CHANGES = {
    "another alpha": (adapter(1), adapter(2, lora_alpha=32)),
    "another rank": (adapter(1), adapter(2, r=3)),
    "the same config": (adapter(1), adapter(2)),
    "the first": (None, adapter(2)),
}


@contextmanager
def _without_links():
    """A file system without symbolic links."""
    known = os.symlink

    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    os.symlink = refuse
    try:
        yield
    finally:
        os.symlink = known


@needs_fork
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if "rank" in case else ()) for case in CHANGES]
)
def test_a_save_that_dies_leaves_the_old_or_the_new(case, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    old, new = CHANGES[case]
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    if old is not None:
        save_adapter(old, before)
    (before / "trainer_state.json").write_text("{}")
    (before / ".adapter_config.json.tmp").write_text("somebody else's")
    save_adapter(new, after)
    meant = {pair(before): old and described(old), pair(after): described(new)}
    found, linked, loaded = [], 0, set()
    for n in range(1, 1000):
        folder = tmp_path / str(n)
        shutil.copytree(before, folder)
        if not killed(lambda folder=folder: save_adapter(new, folder), n):
            break
        state = pair(folder)
        links = (folder / CONFIG_FILE).is_symlink(), (folder / WEIGHTS_FILE).is_symlink()
        linked += any(links)
        found.append(state)
        nothing = old is None and None in state
        assert nothing or state in meant, f"a mixture at moment {n}"
        # Readers see no more than the two files, by their names.
        if (state, links) not in loaded:
            loaded.add((state, links))
            if nothing:
                with pytest.raises(FileNotFoundError):
                    load_adapter(base(), folder)
            else:
                assert described(load_adapter(base(), folder)) == meant[state]
                check_peft(folder, new if state == pair(after) else old)
        # The next save goes on from there, and tidies up.
        save_adapter(new, folder)
        assert pair(folder) == pair(after) and not (folder / CONFIG_FILE).is_symlink()
        assert sorted(os.listdir(folder)) == sorted(
            [CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, "trainer_state.json", ".adapter_config.json.tmp"]
        )
    assert n > 8, "too few moments to tell anything"
    order = [state == pair(after) for state in found]
    assert order == sorted(order) and {*order} == {False, True}, "from the old to the new, once"
    assert (linked > 3 and len(loaded) > 4) == (case in ("another alpha", "another rank"))


def check_peft(folder, model) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is the other reader")
    loaded = peft.PeftModel.from_pretrained(base(), str(folder)).eval()
    theirs, ours = peft.get_peft_model_state_dict(loaded), lorafa_state_dict(model)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
    scalings = [m.scaling["default"] for m in loaded.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert scalings == [layer.scaling for layer in lorafa_layers(model).values()]


@pytest.mark.slow
@needs_fork
def test_a_save_that_dies_while_it_tidies_up_after_one_that_died(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    old, new = CHANGES["another rank"]
    third = adapter(3, lora_alpha=2)
    folders = {name: tmp_path / name for name in ("old", "new", "third")}
    for name, model in zip(folders, (old, new, third), strict=True):
        save_adapter(model, folders[name])
    pairs = {pair(folder): name for name, folder in folders.items()}
    died = []
    for n in range(1, 1000):
        folder = tmp_path / f"first-{n}"
        shutil.copytree(folders["old"], folder)
        if not killed(lambda folder=folder: save_adapter(new, folder), n):
            break
        links = sum((folder / name).is_symlink() for name in (CONFIG_FILE, WEIGHTS_FILE))
        kind = links, pairs[pair(folder)]
        if links and kind not in [known for known, _ in died]:
            died.append((kind, folder))
    # One link and two, old and new behind them.
    assert len(died) == 4
    for number, ((_, first), folder) in enumerate(died):
        for n in range(1, 1000):
            again = tmp_path / f"{number}-{n}"
            shutil.copytree(folder, again, symlinks=True)
            if not killed(lambda again=again: save_adapter(third, again), n):
                break
            assert pairs.get(pair(again)) in (first, "third"), f"a mixture at moment {n}"
            shutil.rmtree(again)
        assert pairs[pair(again)] == "third"


@pytest.mark.parametrize("step", ["replace", "fsync", "symlink", "link", "mkdir"])
def test_an_error_at_any_step_leaves_the_old_or_completes_the_new(step, tmp_path, monkeypatch):
    old, new = CHANGES["another rank"]
    save_adapter(old, tmp_path / "old")
    save_adapter(new, tmp_path / "new")
    known = getattr(os, step)
    for n in range(1, 100):
        folder = tmp_path / str(n)
        shutil.copytree(tmp_path / "old", folder)
        left = [n]

        def failing(*args, left=left, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return known(*args, **kwargs)

        monkeypatch.setattr(os, step, failing)
        try:
            save_adapter(new, folder)
        except OSError:
            expected = tmp_path / "old"
        else:
            expected = tmp_path / "new"
        monkeypatch.setattr(os, step, known)
        assert pair(folder) == pair(expected), n
        assert sorted(os.listdir(folder)) == sorted([CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])
        if left[0] > 0:
            break
    assert 1 < n < 99


@needs_fork
def test_without_links_there_is_the_old_the_new_or_nothing_but_no_mixture(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    old, new = CHANGES["another rank"]
    save_adapter(old, tmp_path / "old")
    save_adapter(new, tmp_path / "new")
    pairs = [pair(tmp_path / "old"), pair(tmp_path / "new")]

    def save(folder):
        with _without_links():
            save_adapter(new, folder)

    for n in range(1, 1000):
        folder = tmp_path / str(n)
        shutil.copytree(tmp_path / "old", folder)
        if not killed(lambda folder=folder: save(folder), n):
            break
        state = pair(folder)
        assert state in pairs or state[0] is None, f"a mixture at moment {n}"
        save(folder)
        assert pair(folder) == pairs[1]
        assert sorted(os.listdir(folder)) == sorted([CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])
    assert n > 8 and pair(folder) == pairs[1]


def test_files_that_are_links_of_the_user_are_replaced_and_what_they_lead_to_is_not(tmp_path):
    old, new = CHANGES["another rank"]
    save_adapter(old, tmp_path / "store")
    kept = pair(tmp_path / "store")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).symlink_to(f"../store/{name}")
    save_adapter(new, folder)
    assert described(load_adapter(base(), folder)) == described(new)
    assert pair(tmp_path / "store") == kept


@needs_fork
def test_savers_of_one_folder_wait_for_each_other(tmp_path):
    folder = tmp_path / "adapter"
    models = [adapter(1), adapter(2, r=3), adapter(3, lora_alpha=1)]
    save_adapter(models[0], folder)
    known = [described(model) for model in models]
    children = []
    for model in models[1:]:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(15):
                    save_adapter(model, folder)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    for _ in range(20):
        assert described(load_adapter(base(), folder)) in known
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert described(load_adapter(base(), folder)) in known[1:]
    assert sorted(os.listdir(folder)) == sorted([CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])


def test_threads_that_save_into_one_folder_wait_for_each_other(tmp_path):
    folder = tmp_path / "adapter"
    models = [adapter(1), adapter(2, r=3)]
    errors = []

    def work(model):
        try:
            for _ in range(10):
                save_adapter(model, folder)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert described(load_adapter(base(), folder)) in [described(model) for model in models]
    assert sorted(os.listdir(folder)) == sorted([CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])


def test_a_folder_that_stays_locked_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("fcntl", reason="the lock is POSIX's")
    save_adapter(adapter(1), tmp_path)
    monkeypatch.setattr(exchange, "_LOCK_SECONDS", 0.05)
    with exchange.locked(tmp_path) as held:
        assert held
        for function in (save_adapter, load_adapter):
            with pytest.raises(TimeoutError, match="locked"):
                function(adapter(2), tmp_path)


# Tensors of which only a part is here.


def zero_3(model, monkeypatch):
    """Partition every parameter as ZeRO-3 does, and offer what deepspeed offers to gather them."""
    stored, calls = {}, []

    @contextmanager
    def gathered(parameters, modifier_rank=None):
        calls.append(modifier_rank)
        for parameter in parameters:
            parameter.data = stored[parameter.ds_id].clone()
        yield
        for parameter in parameters:
            if modifier_rank is not None:
                stored[parameter.ds_id] = parameter.data
            parameter.data = torch.empty(0)

    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        stored[number] = parameter.data
        parameter.data = torch.empty(0)
    zero = types.SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    return calls


SAVED = {"modules_to_save": ["2"], "target_modules": ["0"]}


@pytest.mark.parametrize("fields", [{}, SAVED], ids=["adapter", "modules_to_save"])
def test_parameters_of_zero_3_are_gathered_to_save_and_to_load(fields, tmp_path, monkeypatch):
    plain, model = adapter(1, **fields), adapter(1, **fields)
    calls = zero_3(model, monkeypatch)
    state, expected = lorafa_state_dict(model), lorafa_state_dict(plain)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert all(parameter.shape == (0,) for parameter in model.parameters())
    save_adapter(model, tmp_path / "theirs")
    save_adapter(plain, tmp_path / "ours")
    assert pair(tmp_path / "theirs") == pair(tmp_path / "ours")

    other = adapter(2, **fields)
    save_adapter(other, tmp_path / "other")
    load_adapter(model, tmp_path / "other")
    assert calls[-1] == 0, "what is written is kept where rank 0 has written it"
    assert all(
        torch.equal(value, lorafa_state_dict(other)[key]) for key, value in lorafa_state_dict(model).items()
    )


CUTS = {
    "empty": lambda tensor: tensor.new_empty(0),
    "flat": lambda tensor: tensor.flatten()[:3],
    "a share of the rows": lambda tensor: tensor[:1],
    "freed": lambda tensor: tensor.clone(),
}


@pytest.mark.parametrize("name", ["0.lora_A", "0.lora_B", "2.weight"])
@pytest.mark.parametrize("cut", CUTS)
def test_what_is_only_partly_here_is_neither_saved_nor_loaded_into(cut, name, tmp_path):
    model = adapter(1, **SAVED)
    save_adapter(model, tmp_path / "before")
    before = pair(tmp_path / "before")
    parameter = dict(model.named_parameters())[name]
    parameter.data = CUTS[cut](parameter.data)
    if cut == "freed":
        parameter.untyped_storage().resize_(0)
    if (cut, name) == ("a share of the rows", "2.weight"):
        pytest.skip("the rows of a saved module may have been changed by resize_token_embeddings")
    for call in (
        lambda: lorafa_state_dict(model),
        lambda: save_adapter(model, tmp_path / "before"),
        lambda: load_adapter(model, tmp_path / "before"),
    ):
        with pytest.raises(
            ValueError, match=rf"{name}(\.weight)? is not here as a whole.*summon_full_params"
        ):
            call()
    assert pair(tmp_path / "before") == before


def _fsdp1_worker(rank: int, world: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    cpu, folder = torch.device("cpu"), f"{folder}/adapter"
    model = FullyShardedDataParallel(adapter(1), use_orig_params=True, device_id=cpu)
    if rank == 0:
        with pytest.raises(ValueError, match="is not here as a whole"):
            save_adapter(model, folder)
        assert not os.path.exists(folder)
    dist.barrier()
    with FullyShardedDataParallel.summon_full_params(model):
        save_adapter(model, folder)
    with pytest.raises(ValueError, match="under FullyShardedDataParallel already"):
        apply_lorafa(FullyShardedDataParallel(base(), device_id=cpu), LoRAFAConfig(target_modules=["0"]))


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_fsdp1_on_two_processes(tmp_path):
    start(_fsdp1_worker, 2, tmp_path)
    assert described(load_adapter(base(), tmp_path / "adapter")) == described(adapter(1))


# Names of wrapped models.


class DeepSpeedEngine(nn.Module):
    """What deepspeed.initialize returns, as far as names go."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"


class Own(nn.Module):
    """A model whose author called a child `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


WRAPPERS = {
    "AveragedModel": lambda model: torch.optim.swa_utils.AveragedModel(model),
    "DataParallel": lambda model: nn.DataParallel(model),
    "DeepSpeed": DeepSpeedEngine,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DeepSpeed of a compiled one": lambda model: DeepSpeedEngine(torch.compile(model, backend="eager")),
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_leave_no_trace_in_the_file(name, tmp_path):
    plain, wrap = adapter(1), WRAPPERS[name]
    wrapped = wrap(adapter(1))
    assert lorafa_state_dict(wrapped).keys() == lorafa_state_dict(plain).keys()
    save_adapter(plain, tmp_path / "plain")
    save_adapter(wrapped, tmp_path / "wrapped")
    assert pair(tmp_path / "wrapped") == pair(tmp_path / "plain")
    if "DeepSpeed" in name:
        with pytest.raises(ValueError, match="under DeepSpeed already"):
            load_adapter(wrap(base()), tmp_path / "plain")
    else:
        assert described(load_adapter(wrap(base()), tmp_path / "plain")) == described(plain)
    other = load_adapter(wrap(adapter(5)), tmp_path / "plain")
    assert described(other) == described(plain)
    assert [p.shape for p in lorafa_parameters(other)] == [p.shape for p in lorafa_parameters(plain)]
    with disable_adapter(other):
        pass


def test_wrappers_inside_of_a_model_leave_no_trace(tmp_path):
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(6, 5)), "head": nn.Linear(5, 4)})
    apply_lorafa(model, LoRAFAConfig(target_modules=["0", "head"]))
    names = list(lorafa_state_dict(model))
    model["body"] = nn.DataParallel(torch.compile(model["body"], backend="eager"))
    assert list(lorafa_state_dict(model)) == names
    assert list(lorafa_layers(model)) == ["body.0", "head"]


def test_a_child_that_is_called_module_keeps_its_name():
    model = apply_lorafa(Own(base()), LoRAFAConfig(target_modules=["0"]))
    assert list(lorafa_layers(model)) == ["module.0"]
    assert set(lorafa_state_dict(nn.DataParallel(model))) == {
        f"base_model.model.module.0.{name}.weight" for name in ("lora_A", "lora_B")
    }
