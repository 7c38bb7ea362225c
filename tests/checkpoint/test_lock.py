"""Who owns a directory of checkpoints."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainkit.checkpoint.lock import Ownership

HOLD = """
import os, sys, time
from trainkit.checkpoint.lock import Ownership
claim = Ownership(sys.argv[1])
if len(sys.argv) > 2:
    worker = os.fork()  # which outlives its parent
    if worker == 0:
        os.close(1)
        time.sleep(60)
    print("worker", worker, flush=True)
else:
    print(claim.owner or "owner", flush=True)
time.sleep(60)
"""


@pytest.fixture
def directory(tmp_path: Path) -> str:
    (tmp_path / "checkpoints").mkdir()
    return str(tmp_path / "checkpoints")


def hold(directory: str, checkout: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, directory, *more], stdout=subprocess.PIPE, text=True, env=environment
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_lock_lies_beside_the_directory_and_goes_with_its_owner(directory: str) -> None:
    claim = Ownership(directory)
    assert claim.owner == ""
    assert os.listdir(directory) == []
    assert sorted(os.listdir(os.path.dirname(directory))) == [".checkpoints.lock", "checkpoints"]
    claim.release()
    claim.release()
    assert os.listdir(os.path.dirname(directory)) == ["checkpoints"]


def test_another_process_hears_who_has_it_until_that_one_is_killed(directory: str, checkout: Path) -> None:
    owner = hold(directory, checkout)
    try:
        assert first_line(owner) == "owner"
        claim = Ownership(directory)
        assert claim.owner == f"process {owner.pid} on {os.uname().nodename}"
        claim.release()  # which has nothing to give back
        assert Ownership(directory).owner
    finally:
        owner.kill()
        owner.communicate()
    again = Ownership(directory)
    assert again.owner == ""
    again.release()


def test_a_worker_that_outlives_its_parent_does_not_keep_the_lock(directory: str, checkout: Path) -> None:
    owner = hold(directory, checkout, "and fork")
    worker = 0
    try:
        worker = int(first_line(owner).split()[1])
        assert Ownership(directory).owner
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        os.kill(worker, 0)
        claim = Ownership(directory)
        assert claim.owner == ""
        claim.release()
    finally:
        if worker:
            os.kill(worker, signal.SIGKILL)
        owner.kill()
        owner.communicate()


def test_claims_of_one_process_share_it_and_a_copy_has_none(directory: str, checkout: Path) -> None:
    one, other = Ownership(directory), Ownership(directory)
    assert (one.owner, other.owner) == ("", "")
    copy.deepcopy(one).release()
    one.release()
    stranger = hold(directory, checkout)
    try:
        assert first_line(stranger) == f"process {os.getpid()} on {os.uname().nodename}"
    finally:
        stranger.kill()
        stranger.communicate()
    other.release()
    assert os.listdir(os.path.dirname(directory)) == ["checkpoints"]


def test_a_forked_process_does_not_take_its_parents_lock_for_its_own(directory: str) -> None:
    claim = Ownership(directory)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            claim.release()  # nothing of the parent's
            os.write(writing, Ownership(directory).owner.encode() or b"owner")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    assert os.read(reading, 200).decode() == f"process {os.getpid()} on {os.uname().nodename}"
    assert os.path.exists(os.path.join(os.path.dirname(directory), ".checkpoints.lock"))
    claim.release()
    os.close(reading)


def test_a_directory_that_is_removed_meanwhile_is_still_owned(directory: str, checkout: Path) -> None:
    claim = Ownership(directory)
    os.rmdir(directory)
    os.mkdir(directory)
    stranger = hold(directory, checkout)
    try:
        assert first_line(stranger).startswith(f"process {os.getpid()} ")
    finally:
        stranger.kill()
        stranger.communicate()
    claim.release()


def test_of_many_processes_that_come_and_go_one_at_a_time_owns_it(directory: str) -> None:
    reading, writing = os.pipe()
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            end = time.monotonic() + 0.4
            while time.monotonic() < end:
                claim = Ownership(directory)
                if not claim.owner:
                    os.write(writing, b"(")
                    os.write(writing, b")")
                    claim.release()
            os._exit(0)
        children.append(child)
    os.close(writing)
    text = b""
    while part := os.read(reading, 65536):
        text += part
    for child in children:
        os.waitpid(child, 0)
    os.close(reading)
    assert text == b"()" * (len(text) // 2)
    assert len(text) > 20
