"""A checkpoint file is whole under its name, or it is not there: whatever fails, and whenever the process dies."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.checkpoint import format, store
from trainkit.errors import CheckpointError

STATE = {"global_step": 3, "epoch": 0, "optimizer_states": [], "state_dict": {"w": torch.arange(4000.0)}}


def run_of(step: int, **more: Any) -> dict[str, Any]:
    return {**STATE, "global_step": step, **more}


def hidden(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


# ---- saving
def test_a_saved_state_is_there_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    store.save(tmp_path / "new" / "deep" / "x.ckpt", STATE)
    assert torch.equal(store.load(tmp_path / "new/deep/x.ckpt")["state_dict"]["w"], STATE["state_dict"]["w"])
    assert stat.S_IMODE(os.stat(tmp_path / "new/deep/x.ckpt").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(tmp_path / "new/deep").st_mode) == 0o700
    assert names(tmp_path / "new/deep") == ["x.ckpt"]


def test_a_relative_path_is_relative_to_the_current_directory(tmp_path: Path) -> None:
    store.save("x.ckpt", STATE)
    assert store.load("x.ckpt")["global_step"] == 3
    assert names(tmp_path) == ["x.ckpt"]


def test_saving_again_replaces_the_file_and_not_what_a_link_points_to(tmp_path: Path) -> None:
    store.save(tmp_path / "x.ckpt", run_of(1))
    os.symlink("x.ckpt", tmp_path / "last.ckpt")
    store.save(tmp_path / "last.ckpt", run_of(2))
    assert not os.path.islink(tmp_path / "last.ckpt")
    assert [store.step_of(tmp_path / name) for name in ("x.ckpt", "last.ckpt")] == [1, 2]


def test_a_name_as_long_as_the_file_system_allows_can_be_saved(tmp_path: Path) -> None:
    store.save(tmp_path / ("x" * 250 + ".ckpt"), STATE)
    with pytest.raises(CheckpointError, match="the name has 256 bytes, more than the file system takes"):
        store.save(tmp_path / ("x" * 251 + ".ckpt"), STATE)
    assert len(names(tmp_path)) == 1


def test_what_can_not_be_saved_leaves_nothing_behind(tmp_path: Path) -> None:
    store.save(tmp_path / "x.ckpt", run_of(1))
    with pytest.raises(TypeError, match=r"callbacks/Mine is an object"):
        store.save(tmp_path / "x.ckpt", {"callbacks": {"Mine": object()}})
    assert names(tmp_path) == ["x.ckpt"]
    assert store.step_of("x.ckpt") == 1


class Faults:
    """The `os` that store.py uses, with one call failing: the n-th of those that touch the disk."""

    WATCHED = ("mkdir", "open", "write", "fsync", "replace", "link", "symlink", "unlink", "close")

    def __init__(self, fail_at: int, code: int) -> None:
        self.fail_at, self.code = fail_at, code
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.WATCHED:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            if name in ("unlink", "close"):  # cleaning up, which has to work when something else did not
                self.calls.append((name, arguments[0]))
                return real(*arguments, **options)
            self.calls.append((name, arguments[0]))
            if sum(call[0] not in ("unlink", "close") for call in self.calls) == self.fail_at:
                raise OSError(self.code, os.strerror(self.code), name)
            return real(*arguments, **options)

        return call


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], Faults]]:
    def install(fail_at: int, code: int) -> Faults:
        layer = Faults(fail_at, code)
        monkeypatch.setattr(store, "os", layer)
        return layer

    yield install
    monkeypatch.undo()


def count_operations(install: Callable[[int, int], Faults], action: Callable[[], None]) -> int:
    layer = install(0, 0)
    action()
    return sum(name not in ("unlink", "close") for name, _ in layer.calls)


ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES]


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_whatever_operation_of_a_save_fails_the_earlier_checkpoint_is_intact(
    code: int, tmp_path: Path, faults: Callable[[int, int], Faults]
) -> None:
    path = tmp_path / "x.ckpt"
    operations = count_operations(faults, lambda: store.save(path, run_of(1)))
    assert operations >= 6  # open, writes, fsync, replace, open and fsync of the directory
    for number in range(1, operations + 1):
        layer = faults(number, code)
        with pytest.raises(CheckpointError, match=r"x\.ckpt was .*written.*") as caught:
            store.save(path, run_of(2))
        assert isinstance(caught.value.__cause__, OSError)
        failed = [name for name, _ in layer.calls if name not in ("unlink", "close")][number - 1]
        published = "was written, but may be lost" in str(caught.value)
        assert published == (number > operations - 2), failed
        assert hidden(tmp_path) == []
        assert store.load(path)["global_step"] == (2 if published else 1)
        synced = [target for name, target in layer.calls if name == "fsync"]
        assert len(synced) == len(set(synced)) or published  # never twice on the same file
        opened = sum(name == "open" for name, _ in layer.calls) - (failed == "open")
        assert opened == sum(name == "close" for name, _ in layer.calls)
        faults(0, 0)
        store.save(path, run_of(1))


@pytest.mark.parametrize("symbolic", [False, True])
def test_whatever_operation_of_a_link_fails_the_earlier_last_is_intact(
    symbolic: bool, tmp_path: Path, faults: Callable[[int, int], Faults]
) -> None:
    for step in (1, 2):
        store.save(tmp_path / f"{step}.ckpt", run_of(step))
    link = lambda step: store.link_or_copy(tmp_path / f"{step}.ckpt", tmp_path / "last.ckpt", symbolic)  # noqa: E731
    operations = count_operations(faults, lambda: link(1))
    for number in range(1, operations + 1):
        faults(number, errno.EIO)
        with pytest.raises(CheckpointError, match=r"last\.ckpt was .*written"):
            link(2)
        assert hidden(tmp_path) == []
        assert store.step_of(tmp_path / "last.ckpt") == (2 if number > operations - 2 else 1)
        faults(0, 0)
        link(1)


def test_the_bytes_are_on_the_disk_before_the_name_is_and_the_name_before_the_save_is_acknowledged(
    tmp_path: Path, faults: Callable[[int, int], Faults]
) -> None:
    layer = faults(0, 0)
    store.save(tmp_path / "x.ckpt", STATE)
    calls = [name for name, _ in layer.calls]
    order = [name for number, name in enumerate(calls) if name != "write" or calls[number - 1] != "write"]
    assert order == ["open", "write", "fsync", "close", "replace", "unlink", "open", "fsync", "close"]


def test_a_file_that_may_not_be_larger_is_reported_and_removed(tmp_path: Path) -> None:
    store.save(tmp_path / "x.ckpt", run_of(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"x\.ckpt was not written: it is larger than a file may be here"):
            store.save(tmp_path / "x.ckpt", run_of(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["x.ckpt"]
    assert store.load(tmp_path / "x.ckpt")["global_step"] == 1


def test_a_full_device_ends_in_an_error_and_not_in_a_crash() -> None:
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        format.write(file, STATE)


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(tmp_path / "x.ckpt", run_of(1))
    layer = Faults(0, 0)

    def interrupt(*_: Any) -> int:
        raise KeyboardInterrupt

    layer.write = interrupt  # type: ignore[attr-defined]
    monkeypatch.setattr(store, "os", layer)
    with pytest.raises(KeyboardInterrupt):
        store.save(tmp_path / "x.ckpt", run_of(2))
    assert names(tmp_path) == ["x.ckpt"]
    assert store.step_of(tmp_path / "x.ckpt") == 1


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_where_there_are_no_hard_links_the_file_is_copied(
    code: int, tmp_path: Path, faults: Callable[[int, int], Faults]
) -> None:
    store.save(tmp_path / "1.ckpt", run_of(1))
    faults(1, code)
    store.link_or_copy(tmp_path / "1.ckpt", tmp_path / "last.ckpt")
    assert store.load(tmp_path / "last.ckpt")["global_step"] == 1
    assert not os.path.samefile(tmp_path / "1.ckpt", tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file/x.ckpt", r"file could not be made: .*/file is a file, not a directory"),
        ("file/deep/x.ckpt", r"file/deep could not be made: .*/file is a file, not a directory"),
        ("directory.ckpt", r"directory\.ckpt was not written: .*directory\.ckpt is a directory"),
    ],
)
def test_a_path_that_can_not_be_written_says_why(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory.ckpt").mkdir()
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        store.save(tmp_path / path, STATE)
    assert names(tmp_path) == before


# ---- second names
def test_a_hard_link_is_the_same_file_and_outlives_the_first_name(tmp_path: Path) -> None:
    store.save(tmp_path / "1.ckpt", run_of(1))
    store.save(tmp_path / "last.ckpt", run_of(0))
    store.link_or_copy(tmp_path / "1.ckpt", tmp_path / "last.ckpt")
    assert os.path.samefile(tmp_path / "1.ckpt", tmp_path / "last.ckpt")
    store.link_or_copy(tmp_path / "1.ckpt", tmp_path / "last.ckpt")  # once more does no harm
    assert store.remove(tmp_path / "1.ckpt")
    assert names(tmp_path) == ["last.ckpt"]
    assert store.load(tmp_path / "last.ckpt")["global_step"] == 1


def test_a_symbolic_link_is_relative_so_that_the_directory_can_be_moved(tmp_path: Path) -> None:
    store.save(tmp_path / "here" / "1.ckpt", run_of(1))
    store.link_or_copy(tmp_path / "here" / "1.ckpt", tmp_path / "here" / "last.ckpt", symbolic=True)
    os.rename(tmp_path / "here", tmp_path / "there")
    assert os.readlink(tmp_path / "there" / "last.ckpt") == "1.ckpt"
    assert store.load(tmp_path / "there" / "last.ckpt")["global_step"] == 1


def test_a_file_that_can_not_be_removed_is_a_warning(tmp_path: Path) -> None:
    assert store.remove(tmp_path / "not there")
    (tmp_path / "directory").mkdir()
    with pytest.warns(UserWarning, match="directory could not be removed"):
        assert not store.remove(tmp_path / "directory")


# ---- loading
def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    store.save(tmp_path / "epoch=1-step=10.ckpt", STATE)
    with pytest.raises(CheckpointError, match=r"did you mean epoch=1-step=10\.ckpt\?"):
        store.load(tmp_path / "epoch=1-step=1.ckpt")
    with pytest.raises(CheckpointError, match=rf"{tmp_path} has epoch=1-step=10\.ckpt\."):
        store.load(tmp_path / "last")
    with pytest.raises(CheckpointError, match=r"there is no directory .*nowhere"):
        store.load(tmp_path / "nowhere" / "last.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty has no \.ckpt file"):
        store.load(tmp_path / "empty" / "last.ckpt")


def test_a_directory_is_answered_with_what_is_in_it(tmp_path: Path) -> None:
    store.save(tmp_path / "x.ckpt", STATE)
    with pytest.raises(CheckpointError, match=r"is a directory, not a checkpoint: it holds x\.ckpt; name one of them"):
        store.load(tmp_path)


# ---- the newest
def test_the_newest_is_the_one_with_the_most_steps_whatever_names_and_dates_say(tmp_path: Path) -> None:
    for name, step in (("z.ckpt", 10), ("a.ckpt", 200), ("last.ckpt", 30), ("m.ckpt", 9)):
        store.save(tmp_path / name, run_of(step))
    os.utime(tmp_path / "a.ckpt", (0, 0))
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert store.newest(tmp_path) == tmp_path / "a.ckpt"


def test_of_two_names_of_one_state_last_is_the_newest(tmp_path: Path) -> None:
    store.save(tmp_path / "z.ckpt", run_of(10))
    store.link_or_copy(tmp_path / "z.ckpt", tmp_path / "last.ckpt")
    assert store.newest(tmp_path) == tmp_path / "last.ckpt"


def test_at_the_same_step_the_one_further_on_is_newer(tmp_path: Path) -> None:
    store.save(tmp_path / "a.ckpt", run_of(10, progress={"total_batch": 12, "epoch": 1}))
    store.save(tmp_path / "b.ckpt", run_of(10, progress={"total_batch": 11, "epoch": 0}))
    assert store.newest(tmp_path) == tmp_path / "a.ckpt"


def test_one_with_weights_only_is_the_newest_only_if_there_is_no_other(tmp_path: Path) -> None:
    store.save(tmp_path / "weights.ckpt", {"global_step": 20, "epoch": 1, "state_dict": {}})
    assert store.newest(tmp_path) == tmp_path / "weights.ckpt"
    store.save(tmp_path / "whole.ckpt", run_of(10))
    assert store.newest(tmp_path) == tmp_path / "whole.ckpt"


def test_no_directory_and_an_empty_one_have_no_newest(tmp_path: Path) -> None:
    assert store.newest(tmp_path) is None
    assert store.newest(tmp_path / "nowhere") is None


def flipped(content: bytes) -> bytes:
    start = content.index(torch.arange(4000.0).numpy().tobytes()[:64])
    return content[: start + 100] + bytes([content[start + 100] ^ 1]) + content[start + 101 :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[: len(content) // 2], "is cut off"),
        (lambda content: b"", "is empty"),
        (flipped, r"is damaged: the record data/0 \(state_dict/w\) was changed"),
    ],
    ids=["cut off", "empty", "one bit"],
)
def test_a_damaged_file_is_skipped_with_the_reason_and_never_removed(
    damage: Callable[[bytes], bytes], reason: str, tmp_path: Path
) -> None:
    store.save(tmp_path / "old.ckpt", run_of(1))
    store.save(tmp_path / "new.ckpt", run_of(2))
    content = damage((tmp_path / "new.ckpt").read_bytes())
    (tmp_path / "new.ckpt").write_bytes(content)
    with pytest.warns(UserWarning, match=rf"skipped a checkpoint: .*new\.ckpt {reason}.*old\.ckpt is used"):
        assert store.newest(tmp_path) == tmp_path / "old.ckpt"
    assert (tmp_path / "new.ckpt").read_bytes() == content


def test_checkpoints_of_which_none_loads_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"")
    store.save(tmp_path / "b.ckpt", {"w": torch.zeros(1)})
    torch.save({"global_step": 3}, tmp_path / "c.ckpt")
    with pytest.raises(CheckpointError, match=r"none|no checkpoint") as caught:
        store.newest(tmp_path)
    assert "a.ckpt is empty" in str(caught.value)
    assert "b.ckpt is not a checkpoint of a run: it has no global_step" in str(caught.value)
    assert "c.ckpt is not a checkpoint of trainkit: it has no record trainkit.json." in str(caught.value)
    assert f"trainkit convert {tmp_path}/c.ckpt NEW.ckpt" in str(caught.value)


# ---- the directory
def test_preparing_proves_that_the_directory_can_be_written(
    tmp_path: Path, faults: Callable[[int, int], Faults]
) -> None:
    store.prepare(tmp_path / "runs" / "1")
    assert names(tmp_path / "runs" / "1") == []
    faults(2, errno.ENOSPC)
    with pytest.raises(CheckpointError, match=r"nothing can be written to the directory .*runs/1: the disk is full"):
        store.prepare(tmp_path / "runs" / "1")
    assert names(tmp_path / "runs" / "1") == []


def test_leftovers_of_dead_writers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    machine = f"{store.TEMPORARY}{store._machine()}"
    leftovers = [f"{machine}-{int(dead.stdout)}-00000000", f"{machine}-{os.getpid()}-00000001"]
    others = [
        f"{machine}-{os.getppid()}-00000002",  # a writer that lives
        f"{store.TEMPORARY}00000000-{int(dead.stdout)}-00000003",  # a writer on another machine
        f"{store.TEMPORARY}notes",
        ".hidden",
        "x.ckpt",
    ]
    for name in leftovers + others:
        (tmp_path / name).write_text("x")
    store.prepare(tmp_path)
    assert names(tmp_path) == sorted(others)


def test_a_file_being_written_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = format.write

    def sweep_meanwhile(file: Any, state: dict[str, Any]) -> None:
        write(file, state)
        assert store.sweep(tmp_path) == []

    monkeypatch.setattr(format, "write", sweep_meanwhile)
    store.save("x.ckpt", STATE)
    assert names(tmp_path) == ["x.ckpt"]


def test_the_machine_is_told_by_its_name() -> None:
    assert len(store._machine()) == 8
    assert socket.gethostname() not in store._machine()


# ---- killed
KILLING = r"""
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from trainkit.checkpoint import store

torch.set_num_threads(1)
directory, trials, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(2)
state = {"optimizer_states": [], "epoch": 0, "state_dict": {"w": torch.rand(300_000)}}


def save_for_ever(step, acknowledge):
    while True:
        store.save(directory / f"{step % 3}.ckpt", {**state, "global_step": step})
        store.link_or_copy(directory / f"{step % 3}.ckpt", directory / "last.ckpt")
        os.write(acknowledge, b"%d\n" % step)
        step += 1


warnings.simplefilter("error")  # a file that is skipped would be a warning
step = left_behind = 0
for trial in range(trials):
    store.prepare(directory)
    assert not [name for name in os.listdir(directory) if name.startswith(".")]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(step, writing)
    os.close(writing)
    time.sleep(draw.uniform(0.001, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = max(map(int, os.fdopen(reading).read().split()), default=-1)
    left_behind += any(name.startswith(".") for name in os.listdir(directory))
    for path in directory.glob("*.ckpt"):
        store.load(path)
    newest = store.newest(directory)
    found = store.step_of(newest) if newest else -1
    assert found >= acknowledged, (found, acknowledged)
    step = found + 1
print(f"steps {step} left behind {left_behind}")
"""


def killed_while_saving(directory: Path, trials: int, checkout: Path) -> tuple[int, int]:
    """Kill a process that saves without end, over and over; return the saves and how often a hidden file was left."""
    command = [sys.executable, "-c", KILLING, str(directory), str(trials)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert run.returncode == 0, run.stderr
    words = run.stdout.split()
    return int(words[1]), int(words[4])


def test_a_process_killed_while_saving_never_leaves_a_file_that_does_not_load(tmp_path: Path, checkout: Path) -> None:
    saves, left_behind = killed_while_saving(tmp_path / "checkpoints", 25, checkout)
    assert saves > 0  # how many depends on the machine
    assert left_behind > 0  # else no kill hit a save


@pytest.mark.slow
def test_a_process_killed_in_hundreds_of_saves_never_leaves_a_file_that_does_not_load(
    tmp_path: Path, checkout: Path
) -> None:
    saves, left_behind = killed_while_saving(tmp_path / "checkpoints", 500, checkout)
    assert saves > 100
    assert left_behind > 100
