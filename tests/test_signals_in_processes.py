"""Real processes and real signals: every state of a run, groups with workers, SLURM, and how the process ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.cli import main


class Slow(Dataset[Any]):
    """Samples that may take long to load."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(self.seconds)
        return torch.rand(3) + index / 40


class Line(Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.line = torch.nn.Linear(3, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.line(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Tells(Callback):
    """Tell the test that a hook is reached, and stay there for a while."""

    def __init__(self, hook: str, seconds: float = 0.3, count: int = 1) -> None:
        def tells(*_: Any) -> None:
            nonlocal count
            count -= 1
            if count == 0:
                print("here", flush=True)
                time.sleep(seconds)

        setattr(self, hook, tells)


class Child:
    """A process of its own group that runs a function, without the time that importing torch takes."""

    def __init__(self, function: Callable[[], Any], folder: Path) -> None:
        self.out, self.errors = folder / "out", folder / "errors"
        self.pid = os.fork()
        if self.pid == 0:
            code: Any = 1
            try:
                os.setsid()
                for number, path in ((1, self.out), (2, self.errors)):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                code = function() or 0
            except SystemExit as left:
                code = left.code
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError):
                        stream.flush()
                os._exit(code)

    def wait_for(self, text: str, path: Path) -> None:
        deadline = time.monotonic() + 20
        while not path.exists() or text not in path.read_text():
            assert time.monotonic() < deadline, f"no {text!r}: {self.errors.read_text()}"
            time.sleep(0.005)

    def end(self) -> int:
        """Wait for the end and return the exit code, negative for a signal's number."""
        deadline = time.monotonic() + 20
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.005)


def ended_by(
    tmp_path: Path, function: Callable[[], Any], number: int, group: bool = False, twice: bool = False
) -> tuple[int, str, float]:
    """Run a function in a process, signal it where it tells; return exit code, what it said, seconds it still took."""
    child = Child(function, tmp_path)
    child.wait_for("here", child.out)
    (os.killpg if group else os.kill)(child.pid, number)
    began = time.monotonic()
    if twice:
        child.wait_for("finishing this step", child.errors)
        os.kill(child.pid, number)
    code = child.end()
    return code, child.errors.read_text(), time.monotonic() - began


def trainer_of(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": root, "callbacks": list(callbacks), **settings,
        }
    )  # fmt: skip


def fit(root: Path, *callbacks: Callback, workers: int = 0, resume: bool = False, **settings: Any) -> Trainer:
    torch.manual_seed(4)
    data = DataLoader(Slow(settings.pop("seconds", 0.0)), 4, shuffle=True, num_workers=workers)
    trainer = trainer_of(root, *callbacks, **settings)
    trainer.fit(Line(), data, DataLoader(Slow(), 4), ckpt_path="last" if resume else None)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What a run ends with that nobody ends."""
    return result(fit(tmp_path_factory.mktemp("whole")))


def result(trainer: Trainer) -> list[Any]:
    state = trainer.optimizers[0].state_dict()["state"]
    moments = [[moment.tolist() for moment in of.values()] for of in state.values()]
    return [trainer.module.line.weight.tolist(), moments, trainer.progress.state_dict()]


# ---------------------------------------------------------------- training
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138, signal.SIGUSR2: 140}


@pytest.mark.parametrize("number", CODES)
def test_a_process_saves_says_how_to_go_on_and_ends_with_its_code(
    tmp_path: Path, whole: list[Any], number: int
) -> None:
    code, said, _ = ended_by(tmp_path, lambda: fit(tmp_path, Tells("on_before_optimizer_step", count=5)), number)
    assert code == CODES[number]
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert f"interrupted after step 5, checkpoint saved: {os.path.relpath(last)}\n" in said
    assert f'resume: trainer.fit(model, ckpt_path="{os.path.relpath(last)}")\n' in said
    assert " s after " in said.splitlines()[-1]
    assert "Traceback" not in said
    assert result(fit(tmp_path, resume=True)) == whole


def test_a_terminal_that_is_gone_does_not_keep_the_run_from_ending_well(tmp_path: Path, whole: list[Any]) -> None:
    def run() -> None:
        full = os.open("/dev/full", os.O_WRONLY)  # every write fails
        os.dup2(full, 2)
        fit(tmp_path, Tells("on_before_optimizer_step", count=5))

    code, _, _ = ended_by(tmp_path, run, signal.SIGHUP)
    assert code == 129
    assert result(fit(tmp_path, resume=True)) == whole


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start", "on_save_point"])
def test_a_signal_to_the_whole_group_reaches_workers_that_leave_it_alone(
    tmp_path: Path, whole: list[Any], hook: str
) -> None:
    tells = Tells(hook, count=6)
    code, said, _ = ended_by(tmp_path, lambda: fit(tmp_path, tells, workers=2), signal.SIGINT, group=True)
    assert code == 130
    assert "Traceback" not in said
    assert result(fit(tmp_path, workers=2, resume=True)) == whole


def test_a_long_validation_does_not_use_the_notice_up(tmp_path: Path, whole: list[Any]) -> None:
    class Dawdles(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            time.sleep(0.5)

    tells = Tells("on_validation_batch_start", 0.1, count=2)
    code, said, seconds = ended_by(tmp_path, lambda: fit(tmp_path, tells, Dawdles(), num_sanity_val_steps=0), 15)
    assert (code, seconds < 2.5) == (143, True), said
    assert result(fit(tmp_path, resume=True)) == whole


def test_a_second_signal_ends_a_step_that_takes_too_long_and_what_was_saved_stays(
    tmp_path: Path, whole: list[Any]
) -> None:
    def run() -> None:
        saves = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1)
        fit(tmp_path, Tells("on_before_optimizer_step", 60, count=8), saves)

    code, said, seconds = ended_by(tmp_path, run, signal.SIGTERM, twice=True)
    assert (code, seconds < 5) == (143, True)
    assert "newest checkpoint: " in said
    saves = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1)
    assert result(fit(tmp_path, saves, resume=True)) == whole


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_validation_batch_start"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_training_there_is_nothing_to_finish(tmp_path: Path, hook: str, number: int) -> None:
    code, said, seconds = ended_by(tmp_path, lambda: fit(tmp_path, Tells(hook, 60)), number)
    assert (code, seconds < 5, said) == (CODES[number], True, "")


def test_a_signal_while_the_run_is_closed_ends_the_process_after_it(tmp_path: Path, whole: list[Any]) -> None:
    closed = tmp_path / "closed"

    class Closes(Callback):
        def teardown(self, *_: Any) -> None:
            print("here", flush=True)
            time.sleep(0.2)
            closed.touch()

    code, _, _ = ended_by(tmp_path, lambda: fit(tmp_path, Closes()), signal.SIGTERM)
    assert code == 143
    assert closed.exists()


# ---------------------------------------------------------------- evaluations
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_an_evaluation_ends_at_once(tmp_path: Path, stage: str, number: int) -> None:
    name = {"validate": "validation"}.get(stage, stage)

    def run() -> None:
        trainer = trainer_of(tmp_path, Tells(f"on_{name}_batch_start", 60, count=2))
        getattr(trainer, stage)(Line(), DataLoader(Slow(), 4))

    code, said, seconds = ended_by(tmp_path, run, number)
    assert (code, seconds < 5) == (CODES[number], True), said
    assert "Traceback" not in said


# ---------------------------------------------------------------- SLURM
@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend to be a job, with a scontrol that writes down what it is called with."""
    heard = tmp_path / "scontrol-heard"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {heard}\nif [ -e {tmp_path}/refuse ]; then echo no >&2; exit 3; fi\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    return heard


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_job_that_is_told_of_its_end_is_queued_again_and_goes_on(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, whole: list[Any], number: int
) -> None:
    code, said, _ = ended_by(tmp_path, lambda: fit(tmp_path, Tells("on_train_batch_end", count=3)), number)
    assert code == 0
    assert slurm.read_text() == "requeue 77\n"
    assert said.endswith("SLURM job 77 is queued again\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    trainer = fit(tmp_path)  # the same command: nobody says ckpt_path="last"
    assert str(trainer.ckpt_path).endswith("last.ckpt")
    assert result(trainer) == whole


def test_the_task_of_an_array_is_queued_again_alone(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    ended_by(tmp_path, lambda: fit(tmp_path, Tells("on_train_batch_end")), signal.SIGUSR1)
    assert slurm.read_text() == "requeue 70_4\n"
    assert "last.ckpt" in json.loads((tmp_path / "slurm-70_4.json").read_text())["checkpoint"]


def test_a_job_that_scontrol_refuses_says_so_and_fails(tmp_path: Path, slurm: Path) -> None:
    (tmp_path / "refuse").touch()
    code, said, _ = ended_by(tmp_path, lambda: fit(tmp_path, Tells("on_train_batch_end")), signal.SIGUSR1)
    assert code == 138
    assert "SLURM job 77 could not be queued again: scontrol ended with 3: no\n" in said


def test_a_job_without_scontrol_says_so_and_fails(tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said, _ = ended_by(tmp_path, lambda: fit(tmp_path, Tells("on_train_batch_end")), signal.SIGUSR1)
    assert code == 138
    assert "SLURM job 77 could not be queued again: " in said


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "train"), (signal.SIGUSR1, "bash"), (signal.SIGUSR1, "interactive")]
)
def test_a_cancelled_job_and_an_interactive_one_are_not_queued_again(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", name)
    code, _, _ = ended_by(tmp_path, lambda: fit(tmp_path, Tells("on_train_batch_end")), number)
    assert code == CODES[number]
    assert not slurm.exists()


def test_a_job_without_a_checkpoint_callback_is_saved_before_it_is_queued_again(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, whole: list[Any]
) -> None:
    def run() -> None:
        fit(tmp_path, Tells("on_train_batch_end", count=3), enable_checkpointing=False)

    assert ended_by(tmp_path, run, signal.SIGUSR1)[0] == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    trainer = fit(tmp_path, enable_checkpointing=False)
    assert str(trainer.ckpt_path).endswith("slurm-77.ckpt")
    assert result(trainer) == whole


def test_another_job_does_not_go_on_from_this_ones_checkpoint(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, whole: list[Any]
) -> None:
    ended_by(tmp_path, lambda: fit(tmp_path, Tells("on_train_batch_end", count=3)), signal.SIGUSR1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    trainer = fit(tmp_path)
    assert trainer.ckpt_path is None


# ---------------------------------------------------------------- the command line
def test_the_command_line_ends_with_the_code_and_prints_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    words = [
        "fit", "--model=test_signals_in_processes.ForTheCommandLine", "--trainer.logger=false",
        "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.max_epochs=2",
    ]  # fmt: skip
    code, said, _ = ended_by(tmp_path, lambda: main(words), signal.SIGTERM)
    assert code == 143
    assert "resume: trainkit fit --model=" in said
    assert said.count("interrupted after step 3") == 1
    assert "--ckpt_path checkpoints/last.ckpt\n" in said


class ForTheCommandLine(Line):
    """A model that brings its data and tells where it is."""

    def train_dataloader(self) -> Any:
        return DataLoader(Slow(), 4)

    def configure_callbacks(self) -> Any:
        return Tells("on_train_batch_end", count=3)
