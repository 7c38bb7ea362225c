"""What a run makes of its saves: in the background, when they fail, without finite weights, and beside another run."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.checkpoint import disk, format, store
from trainkit.checkpoint.io import CheckpointIO
from trainkit.errors import CheckpointError, CheckpointExistsError
from trainkit.loggers import Logger


class Line(Module):
    """Train a line, and log the number of the step."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.line = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("at", float(self.global_step))
        return self.line(batch).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class At(Callback):
    """Do something after the n-th update."""

    def __init__(self, act: dict[int, Callable[[Trainer], None]]) -> None:
        self.act = act

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.act:
            self.act[trainer.global_step](trainer)


def make_trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(callbacks=list(callbacks), **{**quiet, "max_steps": 6, **settings})


def fit(*callbacks: Callback, module: Module | None = None, ckpt_path: Any = None, **settings: Any) -> Trainer:
    trainer = make_trainer(*callbacks, **settings)
    data = DataLoader(torch.linspace(-1, 1, 12).reshape(6, 2))  # type: ignore[arg-type]
    trainer.fit(module or Line(), data, ckpt_path=ckpt_path)
    return trainer


def told_by(*callbacks: Callback, **settings: Any) -> list[str]:
    """Fit, and return what was warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(*callbacks, **settings)
    return [str(one.message) for one in told]


def steps(directory: str | Path = "checkpoints") -> dict[str, int]:
    return {name: store.step_of(Path(directory, name)) for name in sorted(os.listdir(directory))}


def weights(path: str | Path) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in store.load(path)["state_dict"].values()])


def every_step(directory: str = "checkpoints", **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(directory, "{step}", every_n_train_steps=1, **settings)


# ---- what is kept
def test_the_newest_and_every_nth_are_kept_beside_the_best() -> None:
    checkpoint = ModelCheckpoint(
        "checkpoints", "{step}", monitor="at", every_n_train_steps=1, keep_last=2, keep_every_n_steps=4
    )
    fit(checkpoint, max_steps=12, max_epochs=2)
    assert steps() == {"step=1.ckpt": 1, "step=11.ckpt": 11, "step=12.ckpt": 12, "step=4.ckpt": 4, "step=8.ckpt": 8}
    assert list(map(os.path.basename, checkpoint.best_k_models)) == ["step=1.ckpt"]
    assert checkpoint.best_model_path.endswith("step=1.ckpt")
    assert checkpoint.kth_best_model_path.endswith("step=1.ckpt")


def test_what_is_kept_is_known_again_when_the_run_is_resumed() -> None:
    settings = {"keep_last": 2, "keep_every_n_steps": 3, "monitor": "at", "mode": "max"}
    fit(every_step(**settings), max_steps=4)
    assert list(steps()) == ["step=3.ckpt", "step=4.ckpt"]
    fit(every_step(**settings), max_steps=6, ckpt_path="last")
    assert list(steps()) == ["step=3.ckpt", "step=5.ckpt", "step=6.ckpt"]


def test_a_file_that_somebody_removed_does_not_keep_a_new_one_out() -> None:
    checkpoint = every_step(monitor="at")  # the first is the best
    fit(At({3: lambda trainer: os.unlink("checkpoints/step=1.ckpt")}), checkpoint)
    assert list(steps()) == ["step=3.ckpt"]
    assert list(map(os.path.basename, checkpoint.best_k_models)) == ["step=3.ckpt"]


def test_what_the_process_did_not_live_to_remove_goes_when_its_run_is_resumed() -> None:
    fit(every_step(save_last=True), max_steps=2)
    shutil.copytree("checkpoints", "earlier")
    fit(every_step(save_last=True), max_steps=3, ckpt_path="last")
    shutil.copy("earlier/step=2.ckpt", "checkpoints")  # as if step 3 was written and step 2 not removed
    fit(every_step(save_last=True), max_steps=3, ckpt_path="last")  # which has nothing left to do
    fit(every_step(save_last=True), max_steps=4, ckpt_path="last")
    assert steps() == {"last.ckpt": 4, "step=4.ckpt": 4}


# ---- names
def test_save_checkpoint_can_refuse_a_name_that_is_taken() -> None:
    trainer = fit(every_step())
    trainer.save_checkpoint("x.ckpt", overwrite=False)
    with pytest.raises(CheckpointExistsError, match="there is one of that name already"):
        trainer.save_checkpoint("x.ckpt", overwrite=False)
    trainer.save_checkpoint("x.ckpt")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_name_that_another_run_takes_at_the_last_moment_is_left_to_it(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    publish = disk.publish

    def too_late(path: Any, write: Any, replace: bool = True) -> None:
        if os.path.basename(path) == "step=2.ckpt" and not taken:
            taken.append(str(path))
            Path(path).write_text("another run's")
        publish(path, write, replace)

    monkeypatch.setattr(disk, "publish", too_late)
    checkpoint = every_step(save_top_k=-1, asynchronous=asynchronous)
    fit(checkpoint, max_steps=3)
    assert Path("checkpoints/step=2.ckpt").read_text() == "another run's"
    names = set(os.listdir("checkpoints"))
    assert names == {"step=1.ckpt", "step=2.ckpt", "step=3.ckpt"} | (set() if asynchronous else {"step=2-v1.ckpt"})
    for name in names - {"step=2.ckpt"}:
        state = store.load(Path("checkpoints", name))["callbacks"][checkpoint.state_key]
        assert not any(os.path.basename(path) == "step=2.ckpt" for path, *_ in state["kept"])
    assert checkpoint.failed_saves == 0


# ---- saves that fail
def failing(code: int, *numbers: int) -> Callable[..., Any]:
    """Return an `os.fsync` that fails for these saves, counted from 1, and count them."""
    real, saves = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if disk.TEMPORARY in name:
            saves[0] += 1
            if saves[0] in numbers:
                raise OSError(code, os.strerror(code))
        real(descriptor)

    return fsync


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "your disk quota is used up"),
        (errno.EROFS, "is on a read-only file system"),
        (errno.EACCES, "no permission"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_training_goes_on_when_a_save_fails_and_the_next_one_tries_again(
    code: int, reason: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = every_step(monitor="at", mode="max", save_last=True, asynchronous=asynchronous)
    monkeypatch.setattr(os, "fsync", failing(code, 3, 4, 5))  # 1 is the proof that the directory can be written
    with pytest.warns(UserWarning, match=r"ModelCheckpoint") as told:
        fit(checkpoint)
    texts = [str(one.message) for one in told]
    assert [f"nothing was saved at step {step}" in text for step, text in zip((2, 3, 4), texts, strict=False)] == [
        True
    ] * 3
    assert all(reason in text for text in texts[:3])
    assert all("The newest checkpoint is" in text and "step=1.ckpt" in text for text in texts[:3])
    assert "3 saves of this run failed" in texts[3]
    assert checkpoint.failed_saves == 3
    assert steps() == {"last.ckpt": 6, "step=6.ckpt": 6}
    assert checkpoint.best_model_score == 5.0


def test_what_failed_is_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = every_step(monitor="at", mode="max", save_last=True)
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC, *range(3, 99)))
    assert all("nothing was saved" in text for text in told_by(checkpoint)[:5])
    assert steps() == {"last.ckpt": 1, "step=1.ckpt": 1}
    assert checkpoint.best_model_path.endswith("step=1.ckpt")
    assert list(map(os.path.basename, checkpoint.best_k_models)) == ["step=1.ckpt"]
    assert (checkpoint.current_score, checkpoint.best_model_score) == (0.0, 0.0)
    assert checkpoint.failed_saves == 5


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_can_be_told_to_stop_at_the_first_save_that_fails(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC, 3))
    trainer = make_trainer(every_step(on_save_error="stop", asynchronous=asynchronous))
    with pytest.raises(CheckpointError, match=r"step=2\.ckpt was not written: the disk is full"):
        trainer.fit(Line(), DataLoader(torch.ones(6, 2)))  # type: ignore[arg-type]
    assert trainer.global_step <= 2 + asynchronous
    assert steps() == {"step=1.ckpt": 1}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_can_not_be_saved_is_a_mistake_and_ends_the_run(asynchronous: bool) -> None:
    class Broken(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"object": object()}

    with pytest.raises(TypeError, match="Broken/object is an object"):
        fit(Broken(), every_step(asynchronous=asynchronous))
    assert os.listdir("checkpoints") == []


def test_a_directory_that_vanishes_is_made_again() -> None:
    checkpoint = every_step(save_last=True)
    fit(At({3: lambda trainer: shutil.rmtree("checkpoints")}), checkpoint)
    assert steps() == {"last.ckpt": 6, "step=6.ckpt": 6}
    assert checkpoint.failed_saves == 0


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("[enforce fail] PytorchStreamWriter failed")])
def test_a_store_that_errors_is_a_save_that_fails(error: Exception) -> None:
    class Flaky(CheckpointIO):
        saves = 0

        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            self.saves += 1
            if self.saves == 2:
                raise error
            super().save_checkpoint(checkpoint, path)

    checkpoint = every_step()
    told = told_by(checkpoint, plugins=[Flaky()])
    assert "nothing was saved at step 2" in told[0]
    assert len(told) == 2
    assert list(steps()) == ["step=6.ckpt"]


def test_a_signal_says_that_nothing_was_saved_when_that_is_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC, 3))
    checkpoint = ModelCheckpoint("checkpoints", "{step}", every_n_train_steps=2)
    terminate = At({3: lambda trainer: os.kill(os.getpid(), signal.SIGTERM)})
    with (
        pytest.warns(UserWarning, match=r"nothing was saved at step 3 .*A resumed run goes on from an earlier step"),
        pytest.raises(SystemExit) as ended,
    ):
        fit(terminate, checkpoint)
    assert ended.value.code == 143
    assert steps() == {"step=2.ckpt": 2}


def test_a_file_that_can_not_be_removed_is_a_warning_and_goes_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = os.unlink, []

    def unlink(path: Any, **options: Any) -> None:
        if str(path).endswith("step=1.ckpt") and len(failures) < 2:
            failures.append(path)
            raise PermissionError(errno.EACCES, "no")
        real(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.warns(UserWarning, match=r"step=1\.ckpt could not be removed"):
        fit(every_step())
    assert len(failures) == 2
    assert list(steps()) == ["step=6.ckpt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("can't mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_full_for_a_while_costs_saves_and_nothing_else(small_disk: Path, asynchronous: bool) -> None:
    class Big(Line):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Parameter(torch.zeros(40_000))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.more.sum() ** 2

    fills = {
        2: lambda trainer: (small_disk / "fill").write_bytes(bytes((1 << 20) + (400 << 10))),
        4: lambda trainer: os.unlink(small_disk / "fill"),
    }
    directory = small_disk / "checkpoints"
    checkpoint = every_step(str(directory), save_last=True, asynchronous=asynchronous)
    told = told_by(At(fills), checkpoint, module=Big(), max_steps=8, max_epochs=2)  # type: ignore[arg-type]
    assert "the disk is full" in told[0]
    assert checkpoint.failed_saves == len(told) - 1
    assert steps(directory) == {"last.ckpt": 8, "step=8.ckpt": 8}
    whole = every_step("whole")
    fit(whole, module=Big(), max_steps=8, max_epochs=2)
    assert torch.equal(weights(directory / "step=8.ckpt"), weights("whole/step=8.ckpt"))


def test_a_disk_without_room_for_another_name_keeps_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def link(source: Any, target: Any, **options: Any) -> None:
        if "step=3" in str(source):
            raise OSError(errno.ENOSPC, "full")
        real(source, target, **options)

    monkeypatch.setattr(os, "link", link)
    checkpoint = every_step(save_last=True)
    assert "last.ckpt was not saved at step 3" in told_by(checkpoint, max_steps=3)[0]
    assert steps() == {"last.ckpt": 2, "step=3.ckpt": 3}
    monkeypatch.setattr(os, "link", real)
    fit(every_step(save_last=True), max_steps=4, ckpt_path="last")
    assert steps() == {"last.ckpt": 4, "step=4.ckpt": 4}


# ---- weights that are not numbers
def spoil(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.module.line.weight[0, 0] = float("nan")


def heal(trainer: Trainer) -> None:
    trainer.optimizers[0].state.clear()
    with torch.no_grad():
        for parameter in trainer.module.parameters():
            parameter.fill_(0.5)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {"step=2.ckpt": 2, "step=6.ckpt": 6}),
        ({"save_last": True}, {"last.ckpt": 2, "step=2.ckpt": 2, "step=6.ckpt": 6}),
        ({"save_last": "link"}, {"last.ckpt": 2, "step=2.ckpt": 2, "step=6.ckpt": 6}),
        ({"save_top_k": 0, "save_last": True}, {"last.ckpt": 2}),
        ({"monitor": "at", "mode": "max"}, {"step=2.ckpt": 2}),
        ({"monitor": "at", "mode": "max", "save_top_k": 2}, {"step=1.ckpt": 1, "step=2.ckpt": 2}),
        ({"monitor": "at", "mode": "max", "save_last": True}, {"last.ckpt": 2, "step=2.ckpt": 2}),
        ({"keep_last": 2}, {"step=2.ckpt": 2, "step=5.ckpt": 5, "step=6.ckpt": 6}),
    ],
    ids=str,
)
def test_weights_that_are_not_finite_never_replace_the_last_that_are(
    settings: dict[str, Any], kept: dict[str, int], asynchronous: bool
) -> None:
    checkpoint = every_step(**settings, asynchronous=asynchronous)
    (told,) = told_by(At({3: spoil}), checkpoint)
    assert "after step 3 the weights are not finite (line.weight). The last checkpoint whose" in told
    assert steps() == kept
    if checkpoint.best_model_path:
        assert checkpoint.best_model_path.endswith("step=2.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert store.step_of(store.newest("checkpoints") or "") == 2


@pytest.mark.parametrize(
    "settings", [{}, {"save_last": True}, {"monitor": "at", "mode": "max"}, {"keep_last": 1}], ids=str
)
def test_when_the_weights_are_finite_again_all_is_as_before(settings: dict[str, Any]) -> None:
    checkpoint = every_step(**settings)
    with pytest.warns(UserWarning, match="not finite"):
        fit(At({3: spoil, 5: heal}), checkpoint)
    assert steps() == {"step=6.ckpt": 6} | ({"last.ckpt": 6} if "save_last" in settings else {})


def test_where_no_weights_were_ever_finite_the_newest_is_kept() -> None:
    with pytest.warns(UserWarning, match="after step 1 the weights are not finite"):
        fit(At({1: spoil}), every_step(save_last=True))
    assert steps() == {"last.ckpt": 6, "step=6.ckpt": 6}


def test_a_buffer_that_is_made_infinite_as_a_mask_is_no_fault() -> None:
    class Masked(Line):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    fit(every_step(save_last=True), module=Masked())
    assert steps() == {"last.ckpt": 6, "step=6.ckpt": 6}


def test_a_signal_in_the_middle_of_it_leaves_the_last_that_is_finite_and_says_so() -> None:
    act = {3: spoil, 4: lambda trainer: os.kill(os.getpid(), signal.SIGTERM)}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            fit(At(act), every_step(save_last=True))  # type: ignore[arg-type]
    assert ["last.ckpt stays as it is" in str(one.message) for one in told] == [True, True]
    assert steps()["last.ckpt"] == 2


# ---- in the background
class Watching(Logger):
    """Write down when it hears of a save, and what is there then."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, list[str]]] = []

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.heard.append((checkpoint_callback._files.kept[-1].step, sorted(os.listdir("checkpoints"))))


def test_a_run_that_writes_in_the_background_ends_with_the_same_files() -> None:
    for asynchronous in (False, True):
        directory = f"run{asynchronous}"
        checkpoint = every_step(
            directory, monitor="at", mode="max", save_top_k=2, save_last=True, asynchronous=asynchronous
        )
        fit(checkpoint)
    assert steps("runTrue") == steps("runFalse") == {"last.ckpt": 6, "step=5.ckpt": 5, "step=6.ckpt": 6}
    for name in ("step=5.ckpt", "step=6.ckpt"):
        assert torch.equal(weights(f"runTrue/{name}"), weights(f"runFalse/{name}"))
    state = store.load("runTrue/step=6.ckpt")["callbacks"][checkpoint.state_key]
    assert state["best_model_path"] == checkpoint.best_model_path
    assert state["last_model_path"] == checkpoint.last_model_path
    assert not any(name.startswith(".") for name in os.listdir("."))


def test_others_hear_of_it_when_it_is_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, at = Watching(), []
    publish = disk.publish

    def slow(path: Any, write: Any, replace: bool = True) -> None:
        torch.manual_seed(0)
        at.append(len(logger.heard))
        publish(path, write, replace)

    monkeypatch.setattr(disk, "publish", slow)
    fit(every_step(asynchronous=True), logger=logger, log_every_n_steps=1)
    assert [step for step, _ in logger.heard] == [1, 2, 3, 4, 5, 6]
    assert all(names == [f"step={step}.ckpt"] for step, names in logger.heard)  # and the one before is removed
    assert at == [0, 1, 2, 3, 4, 5]  # one at a time


def test_training_does_not_wait_and_the_file_holds_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    write, begun, go_on = format.write, threading.Event(), threading.Event()
    seen: list[int] = []

    def held(file: Any, state: dict[str, Any]) -> None:
        begun.set()
        assert go_on.wait(60)
        write(file, state)

    def release(trainer: Trainer) -> None:
        assert begun.wait(60)
        seen.append(trainer.global_step)
        go_on.set()

    monkeypatch.setattr(format, "write", held)
    checkpoint = ModelCheckpoint("there", "{step}", every_n_train_steps=3, save_top_k=-1, asynchronous=True)
    fit(At({5: release}), checkpoint)
    assert seen == [5]  # two updates further than what is being written
    monkeypatch.setattr(format, "write", write)
    fit(every_step("checkpoints", save_top_k=-1))
    assert torch.equal(weights("there/step=3.ckpt"), weights("checkpoints/step=3.ckpt"))


def test_saving_by_hand_waits_for_what_is_being_written() -> None:
    order: list[str] = []

    class Slow(CheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            super().save_checkpoint(checkpoint, path)
            order.append(os.path.basename(path))

    def by_hand(trainer: Trainer) -> None:
        trainer.save_checkpoint("mine.ckpt")
        assert order[-2:] == ["step=3.ckpt", "mine.ckpt"]

    fit(At({4: by_hand}), every_step(asynchronous=True), plugins=[Slow()])
    assert store.step_of("mine.ckpt") == 4
    state = next(iter(store.load("mine.ckpt")["callbacks"].values()))
    assert state["best_model_path"].endswith("step=3.ckpt")


def test_the_memory_of_the_copy_is_used_again() -> None:
    places: list[list[int]] = []

    class Looking(CheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            places.append([tensor.data_ptr() for tensor in checkpoint["state_dict"].values()])
            super().save_checkpoint(checkpoint, path)

    fit(every_step(asynchronous=True), plugins=[Looking()])
    assert len(places) == 6
    assert places[1:] == places[:-1]


def test_a_signal_and_an_exception_wait_for_it() -> None:
    with pytest.raises(SystemExit):
        fit(At({3: lambda trainer: os.kill(os.getpid(), signal.SIGTERM)}), every_step(asynchronous=True))
    assert steps() == {"last.ckpt": 3, "step=3.ckpt": 3}

    def fail(trainer: Trainer) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fit(At({3: fail}), every_step("other", asynchronous=True))
    assert steps("other") == {"step=2.ckpt": 2}


def test_workers_forked_meanwhile_do_no_harm() -> None:
    data = DataLoader(torch.linspace(-1, 1, 12).reshape(6, 2), num_workers=2)  # type: ignore[arg-type]
    trainer = make_trainer(every_step(save_last=True, asynchronous=True), max_epochs=4, max_steps=-1)
    trainer.fit(Line(), data)
    assert steps() == {"last.ckpt": 24, "step=24.ckpt": 24}


def test_two_callbacks_in_the_background_take_turns() -> None:
    one = ModelCheckpoint("checkpoints", monitor="at", every_n_train_steps=1, save_last=True, asynchronous=True)
    other = ModelCheckpoint("checkpoints", monitor="at", mode="max", every_n_train_steps=1, asynchronous=True)
    fit(one, other)
    assert steps() == {"epoch=0-step=1.ckpt": 1, "epoch=0-step=6.ckpt": 6, "last.ckpt": 6}


# ---- two runs in one directory
OTHER = """
import sys, warnings
import torch
from torch.utils.data import DataLoader
from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelCheckpoint

class Line(Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.line(batch).pow(2).mean()
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

class Pause(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            print("two", flush=True)
        elif trainer.global_step == 4:
            sys.stdin.readline()

checkpoint = ModelCheckpoint("checkpoints", "{step}", every_n_train_steps=1, save_last=True)
trainer = Trainer(accelerator="cpu", max_steps=6, callbacks=[checkpoint, Pause()], logger=False,
                  enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Line(), DataLoader(torch.ones(6, 2)))
"""


@pytest.mark.parametrize("resume", [None, "last"])
def test_two_runs_in_one_directory_leave_each_other_alone(resume: str | None, checkout: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "two\n"
        while not os.path.exists("checkpoints/step=3.ckpt"):
            pass
        leftover = Path("checkpoints", f"{disk.TEMPORARY}{disk.machine()}-999999999-00000000")
        leftover.touch()
        with pytest.warns(UserWarning, match=rf"checkpoints is in use by another run, process {other.pid} on "):
            fit(every_step(save_last=True), max_steps=5, ckpt_path=resume)
        assert leftover.exists()  # its owner tidies up
        assert steps_of_names() >= {"step=3.ckpt", "step=5.ckpt", "last.ckpt", "last-v1.ckpt"}
        assert store.step_of("checkpoints/last.ckpt") == 3
        assert store.step_of("checkpoints/last-v1.ckpt") == 5
    finally:
        other.communicate("\n")
    assert other.returncode == 0
    assert store.step_of("checkpoints/step=5.ckpt") == 5
    assert store.step_of("checkpoints/last.ckpt") == 6
    fit(every_step(), max_steps=7, max_epochs=2, ckpt_path="last")
    assert not leftover.exists()
    assert not any(name.endswith(".lock") for name in os.listdir("."))


def steps_of_names() -> set[str]:
    return {name for name in os.listdir("checkpoints") if name.endswith(".ckpt")}
