"""Every single operation of a save fails once, with every error a disk has; and every power loss is played through."""

from __future__ import annotations

import errno
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainkit import Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.checkpoint import store
from trainkit.errors import CheckpointError

ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES]
STATE = {"epoch": 0, "optimizer_states": [], "state_dict": {"w": torch.arange(4000.0)}}


def run_of(step: int) -> dict[str, Any]:
    return {**STATE, "global_step": step}


def hidden(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


def new(directory: Path, step: int) -> None:
    store.save(directory / f"{step}.ckpt", run_of(step), replace=False)


def over(directory: Path, step: int) -> None:
    store.save(directory / "last.ckpt", run_of(step))


def linked(directory: Path, step: int) -> None:
    store.save(directory / f"{step}.ckpt", run_of(step), replace=False)
    store.link_or_copy(directory / f"{step}.ckpt", directory / "last.ckpt")


SAVES = {"a new name": new, "over the last": over, "a new name that is the last, too": linked}
Save = Callable[[Path, int], None]


def synced_twice(calls: Sequence[Any]) -> list[str]:
    files = [call.path for call in calls if call.name == "fsync" and call.path != "checkpoints"]
    return [path for path in files if files.count(path) > 1]


# ---- one operation after the other
@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
def test_whatever_operation_of_a_save_fails_it_is_told_and_there_is_a_good_checkpoint(
    save: Save, code: int, tmp_path: Path, faulty: Any
) -> None:
    directory = tmp_path / "checkpoints"
    save(directory, 1)
    faulty.start()
    save(directory, 2)
    operations, step = len(faulty.calls), 2
    assert operations >= 8
    for number in range(1, operations + 1):
        faulty.start(number, code)
        step += 1
        try:
            save(directory, step)
        except CheckpointError:
            pass
        else:
            # of a hidden file that has its name by now; a file that can't be linked is copied
            assert faulty.failed.name in ("unlink", "link")
        assert not synced_twice(faulty.calls)
        faulty.start()
        assert hidden(directory) == []
        newest = store.newest(directory)
        assert newest is not None
        assert step - 1 <= store.step_of(newest) <= step
        save(directory, step := step + 1)
        assert store.step_of(store.newest(directory) or "") == step


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_a_directory_that_can_not_be_made_is_told_and_made_the_next_time(
    code: int, tmp_path: Path, faulty: Any
) -> None:
    new(tmp_path / "whole" / "b", 1)
    for number in range(1, len(faulty.calls) + 1):
        directory = tmp_path / str(number) / "b"
        faulty.start(number, code)
        try:
            new(directory, 1)
        except CheckpointError:
            faulty.start()
            assert not directory.exists() or os.listdir(directory) == []
            new(directory, 1)
        else:
            assert faulty.failed.name == "unlink"
        assert store.step_of(directory / "1.ckpt") == 1


def test_the_bytes_are_on_the_disk_before_the_name_is_and_the_name_before_the_save_is_acknowledged(
    tmp_path: Path, faulty: Any
) -> None:
    new(tmp_path, 1)
    assert faulty.names() == ["open", "write", "fsync", "close", "rename_new", "unlink", "open", "fsync", "close"]
    temporary = faulty.calls[0].path
    assert temporary.startswith(".trainkit-")
    assert {call.path for call in faulty.calls if call.name in ("write", "rename_new")} == {temporary}
    faulty.start()
    over(tmp_path, 2)
    assert faulty.names() == ["open", "write", "fsync", "close", "replace", "unlink", "open", "fsync", "close"]
    assert [call.path for call in faulty.calls if call.name == "fsync"][-1] == "."


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL], ids=errno.errorcode.get)
@pytest.mark.parametrize("links", [True, False])
def test_where_the_system_can_not_rename_without_replacing_a_name_is_not_taken_away_either(
    code: int, links: bool, tmp_path: Path, faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    new(tmp_path, 0)
    rename_new = [call.name for call in faulty.calls].index("rename_new") + 1
    faulty.start(rename_new, code)
    new(tmp_path, 1)
    assert store.step_of(tmp_path / "1.ckpt") == 1
    faulty.start(rename_new, code)
    with pytest.raises(FileExistsError, match="there is one of that name already"):
        store.save(tmp_path / "1.ckpt", run_of(9), replace=False)
    assert store.step_of(tmp_path / "1.ckpt") == 1
    assert hidden(tmp_path) == []


# ---- the power goes
Ops = list[tuple[str, str, str]]


def recorded(save: Save, directory: Path, faulty: Any) -> Ops:
    """Return what three saves ask of a disk, where each is acknowledged, and the removal of the one before."""
    ops: Ops = []
    for step in (1, 2, 3):
        faulty.start()
        save(directory, step)
        calls = list(faulty.calls)
        calls = [call for call in calls if call.name in ("open", "write", "fsync", "replace", "rename_new", "link")]
        for number, call in enumerate(calls):
            if call.name == "open" and call.path != "checkpoints":
                ops.append(("create", call.path, ""))
            elif call.name != "open":
                followed = number + 1 < len(calls) and calls[number + 1].name == "write"
                if not (call.name == "write" and followed):
                    name = "rename" if call.name in ("replace", "rename_new") else call.name
                    ops.append((name, call.path, call.target))
        ops.append(("acknowledged", str(step), ""))
        if save is not over and step > 1:
            ops.append(("unlink", f"checkpoints/{step - 1}.ckpt", ""))
    return ops


def after_power_loss(ops: Ops, weak: bool) -> Iterator[tuple[int, dict[str, tuple[int, bool]]]]:
    """Yield each state a disk can be in, with the step acknowledged before: by name, a file's step and if it is whole.

    What was not synced of a file may be there or not. Of what was not synced of the directory, the first operations are
    there, or (`weak`) any of them.
    """
    inodes: dict[str, int] = {}
    steps: list[int] = []
    synced: list[bool] = []
    changes: list[tuple[str, str, int]] = []  # of the directory: (gone, new name, file)
    durable, acknowledged, step = 0, 0, 1
    for name, path, target in ops:
        if name == "create":
            inodes[path] = len(steps)
            steps.append(step)
            synced.append(False)
            changes.append(("", path, inodes[path]))
        elif name == "write":
            synced[inodes[path]] = False
        elif name == "fsync" and path == "checkpoints":
            durable = len(changes)
        elif name == "fsync":
            synced[inodes[path]] = True
        elif name == "rename":
            inodes[target] = inodes.pop(path)
            changes.append((path, target, inodes[target]))
        elif name == "link":
            inodes[target] = inodes[path]
            changes.append(("", target, inodes[target]))
        elif name == "unlink":
            changes.append((path, "", inodes.pop(path)))
        elif name == "acknowledged":
            acknowledged, step = int(path), int(path) + 1
        pending = len(changes) - durable
        chosen = (
            itertools.product([False, True], repeat=pending)
            if weak
            else ([number < count for number in range(pending)] for count in range(pending + 1))
        )
        for choice in chosen:
            names: dict[str, int] = {}
            for (gone, there, inode), kept in zip(changes, [True] * durable + list(choice), strict=True):
                if kept:
                    names.pop(gone, None)
                    names |= {there: inode} if there else {}
            open_files = [inode for inode in set(names.values()) if not synced[inode]]
            for whole in itertools.product([False, True], repeat=len(open_files)):
                lost = {inode for inode, is_whole in zip(open_files, whole, strict=True) if not is_whole}
                yield acknowledged, {path: (steps[inode], inode not in lost) for path, inode in names.items()}


def violations(ops: Ops, weak: bool) -> int:
    """Count the states in which the loader's rule finds less than what was acknowledged, or `last` is older."""
    count, last = 0, "checkpoints/last.ckpt"
    has_last = any(last in op for op in ops)
    for acknowledged, names in after_power_loss(ops, weak):
        found = [step for path, (step, whole) in names.items() if path.endswith(".ckpt") and whole]
        behind = has_last and acknowledged and (not names.get(last, (0, False))[1] or names[last][0] < acknowledged)
        count += max(found, default=0) < acknowledged or behind
    return count


@pytest.mark.parametrize("weak", [False, True], ids=["in order", "in any order"])
@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
def test_whenever_the_power_goes_what_was_acknowledged_is_there_and_each_fsync_is_needed(
    save: Save, weak: bool, tmp_path: Path, faulty: Any
) -> None:
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    ops = recorded(save, directory, faulty)
    assert sum(1 for _ in after_power_loss(ops, weak)) > 20
    assert violations(ops, weak) == 0
    syncs = [number for number, (name, _, _) in enumerate(ops) if name == "fsync"]
    assert len(syncs) >= 6
    for number in syncs:
        mutant = ops[:number] + ops[number + 1 :]
        if save is linked and ops[number][1] == "checkpoints" and ops[number + 1][0] != "acknowledged":
            continue  # the directory is synced again for the second name, before anybody hears of either
        assert violations(mutant, weak) > 0, ops[number]


# ---- a run
class Line(Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.line(batch).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(directory: Path, **settings: Any) -> ModelCheckpoint:
    checkpoint = ModelCheckpoint(directory, every_n_train_steps=1, **settings)
    trainer = Trainer(
        accelerator="cpu", max_steps=6, callbacks=[checkpoint], logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(torch.ones(6, 2)))  # type: ignore[arg-type]
    return checkpoint


@pytest.mark.parametrize("settings", [{}, {"save_last": True}, {"save_last": "link"}, {"asynchronous": True}], ids=str)
@pytest.mark.parametrize("offset", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, 23))])
def test_whatever_fails_in_a_run_it_goes_on_and_ends_with_the_files_it_is_to_keep(
    settings: dict[str, Any], offset: int, tmp_path: Path, faulty: Any
) -> None:
    expected = {"epoch=0-step=6.ckpt"} | ({"last.ckpt"} if "save_last" in settings else set())
    fit(tmp_path / "whole", **settings)
    operations = [call.path for call in faulty.calls]
    first = next(number for number, path in enumerate(operations) if path.startswith("whole/.trainkit")) + 4
    for number in range(first + 1 + offset, len(operations), 23):
        directory = tmp_path / str(number)
        faulty.start(number, errno.EIO)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            checkpoint = fit(directory, **settings)
        faulty.start()
        failed = checkpoint.failed_saves
        texts = [str(one.message) for one in told]
        assert sum("saved at step" in text for text in texts) == failed <= 1
        assert not failed or "1 save of this run failed" in texts[-1]
        assert hidden(directory) == []
        newest = store.newest(directory)
        assert newest is not None
        assert store.step_of(newest) >= 5
        if store.step_of(newest) == 6 and not failed:
            assert set(os.listdir(directory)) == expected, number
