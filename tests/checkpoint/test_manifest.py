"""The trainkit.json of a directory, in one process: what is damaged or made to deceive is refused, by name."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainkit.checkpoint import manifest, plain, sharded_load, store, table
from trainkit.checkpoint.manifest import Piece, Spread
from trainkit.errors import CheckpointError

WEIGHT = torch.arange(12.0).reshape(4, 3)
PLAIN = torch.arange(5)


def typed(record: str, tensor: torch.Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {
        "$tensor": {
            "record": record,
            "dtype": dtype,
            "shape": [*tensor.shape],
            "stride": [*tensor.stride()],
            "offset": 0,
        }
    }


STATE = {
    "global_step": 3,
    "epoch": 1,
    "optimizer_states": [],
    "state_dict": {"w": typed("spread/state_dict/w", WEIGHT), "n": typed("data/0", PLAIN)},
}


def piece(file: str, start: int, part: torch.Tensor, offsets: tuple[int, ...]) -> Piece:
    data = part.contiguous().numpy().tobytes()
    return Piece(file, start, len(data), hashlib.sha256(data).hexdigest(), offsets, tuple(part.shape))


def made(directory: Path, cuts: int = 2, state: Any = None) -> Path:
    """Write a directory as so many processes would have, each with some rows of the weight."""
    directory.mkdir()
    parts = WEIGHT.chunk(cuts)
    (directory / "plain.data").write_bytes(PLAIN.numpy().tobytes())
    pieces, row = [], 0
    for rank, part in enumerate(parts):
        (directory / f"{rank}.data").write_bytes(part.contiguous().numpy().tobytes())
        pieces.append(piece(f"{rank}.data", 0, part, (row, 0)))
        row += len(part)
    raw = torch.frombuffer(bytearray(PLAIN.numpy().tobytes()), dtype=torch.uint8)
    records = {
        "data/0": Spread("uint8", (40,), (piece("plain.data", 0, raw, (0,)),)),
        "spread/state_dict/w": Spread("float32", (4, 3), tuple(pieces)),
    }
    files = {"plain.data": 40, **{f"{rank}.data": part.numel() * 4 for rank, part in enumerate(parts)}}
    text = table.state_text(STATE if state is None else state)
    (directory / "trainkit.json").write_bytes(manifest.compose(text, records, files, True, {"trainkit": "test"}))
    return directory


def changed(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a trainkit.json says, and sign it again, as somebody who means harm would."""
    said = json.loads((directory / "trainkit.json").read_text())
    change(said)
    said.pop("sha256")
    state = said.pop("state", None)
    (directory / "trainkit.json").write_bytes(table.signed(said, json.dumps(state)))


# ---- whole
def test_one_process_without_a_group_reads_what_several_have_written(tmp_path: Path) -> None:
    for cuts in (1, 2, 3, 4):
        directory = made(tmp_path / f"{cuts}.ckpt", cuts)
        state = store.load(directory)
        assert torch.equal(state["state_dict"]["w"], WEIGHT)
        assert torch.equal(state["state_dict"]["n"], PLAIN)
        assert store.step_of(directory) == 3
    assert store.newest(tmp_path) is not None


def test_a_tensor_can_be_left_in_its_files_and_read_when_it_is_wanted(tmp_path: Path) -> None:
    directory = made(tmp_path / "x.ckpt")
    state = sharded_load.load_lazily(directory)
    stored = state["state_dict"]["w"]
    assert (stored.shape, stored.dtype) == (WEIGHT.shape, WEIGHT.dtype)
    assert torch.equal(stored.read(), WEIGHT)
    assert torch.equal(stored.read_like(torch.zeros(4, 3)), WEIGHT)
    assert repr(stored) == "Stored(state_dict/w, torch.float32, (4, 3))"
    (directory / "1.data").write_bytes(b"\1" * 24)
    with pytest.raises(CheckpointError, match=r"1\.data \(state_dict/w\) was changed"):
        stored.read()


def test_every_dtype_of_a_checkpoint_has_its_size_here() -> None:
    assert {name: dtype.itemsize for name, dtype in plain.DTYPES.items()} == manifest.ITEM_SIZES


def test_looking_into_a_directory_needs_no_torch(tmp_path: Path) -> None:
    directory = made(tmp_path / "x.ckpt")
    code = f"""
import sys
from trainkit.file_commands import main
code = main("inspect", [{str(directory)!r}])
assert "torch" not in sys.modules
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "yes, every byte of 4 files" in done.stdout
    assert "4 x 3" in done.stdout


# ---- damaged
def test_any_flipped_bit_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    directory = made(tmp_path / "x.ckpt")
    for name in os.listdir(directory):
        good = (directory / name).read_bytes()
        for at in {0, 1, len(good) // 3, len(good) // 2, len(good) - 1}:
            (directory / name).write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
            for read in (store.load, manifest.verify):
                with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                    read(directory)
        (directory / name).write_bytes(good)
    store.load(directory)


def test_a_file_that_is_cut_off_longer_or_missing_is_named(tmp_path: Path) -> None:
    directory = made(tmp_path / "x.ckpt")
    for name in ("plain.data", "0.data", "1.data", "trainkit.json"):
        good = (directory / name).read_bytes()
        for bad in (b"", good[:-1], good + b"\0"):
            (directory / name).write_bytes(bad)
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                store.load(directory)
        (directory / name).unlink()
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            store.load(directory)
        (directory / name).symlink_to("/etc/hostname")
        with pytest.raises(CheckpointError):
            store.load(directory)
        (directory / name).unlink()
        (directory / name).write_bytes(good)


def test_last_is_the_newest_one_that_is_good_whatever_form_it_has(tmp_path: Path) -> None:
    older, newer = made(tmp_path / "3.ckpt"), made(tmp_path / "5.ckpt", state={**STATE, "global_step": 5})
    store.save(tmp_path / "4.ckpt", {"global_step": 4, "optimizer_states": [], "state_dict": {}})
    assert store.newest(tmp_path) == newer
    (newer / "0.data").unlink()
    with pytest.warns(UserWarning, match=r"5\.ckpt is damaged: its 0\.data is missing"):
        assert store.newest(tmp_path) == tmp_path / "4.ckpt"
    (newer / "trainkit.json").unlink()
    with pytest.warns(UserWarning, match=r"5\.ckpt is damaged: its trainkit\.json is missing"):
        assert store.newest(tmp_path) == tmp_path / "4.ckpt"
    shutil.rmtree(newer)
    (tmp_path / "4.ckpt").unlink()
    assert store.newest(tmp_path) == older


# ---- made to deceive
def first(said: dict[str, Any]) -> list[Any]:
    pieces: list[Any] = said["records"]["spread/state_dict/w"][2]
    return pieces[0]


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a path": lambda said: said["files"][1].__setitem__(0, "../0.data"),
    "an absolute path": lambda said: said["files"][1].__setitem__(0, "/etc/passwd"),
    "another name": lambda said: said["files"][1].__setitem__(0, "zero.data"),
    "a name with a line end": lambda said: said["files"][1].__setitem__(0, "0.data\n"),
    "its own name": lambda said: said["files"][1].__setitem__(0, "trainkit.json"),
    "a file twice": lambda said: said["files"][2].__setitem__(0, "0.data"),
    "a negative size": lambda said: said["files"][1].__setitem__(1, -24),
    "a size that is true": lambda said: said["files"][1].__setitem__(1, True),
    "no files": lambda said: said.pop("files"),
    "no records": lambda said: said.pop("records"),
    "a dtype that is not": lambda said: said["records"]["spread/state_dict/w"].__setitem__(0, "object"),
    "a huge shape": lambda said: said["records"]["spread/state_dict/w"].__setitem__(1, [1 << 40, 1 << 40]),
    "a shape with more in it": lambda said: said["records"]["spread/state_dict/w"].__setitem__(1, [5, 3]),
    "a shape with less in it": lambda said: said["records"]["spread/state_dict/w"].__setitem__(1, [3, 3]),
    "a piece outside": lambda said: first(said)[3].__setitem__(0, 3),
    "a negative offset": lambda said: first(said)[3].__setitem__(0, -1),
    "a piece upon another": lambda said: first(said)[3].__setitem__(0, 1),
    "a piece that is none": lambda said: said["records"]["spread/state_dict/w"][2].__setitem__(0, 7),
    "bytes twice": lambda said: said["records"]["spread/state_dict/w"][2][1].__setitem__(0, 1),
    "bytes of nobody": lambda said: said["records"].pop("data/0"),
    "a file of no number": lambda said: first(said).__setitem__(0, 9),
    "a file before the first": lambda said: first(said).__setitem__(0, -1),
    "a start beyond": lambda said: first(said).__setitem__(1, 4),
    "no digest": lambda said: first(said).__setitem__(2, "0" * 63),
    "another digest": lambda said: first(said).__setitem__(2, "0" * 64),
    "another machine's bytes": lambda said: said.__setitem__("byteorder", "middle"),
    "another format": lambda said: said.__setitem__("format", "trainkit"),
    "a newer version": lambda said: said.__setitem__("version", 2),
    "a tensor of no record": lambda said: said["state"]["state_dict"]["w"]["$tensor"].__setitem__("record", "data/7"),
    "a tensor beyond its record": lambda said: said["state"]["state_dict"]["w"]["$tensor"].__setitem__("offset", 5),
    "a kind of value that is not": lambda said: said["state"].__setitem__("x", {"$code": "import os"}),
    "a state that is a list": lambda said: said.__setitem__("state", []),
}


def read_lazily(directory: Path) -> None:
    for value in sharded_load.load_lazily(directory)["state_dict"].values():
        value.read()


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_what_nobody_wrote_is_refused_although_its_digest_is_right(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    directory = made(tmp_path / "x.ckpt")
    changed(directory, change)
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        store.load(directory)
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        read_lazily(directory)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_trainkit_json_leads_to_anything_but_a_state_or_a_checkpoint_error(data: Any, tmp_path: Path) -> None:
    directory = tmp_path / "x.ckpt"
    shutil.rmtree(directory, ignore_errors=True)
    made(directory)

    def change(said: dict[str, Any]) -> None:
        spot: Any = said
        while True:
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            key = data.draw(st.sampled_from(keys))
            if not spot[key] or not isinstance(spot[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
                spot[key] = data.draw(values)
                return
            spot = spot[key]

    changed(directory, change)
    for read in (store.load, sharded_load.load_lazily, store.head):
        with contextlib.suppress(CheckpointError):
            read(directory)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    seed=st.randoms(use_true_random=False),
)
def test_boxes_that_make_up_a_tensor_are_told_from_those_that_do_not(
    shape: list[int], cuts: list[int], seed: Any
) -> None:
    boxes = [((), ())]
    for length, count in zip(shape, cuts, strict=False):
        edges = sorted({0, length, *(seed.randrange(length + 1) for _ in range(count))})
        boxes = [
            ((*where, start), (*size, stop - start))
            for where, size in boxes
            for start, stop in itertools.pairwise(edges)
        ]
    seed.shuffle(boxes)
    pieces = [Piece("0.data", 0, 0, "", where, size) for where, size in boxes]
    assert sum(math.prod(p.shape) for p in pieces) == math.prod(shape)
    assert not manifest._overlap(pieces)
    assert manifest._overlap([*pieces, seed.choice(pieces)])


# ---- of others
def test_a_directory_of_torchs_own_is_refused_and_nothing_in_it_is_run(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    directory = tmp_path / "theirs.ckpt"
    directory.mkdir()
    (directory / ".metadata").write_bytes(pickle.dumps(Evil()))
    for read in (store.load, store.head, store.newest):
        with pytest.raises(CheckpointError, match=r"torch\.distributed\.checkpoint wrote it.*dcp_to_torch_save"):
            read(directory if read is not store.newest else tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_directory_takes_a_files_place_and_a_file_a_directorys_and_nothing_else_does(tmp_path: Path) -> None:
    directory = made(tmp_path / "x.ckpt")
    store.save(directory, {"global_step": 9})
    assert directory.is_file()
    assert os.listdir(tmp_path) == ["x.ckpt"]
    other = tmp_path / "mine.ckpt"
    other.mkdir()
    (other / "notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match=r"mine\.ckpt is a directory"):
        store.save(other, {"global_step": 9})
    assert (other / "notes.txt").read_text() == "keep"
    assert sorted(os.listdir(tmp_path)) == ["mine.ckpt", "x.ckpt"]


def test_a_second_name_is_a_directory_of_second_names(tmp_path: Path) -> None:
    directory = made(tmp_path / "x.ckpt")
    store.link_or_copy(directory, tmp_path / "last.ckpt", replace=False)
    assert os.path.samefile(directory / "0.data", tmp_path / "last.ckpt" / "0.data")
    store.link_or_copy(directory, tmp_path / "last.ckpt")  # over what is there
    store.link_or_copy(directory, tmp_path / "link.ckpt", symbolic=True)
    store.link_or_copy(directory, tmp_path / "last.ckpt", symbolic=True)
    store.link_or_copy(directory, tmp_path / "last.ckpt")
    assert store.remove(directory)
    assert store.step_of(tmp_path / "last.ckpt") == 3
    assert store.remove(tmp_path / "link.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]
