"""Checkpoints by path: what is saved comes back, and the newest is the one with the most training that loads."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.checkpoint import store
from trainkit.errors import CheckpointError

STATE = {"global_step": 3, "epoch": 0, "optimizer_states": [], "state_dict": {"w": torch.arange(4000.0)}}


def run_of(step: int, **more: Any) -> dict[str, Any]:
    return {**STATE, "global_step": step, **more}


def hidden(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_the_newest_is_the_one_beside_which_nothing_whole_has_more_training(tmp_path: Path) -> None:
    store.save(tmp_path / "a.ckpt", run_of(3))
    assert store.is_newest(tmp_path / "a.ckpt", 3)
    store.save(tmp_path / "weights.ckpt", {key: STATE[key] for key in ("epoch", "state_dict")} | {"global_step": 9})
    store.save(tmp_path / "nan.ckpt", run_of(8, state_dict={"w": torch.tensor([math.nan])}))
    store.save(tmp_path / "b.ckpt", run_of(7))
    content = (tmp_path / "b.ckpt").read_bytes()
    (tmp_path / "b.ckpt").write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    assert store.is_newest(tmp_path / "a.ckpt", 3)  # neither weights alone, nor nan, nor a damaged file
    store.save(tmp_path / "c.ckpt", run_of(4))
    assert not store.is_newest(tmp_path / "a.ckpt", 3)
    assert not store.is_newest(tmp_path / "nothing" / "a.ckpt", 3)


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


def test_weights_that_are_not_finite_are_the_newest_only_if_there_is_nothing_better(tmp_path: Path) -> None:
    nan = {"w": torch.tensor([1.0, float("nan")])}
    store.save(tmp_path / "3.ckpt", run_of(3, state_dict=nan))
    assert store.newest(tmp_path) == tmp_path / "3.ckpt"
    store.save(tmp_path / "2.ckpt", run_of(2))
    store.save(tmp_path / "4.ckpt", run_of(4, state_dict=nan))
    with pytest.warns(UserWarning, match=r"the weights in .*[34]\.ckpt are not finite\. .*2\.ckpt is used") as told:
        assert store.newest(tmp_path) == tmp_path / "2.ckpt"
    assert len(told) == 2


def test_a_pipe_or_a_device_under_a_checkpoints_name_is_refused_at_once(tmp_path: Path) -> None:
    store.save(tmp_path / "good.ckpt", {"epoch": 0, "global_step": 1, "optimizer_states": [], "state_dict": {}})
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "zero.ckpt").symlink_to("/dev/zero")
    for name in ("pipe.ckpt", "zero.ckpt"):
        with pytest.raises(CheckpointError, match="a pipe or a device, not a file"):
            store.load(tmp_path / name)
    with pytest.warns(UserWarning, match="a pipe or a device, not a file"):
        assert store.newest(tmp_path) == tmp_path / "good.ckpt"
    assert (tmp_path / "pipe.ckpt").is_fifo()


def test_a_progress_that_is_none_is_no_reason_to_look_no_further(tmp_path: Path) -> None:
    state = {"epoch": 0, "global_step": 1, "optimizer_states": [], "state_dict": {}}
    store.save(tmp_path / "a.ckpt", {**state, "progress": "x"})
    store.save(tmp_path / "b.ckpt", {**state, "global_step": 2})
    assert store.newest(tmp_path) == tmp_path / "b.ckpt"
