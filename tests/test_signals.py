"""Ctrl-C and SIGTERM: noted during fit, honoured where everything can be saved, given back afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from trainkit import Callback, Module, Trainer
from trainkit.signals import NOTED, Interrupted, Interruption

BARE = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[Any]]:
    """Give the handlers as they are before a test, and put them back."""
    before = [signal.getsignal(number) for number in NOTED]
    yield before
    for number, handler in zip(NOTED, before, strict=True):
        signal.signal(number, handler)


def current() -> list[Any]:
    return [signal.getsignal(number) for number in NOTED]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


# ---------------------------------------------------------------- noting
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_left_to_the_loop(
    capfd: pytest.CaptureFixture[str], handlers: list[Any], number: int, code: int
) -> None:
    interruption = Interruption()
    with interruption.listening():
        assert interruption.signal is None
        interruption.leave()  # nothing to leave for
        send(number)
        assert interruption.signal == number
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"{name}: finishing this step and saving; once more stops at once" in capfd.readouterr().err
    assert current() == handlers
    with pytest.raises(SystemExit) as left:
        interruption.leave()
    assert left.value.code == code
    assert isinstance(left.value, KeyboardInterrupt) is (number == signal.SIGINT)
    assert issubclass(Interrupted, KeyboardInterrupt)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("first", NOTED)
def test_the_second_signal_acts_at_once(
    capfd: pytest.CaptureFixture[str], handlers: list[Any], first: int, number: int, error: type[BaseException]
) -> None:
    def two_signals() -> None:
        with Interruption().listening():
            send(first)
            send(number)

    with pytest.raises(error):
        two_signals()
    assert current() == handlers
    assert capfd.readouterr().err.count("finishing this step") == 1


def test_a_run_after_an_interrupted_one_begins_without_a_signal(capfd: pytest.CaptureFixture[str]) -> None:
    interruption = Interruption()
    with interruption.listening():
        send(signal.SIGTERM)
    with interruption.listening():
        assert interruption.signal is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_handlers_come_back_after_errors(handlers: list[Any], error: type[BaseException]) -> None:
    def fails() -> None:
        with Interruption().listening():
            assert current() != handlers
            raise error

    with pytest.raises(error):
        fails()
    assert current() == handlers


def test_handlers_of_the_users_own_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    def mine(number: int, frame: Any) -> None:
        heard.append(number)

    heard: list[int] = []
    signal.signal(signal.SIGTERM, mine)
    with Interruption().listening():
        send(signal.SIGTERM)
    assert heard == []
    assert signal.getsignal(signal.SIGTERM) is mine
    send(signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_what_the_process_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interruption = Interruption()
    with interruption.listening():
        send(signal.SIGINT)
        assert interruption.signal is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_outside_of_the_main_thread_training_works_and_leaves_signals_alone(handlers: list[Any]) -> None:
    class Looks(Callback):
        def on_train_start(self, trainer: Trainer, module: Module) -> None:
            seen.append(current() == handlers)

    seen: list[bool] = []
    trainer = Trainer(**BARE, max_epochs=1, callbacks=Looks())  # type: ignore[arg-type]
    thread = threading.Thread(target=trainer.fit, args=(Line(), loader()))
    thread.start()
    thread.join()
    assert seen == [True]
    assert trainer.global_step == 4


# ---------------------------------------------------------------- in a run
class Line(Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.line(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[Any]:
    return DataLoader(torch.ones(16, 3), 4)  # type: ignore[arg-type]


class Sends(Callback):
    """Send a signal from a hook, once, and note what comes after."""

    def __init__(self, hook: str, number: int = signal.SIGTERM, step: int = 0) -> None:
        self.heard: list[str] = []
        for name in ("on_train_batch_end", "on_save_point", "on_train_epoch_end", "on_train_end", "teardown"):
            setattr(self, name, self._note(name))
        self._sent = False
        noted = getattr(self, hook)

        def sends(trainer: Trainer, *arguments: Any) -> None:
            noted(trainer, *arguments)
            if not self._sent and trainer.global_step >= step:
                self._sent = True
                self.heard.append("signal")
                send(number)

        setattr(self, hook, sends)

    def _note(self, name: str) -> Any:
        return lambda *_: self.heard.append(name)

    def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
        self.heard.append(f"{type(exception).__name__} {trainer.interrupted}")


def test_the_step_is_finished_and_saved_before_the_run_is_left(capfd: pytest.CaptureFixture[str]) -> None:
    sends = Sends("on_before_backward", step=1)
    trainer = Trainer(**BARE, max_epochs=2, callbacks=sends)  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        trainer.fit(Line(), loader())
    assert sends.heard == [
        "on_train_batch_end", "on_save_point", "signal", "on_train_batch_end", "on_save_point", "SIGTERMException True",
        "teardown",
    ]  # fmt: skip
    assert trainer.global_step == 2
    assert trainer.interrupted


def test_an_accumulation_window_is_finished_first(capfd: pytest.CaptureFixture[str]) -> None:
    sends = Sends("on_before_backward")
    trainer = Trainer(**BARE, max_epochs=2, callbacks=sends, accumulate_grad_batches=3)  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        trainer.fit(Line(), loader())
    assert (trainer.global_step, trainer.progress.batch) == (1, 3)
    assert sends.heard[-3:] == ["on_save_point", "SIGTERMException True", "teardown"]


@pytest.mark.parametrize(
    "hook", ["on_sanity_check_start", "on_train_start", "on_train_epoch_end", "on_validation_start", "on_train_end"]
)
def test_a_signal_at_any_moment_of_training_ends_the_run_as_interrupted(
    capfd: pytest.CaptureFixture[str], handlers: list[Any], hook: str
) -> None:
    sends = Sends(hook, signal.SIGINT)
    trainer = Trainer(**BARE, max_epochs=1, callbacks=sends)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Line(), loader(), loader())
    assert sends.heard[-2:] == ["Interrupted True", "teardown"]
    assert current() == handlers


# ---------------------------------------------------------------- in a process of its own
SCRIPT = """
import sys
import time
import torch
from torch.utils.data import DataLoader
from trainkit import Module, Trainer
class Line(Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 1)
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            print("at work", flush=True)
            time.sleep(float(sys.argv[1]))
        return self.line(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
data = DataLoader(torch.ones(4000, 3), 4, num_workers=int(sys.argv[2]))
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = Trainer(accelerator="cpu", max_epochs=1, **quiet)
try:
    trainer.fit(Line(), data)
finally:
    print("steps", trainer.global_step, flush=True)
"""


@pytest.mark.parametrize(
    ("numbers", "seconds", "workers", "code", "steps"),
    [
        ([signal.SIGINT], 0.2, 1, 130, 3),  # Ctrl-C reaches every process in the foreground, the worker too
        ([signal.SIGINT, signal.SIGINT], 60, 0, -signal.SIGINT, 2),
        ([signal.SIGINT, signal.SIGTERM], 60, 0, 143, 2),
    ],
)
def test_a_process_ends_as_its_signals_say(
    tmp_path: Path, checkout: Path, numbers: list[int], seconds: float, workers: int, code: int, steps: int
) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, "train.py", str(seconds), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.readline() == "at work\n"
        os.killpg(process.pid, numbers[0])
        told = ""
        while "finishing this step" not in told:
            line = process.stderr.readline()
            assert line, told
            told += line
        for number in numbers[1:]:
            os.killpg(process.pid, number)
        out, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert out == f"steps {steps}\n"
    if len(numbers) == 1:
        assert errors == ""  # nobody else, a worker for example, had anything to say
