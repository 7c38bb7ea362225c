"""A checkpoint file is whole under its name, or it is not there: whatever fails, and whenever the process dies."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.checkpoint import disk, format, store
from trainkit.errors import CheckpointError, CheckpointExistsError

STATE = {"global_step": 3, "epoch": 0, "optimizer_states": [], "state_dict": {"w": torch.arange(4000.0)}}


def run_of(step: int, **more: Any) -> dict[str, Any]:
    return {**STATE, "global_step": step, **more}


def hidden(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


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

    def interrupt(*_: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.save(tmp_path / "x.ckpt", run_of(2))
    assert names(tmp_path) == ["x.ckpt"]
    assert store.step_of(tmp_path / "x.ckpt") == 1


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_where_there_are_no_hard_links_the_file_is_copied(code: int, tmp_path: Path, faulty: Any) -> None:
    store.save(tmp_path / "1.ckpt", run_of(1))
    faulty.start(1, code)
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


# ---- the directory
def test_preparing_proves_that_the_directory_can_be_written(tmp_path: Path, faulty: Any) -> None:
    store.prepare(tmp_path / "runs" / "1")
    assert names(tmp_path / "runs" / "1") == []
    faulty.start(2, errno.ENOSPC)
    with pytest.raises(CheckpointError, match=r"nothing can be written to the directory .*runs/1: the disk is full"):
        store.prepare(tmp_path / "runs" / "1")
    assert names(tmp_path / "runs" / "1") == []


def test_leftovers_of_dead_writers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    machine = f"{disk.TEMPORARY}{disk.machine()}"
    leftovers = [f"{machine}-{int(dead.stdout)}-00000000", f"{machine}-{os.getpid()}-00000001"]
    others = [
        f"{machine}-{os.getppid()}-00000002",  # a writer that lives
        f"{disk.TEMPORARY}00000000-{int(dead.stdout)}-00000003",  # a writer on another machine
        f"{disk.TEMPORARY}notes",
        ".hidden",
        "x.ckpt",
    ]
    for name in leftovers + others:
        (tmp_path / name).write_text("x")
    disk.sweep(tmp_path)
    assert names(tmp_path) == sorted(others)


def test_a_file_being_written_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = format.write

    def sweep_meanwhile(file: Any, state: dict[str, Any]) -> None:
        write(file, state)
        assert disk.sweep(tmp_path) == []

    monkeypatch.setattr(format, "write", sweep_meanwhile)
    store.save("x.ckpt", STATE)
    assert names(tmp_path) == ["x.ckpt"]


def test_the_machine_is_told_by_its_name() -> None:
    assert len(disk.machine()) == 8
    assert socket.gethostname() not in disk.machine()


# ---- killed
KILLING = r"""
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from trainkit.checkpoint import disk, store

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
    disk.make_directory(directory)
    disk.sweep(directory)
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


# ---- names
def test_a_name_that_is_taken_is_not_taken_away_unless_that_is_meant(tmp_path: Path) -> None:
    store.save(tmp_path / "x.ckpt", run_of(1), replace=False)
    with pytest.raises(CheckpointExistsError, match=r"x\.ckpt was not written: there is one of that name already"):
        store.save(tmp_path / "x.ckpt", run_of(2), replace=False)
    with pytest.raises(FileExistsError):
        store.link_or_copy(tmp_path / "x.ckpt", tmp_path / "x.ckpt", replace=False)
    assert store.step_of(tmp_path / "x.ckpt") == 1
    store.save(tmp_path / "x.ckpt", run_of(2))
    assert store.step_of(tmp_path / "x.ckpt") == 2
    assert names(tmp_path) == ["x.ckpt"]


def test_of_many_that_want_one_name_at_once_one_gets_it(tmp_path: Path) -> None:
    def save(step: int) -> bool:
        try:
            store.save(tmp_path / "x.ckpt", run_of(step), replace=False)
        except CheckpointExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(save, range(40)))
    assert sum(got) == 1
    assert store.step_of(tmp_path / "x.ckpt") == got.index(True)
    assert names(tmp_path) == ["x.ckpt"]


@pytest.mark.parametrize("mask", [0, 0o077, 0o027])
def test_only_the_owner_can_read_whatever_the_umask_is(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        store.save(tmp_path / "new" / "x.ckpt", STATE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o700
    assert stat.S_IMODE(os.stat(tmp_path / "new" / "x.ckpt").st_mode) == 0o600


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_system_hears_it_in_this_order(tmp_path: Path, checkout: Path) -> None:
    code = (
        "import torch; from trainkit.checkpoint import store; "
        + "store.save('run/x.ckpt', {'w': torch.ones(9)}, False)"
    )
    calls = "openat,write,fsync,close,rename,renameat,renameat2,link,unlink,mkdir"
    run = subprocess.run(
        ["strace", "-f", "-y", "-o", "calls", "-e", f"trace={calls}", sys.executable, "-c", code],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(checkout)}, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = [line.split(None, 1)[1] for line in Path("calls").read_text().splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("mkdir(") and "/run" in line)
    ours = [line for line in lines[start:] if '"run' in line or f"{tmp_path}/run" in line or f"{tmp_path}>)" in line]
    lines = [line for line in ours if not line.startswith("openat") or "run" in line.split('"')[1]]
    names = [line.split("(")[0] for line in lines]
    names = [name for number, name in enumerate(names) if name != "write" or names[number - 1] != "write"]
    assert names == [
        "mkdir", "fsync", "close",  # the directory
        "openat", "write", "fsync", "close", "renameat2",  # the file
        "unlink",  # of a name that is gone
        "openat", "fsync", "close",
    ]  # fmt: skip
    assert all(flag in lines[3] for flag in ("O_EXCL", "O_NOFOLLOW", "O_CLOEXEC", "0600", ".trainkit-"))
    assert "RENAME_NOREPLACE" in lines[names.index("renameat2") - len(names)]
