"""Ctrl-C and SIGTERM: noted during fit, honoured where everything can be saved, given back afterwards."""

from __future__ import annotations

import faulthandler
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
from trainkit.signals import NOTED, STOPS, Interrupted, Interruption, Preempted, SIGTERMException

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
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGUSR1, 138),
        (signal.SIGUSR2, 140),
    ],
)
def test_the_first_signal_is_noted_and_left_to_the_loop(
    capfd: pytest.CaptureFixture[str], handlers: list[Any], number: int, code: int
) -> None:
    interruption = Interruption()
    with interruption.listening():
        assert interruption.signal is None
        interruption.leave()  # nothing to leave for
        send(number)
        assert interruption.signal == number
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
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


@pytest.fixture
def own_handler() -> tuple[Any, list[int]]:
    """Give a handler of the user's own, and what it heard."""
    heard: list[int] = []

    def mine(number: int, frame: Any) -> None:
        heard.append(number)

    return mine, heard


def test_a_handler_of_the_users_own_for_sigterm_is_called_too_and_comes_back(
    own_handler: tuple[Any, list[int]], capfd: pytest.CaptureFixture[str]
) -> None:
    mine, heard = own_handler
    signal.signal(signal.SIGTERM, mine)
    interruption = Interruption()
    with interruption.listening():
        send(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    assert interruption.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is mine


def test_a_handler_of_the_users_own_may_raise_and_the_next_signal_is_heard() -> None:
    def mine(number: int, frame: Any) -> None:
        raise KeyError("mine")

    signal.signal(signal.SIGTERM, mine)
    with Interruption().listening():
        with pytest.raises(KeyError):
            send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_other_signals_with_a_handler_of_the_users_own_are_left_to_it(
    own_handler: tuple[Any, list[int]], number: int
) -> None:
    mine, heard = own_handler
    signal.signal(number, mine)
    interruption = Interruption()
    with interruption.listening():
        assert signal.getsignal(number) is mine
        send(number)
    assert heard == [number]
    assert interruption.signal is None


def test_faulthandlers_dump_on_a_signal_is_left_to_it(tmp_path: Path) -> None:
    with (tmp_path / "stacks").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks)
        try:
            interruption = Interruption()
            with interruption.listening():
                send(signal.SIGUSR1)
            assert interruption.signal is None
        finally:
            faulthandler.unregister(signal.SIGUSR1)
    assert "most recent call first" in (tmp_path / "stacks").read_text()


def test_a_run_in_a_hook_of_another_run_hears_the_signal_itself(capfd: pytest.CaptureFixture[str]) -> None:
    outer, inner = Interruption(), Interruption()
    with outer.listening():
        with inner.listening():
            send(signal.SIGINT)
        assert (outer.signal, inner.signal) == (None, signal.SIGINT)
        send(signal.SIGINT)
    assert outer.signal == signal.SIGINT


def test_one_request_that_comes_twice_at_once_is_one(capfd: pytest.CaptureFixture[str]) -> None:
    interruption = Interruption()
    with interruption.listening():
        launcher = f"import os, signal; [os.kill({os.getpid()}, signal.SIGTERM) for _ in range(3)]"
        subprocess.run([sys.executable, "-c", launcher])
    assert interruption.signal == signal.SIGTERM


def test_where_there_is_nothing_to_finish_the_first_signal_acts_at_once(handlers: list[Any]) -> None:
    def at_once(number: int) -> None:
        with Interruption().listening(at_once=STOPS):
            send(number)

    with pytest.raises(Interrupted):
        at_once(signal.SIGINT)
    with pytest.raises(SIGTERMException) as left:
        at_once(signal.SIGTERM)
    assert left.value.code == 143
    with pytest.raises(Preempted) as hung_up:
        at_once(signal.SIGHUP)
    assert hung_up.value.code == 129
    assert current() == handlers


def test_how_long_saves_took_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    interruption = Interruption()
    interruption.save_seconds = 1.23
    with interruption.listening():
        send(signal.SIGUSR1)
    assert "SIGUSR1: finishing this step and saving (saves took up to 1.2 s); once more" in capfd.readouterr().err


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


def test_a_process_s_own_signal_after_another_one_s_is_no_second_one(capfd: pytest.CaptureFixture[str]) -> None:
    interruption = Interruption()
    with interruption.listening():
        interruption.hear(signal.SIGTERM)  # all processes of a run get it, one tells the others first
        noted = interruption.noted_at
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
        assert interruption.noted_at == noted > 0.0
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err.count("finishing this step") == 1
