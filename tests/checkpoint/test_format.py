"""What goes into a checkpoint's bytes, comes out of them, and is refused."""

from __future__ import annotations

import datetime
import enum
import math
import os
import pickle
import re
import sys
import types
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from trainkit.checkpoint import format
from trainkit.errors import CheckpointError

plain_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
)
plain_states = st.recursive(
    plain_leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.booleans(), inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


def written(path: Path, state: dict[str, Any]) -> Path:
    with open(path, "wb") as file:
        format.write(file, state)
    return path


def same(left: Any, right: Any) -> bool:
    """Equal, of the same types all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return [*left] == [*right] and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@given(state=plain_states)
def test_plain_values_come_back_as_they_were(state: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written(tmp_path_factory.mktemp("plain") / "x.ckpt", {"state": state})
    assert same(format.read(path), {"state": state})


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6).reshape(2, 3).T,
        torch.zeros(0, 3),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.tensor([math.nan, -math.inf]).nan_to_num(),
        torch.tensor([1 + 2j]).conj(),
        torch.Size([2, 3]),
        torch.float16,
        torch.device("cpu"),
        Counter({30: 1, 80: 1}),
        10**50,
        math.inf,
    ],
    ids=str,
)
def test_what_torch_has_comes_back_as_it_was(value: Any, tmp_path: Path) -> None:
    assert same(format.read(written(tmp_path / "x.ckpt", {"v": value}))["v"], value)


def test_tensors_that_share_memory_still_do(tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    state = format.read(written(tmp_path / "x.ckpt", {"tied": weight, "head": weight, "part": weight[1:3]}))
    state["tied"][1] = 7.0
    assert state["head"][1] == 7.0
    assert state["part"][0] == 7.0


def test_a_state_dict_keeps_its_versions_and_a_parameter_becomes_a_tensor(tmp_path: Path) -> None:
    module = torch.nn.BatchNorm1d(2)
    state = format.read(written(tmp_path / "x.ckpt", {"state_dict": module.state_dict(), "p": module.weight}))
    assert state["state_dict"]._metadata == module.state_dict()._metadata
    assert type(state["p"]) is torch.Tensor
    assert not state["p"].requires_grad


@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.NAdam, torch.optim.RMSprop]
)
def test_optimizer_states_can_be_saved(optimizer: Any, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    made = optimizer(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    made.step()
    state = format.read(written(tmp_path / "x.ckpt", {"optimizer": made.state_dict()}))
    assert same(state["optimizer"], made.state_dict())


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5]),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.2),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.CosineAnnealingLR(o, 5)], [2]
        ),
    ],
)
def test_scheduler_states_can_be_saved(scheduler: Any, tmp_path: Path) -> None:
    made = scheduler(torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1))
    assert same(format.read(written(tmp_path / "x.ckpt", {"s": made.state_dict()}))["s"], made.state_dict())


@pytest.mark.parametrize(
    ("value", "number"),
    [(np.float32(0.5), 0.5), (np.float64(0.1), 0.1), (np.int64(3), 3), (np.bool_(True), True), (np.str_("a"), "a")],
)
def test_numpys_scalars_become_pythons_numbers(value: Any, number: Any) -> None:
    plain = format.check_plain({"v": [value]})["v"][0]
    assert type(plain) is type(number)
    assert plain == number


class Colour(enum.IntEnum):
    RED = 1


class Fancy(torch.Tensor):
    pass


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"callbacks": {"Mine": {"history": [1, 2, 3, np.zeros(2)]}}}, "callbacks/Mine/history[3] is a numpy.ndarray"),
        ({"a": ({"b": {1, 2}},)}, "a[0]/b is a set; "),
        ({"a": {3: defaultdict(list)}}, "a[3] is a collections.defaultdict; .* Save dict(it)."),
        ({"p": Path("x")}, "Save str(it)."),
        ({"p": Pair(1, 2)}, "Save tuple(it)"),
        ({"p": Colour.RED}, "Save int(it)."),
        ({"m": torch.nn.Linear(1, 1)}, "m is a torch.nn.modules.linear.Linear; .* Save its state_dict()."),
        ({"b": b""}, "b is a bytes; .* Save list(it)"),
        ({"f": math.sqrt}, "Code can't be saved"),
        ({"d": np.datetime64("2020-01-01")}, "d is a numpy.datetime64"),
        ({"t": torch.zeros(1).as_subclass(Fancy)}, "only its own code can read"),
        ({"t": torch.zeros(2, device="meta")}, "t is a tensor on the meta device"),
        ({torch.zeros(1): 1}, "is a tensor used as a key"),
        ({(1, np.zeros(1).tobytes): 1}, "is a builtin_function_or_method"),
    ],
)
def test_anything_else_is_refused_by_its_path(state: dict[Any, Any], message: str) -> None:
    pattern = ".*".join(map(re.escape, message.split(".*")))
    with pytest.raises(TypeError, match=pattern):
        format.check_plain(state)


def test_a_path_begins_where_the_caller_says() -> None:
    with pytest.raises(TypeError, match=r"^callbacks/Mine/x is an object; "):
        format.check_plain({"x": object()}, "callbacks/Mine")


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.extend([endless, endless])
    with pytest.raises(TypeError, match="or holds itself"):
        format.check_plain({"endless": endless})


def test_a_plain_torch_load_reads_a_checkpoint_and_so_does_a_memory_mapped_one(tmp_path: Path) -> None:
    path = written(tmp_path / "x.ckpt", {"state_dict": {"w": torch.arange(5.0)}, "epoch": 1})
    for state in (
        torch.load(path, weights_only=True),
        torch.load(path, weights_only=True, mmap=True),
        format.read(path, mmap=True),
    ):
        assert torch.equal(state["state_dict"]["w"], torch.arange(5.0))


# ---- files that are not what they should be
def test_every_byte_of_a_record_is_covered_by_a_checksum(tmp_path: Path) -> None:
    path = written(tmp_path / "x.ckpt", {"w": torch.rand(50), "note": "abc"})
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: (info.header_offset, info.file_size) for info in archive.infolist()}
    for name, (offset, size) in records.items():
        start = offset + 30 + int.from_bytes(whole[offset + 26 : offset + 28], "little")
        start += int.from_bytes(whole[offset + 28 : offset + 30], "little")
        for position in {start, start + size // 2, start + size - 1}:
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=rf"x\.ckpt is damaged: .*{name}"):
                format.read(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_recognized(share: float, tmp_path: Path) -> None:
    path = written(tmp_path / "x.ckpt", {"w": torch.rand(1000)})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match="is cut off: its end is missing after"):
        format.read(path)
    with pytest.raises(CheckpointError, match="is cut off"):
        format.read(path, mmap=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, I am a text", "is not a checkpoint"),
        (pickle.dumps({"a": 1}), "is not a checkpoint"),
    ],
)
def test_another_kind_of_file_is_not_a_checkpoint(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        format.read(path)


def test_another_zip_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="is a zip file, but not a checkpoint"):
        format.read(tmp_path / "x.ckpt")


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it_ran"),)

    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"was refused: it holds objects \(posix.mkdir\).*weights_only=False"):
        format.read(tmp_path / "x.ckpt")
    assert not (tmp_path / "it_ran").exists()


def test_the_environment_can_not_switch_the_refusal_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"x": datetime.date(2026, 1, 1)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="was refused"):
        format.read(tmp_path / "x.ckpt")


def test_a_file_that_holds_no_dict_says_what_it_holds(tmp_path: Path) -> None:
    torch.save(torch.zeros(2), tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="holds a Tensor, not the dict of a checkpoint"):
        format.read(tmp_path / "x.ckpt")


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(2)}, tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(format.read(tmp_path / "x.ckpt")["w"], torch.ones(2))


def test_what_lightning_keeps_beside_plain_values_can_be_read(tmp_path: Path) -> None:
    hparams = {"args": Namespace(lr=0.5, sizes=[1, 2]), "folder": Path("data"), "every": datetime.timedelta(minutes=3)}
    torch.save({"hyper_parameters": hparams}, tmp_path / "theirs.ckpt")
    before = torch.serialization.get_safe_globals()
    assert format.read(tmp_path / "theirs.ckpt") == {"hyper_parameters": hparams}
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_an_attribute_dict_of_lightnings_becomes_a_dict_without_lightning(tmp_path: Path) -> None:
    module = types.ModuleType("lightning.fabric.utilities.data")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lightning", "lightning.fabric", "lightning.fabric.utilities", module.__name__):
            patch.setitem(sys.modules, name, module)
        torch.save({"hyper_parameters": module.AttributeDict(lr=0.5)}, tmp_path / "theirs.ckpt")
    found = format.read(tmp_path / "theirs.ckpt")["hyper_parameters"]
    assert (type(found), found) == (dict, {"lr": 0.5})
