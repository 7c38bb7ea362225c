"""A run that stands still says who waits for whom; one that does not is left alone."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from trainkit import Callback, Trainer
from trainkit.errors import MissingRankError

PREAMBLE = """
import os, signal, sys, threading, time
from datetime import timedelta
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from trainkit import Callback, Module, Trainer
from trainkit.strategies import DDPStrategy

torch.set_num_threads(1)
RANK = int(os.environ["RANK"])


class Net(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.01)
        return self.net(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(Dataset):
    def __init__(self, stops_at=None):
        self.stops_at = stops_at

    def __len__(self):
        return 300

    def __getitem__(self, index):
        if RANK == 1 and index == self.stops_at:
            time.sleep(3)
        return torch.ones(8)


def trainer(**settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(**{**quiet, "accelerator": "cpu", "logger": False, "max_epochs": 1, "watchdog": 1.0, **settings})


def loader(batch=1, **settings):
    return DataLoader(Data(settings.pop("stops_at", None)), batch, **settings)
"""


def told_by(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("watchdog: ")]


def test_rank_0_says_which_rank_is_where_and_who_waits_for_it(processes: Callable[..., Any]) -> None:
    body = """
class Hang(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 60 and trainer.global_rank == 2:
            time.sleep(3)


trainer().fit(Net(), loader(stops_at=199))
print("--", file=sys.stderr, flush=True)
trainer(callbacks=[Hang()]).fit(Net(), loader())
print("--", file=sys.stderr, flush=True)
trainer().fit(Net(), loader(stops_at=199, num_workers=1))
print([thread.name for thread in threading.enumerate() if "watchdog" in thread.name])
"""
    ranks = processes(3, PREAMBLE + body)
    in_data, in_callback, in_worker = ranks[0].err.split("--\n")
    found = told_by(in_data)
    assert re.match(
        r"watchdog: rank 1 is in Data\.__getitem__ \(processes-0\.py:\d+\), the others wait in all_reduce \(backward\) "
        r"since 1 s\.$",
        found[0],
    ), in_data
    assert found[-1].startswith("watchdog: the run goes on after ")
    assert 2 <= len(found) <= 3  # at doubling distances
    assert "Stacks: logs/rank*.log" in in_data
    assert "rank 2 is in Hang.on_train_batch_end (processes-0.py:" in told_by(in_callback)[0]
    assert re.search(
        r"rank 1 waits for its data loader's worker 0 \(pid \d+\), which is in __getitem__ \(processes-0.py:\d+\), "
        r"the others wait in all_reduce",
        told_by(in_worker)[0],
    )
    for rank in ranks:
        assert rank.out.splitlines()[-1] == "[]"  # no thread is left
        log = Path(f"logs/rank{rank.rank}.log").read_text()
        assert f"rank {rank.rank}, at train, epoch 0, batch " in log
        assert "Thread MainThread (most recent call last):" in log
    log = Path("logs/rank1.log").read_text()
    assert "time.sleep(3)" in log
    assert "Worker 0 of the data loader (pid " in log
    assert "watchdog: " not in ranks[1].err + ranks[2].err


@pytest.mark.slow
def test_what_is_no_step_may_take_longer(processes: Callable[..., Any]) -> None:
    body = """
class Slow(Callback):
    def wait(self, trainer):
        if trainer.is_global_zero:
            time.sleep(1.7)

    def on_train_start(self, trainer, pl_module):
        self.wait(trainer)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.wait(trainer)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.wait(trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self.wait(trainer)


trainer(callbacks=[Slow()], enable_checkpointing=True, limit_train_batches=60).fit(Net(), loader(), loader(50))
"""
    ranks = processes(2, PREAMBLE + body)
    assert [told_by(rank.err) for rank in ranks] == [[], []]
    assert not Path("logs/rank0.log").exists()


def test_a_rank_that_stands_still_is_named_by_the_error_that_ends_the_run(processes: Callable[..., Any]) -> None:
    body = """
class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 80 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)


strategy = DDPStrategy(step_timeout=timedelta(seconds=3))
began = time.monotonic()
try:
    trainer(strategy=strategy, callbacks=[Stop()]).fit(Net(), loader())
except Exception as error:
    print(type(error).__name__, error.ranks, error)
    print(time.monotonic() - began < 30)
    sys.exit(1)
"""
    ranks = processes(3, PREAMBLE + body, check=False)
    for rank in ranks:
        assert rank.code == 1
        kind, message = rank.out.split(" ", 1)
        assert kind == "MissingRankError"
        assert message.startswith("[1] the processes waited too long for each other, and rank 1")
        assert re.search(r"rank 1 has not been heard of since \d s, the others wait in all_reduce", message)
        assert re.search(r"train, epoch 0, batch 81, step 81", message)
        assert "step_timeout" in message
        assert message.splitlines()[-1] == "True"
    assert "rank 1 has not been heard of since" in told_by(ranks[0].err)[0]


# ---------------------------------------------------------------- one process
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "max_epochs": 1,
}  # fmt: skip


class Pause(Callback):
    """Stand still once, after so many batches."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.threads: set[str] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(0.02)
        if batch_idx == 40:
            self.threads |= {thread.name for thread in threading.enumerate()}
            time.sleep(self.seconds)


def watched(threads: set[str]) -> bool:
    return "trainkit-watchdog" in threads


@pytest.mark.parametrize("setting", [0.3, timedelta(seconds=0.3)])
def test_one_process_is_watched_if_asked(
    setting: Any, TinyModule: Any, TinyData: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    pause = Pause(1.0)
    Trainer(**QUIET, callbacks=[pause], watchdog=setting).fit(TinyModule(), TinyData(num_batches=60))
    found = told_by(capfd.readouterr().err)
    assert "rank 0 is in Pause.on_train_batch_end (tests/test_watchdog.py" in found[0].replace("trainkit/", "")
    assert "the run goes on after 1 s" in found[-1]
    assert "time.sleep(self.seconds)" in Path("logs/rank0.log").read_text()
    assert watched(pause.threads)
    assert not watched({thread.name for thread in threading.enumerate()})


@pytest.mark.parametrize("setting", [None, False])
def test_one_process_is_not_watched_unless_asked(setting: Any, TinyModule: Any, TinyData: Any) -> None:
    pause = Pause()
    Trainer(**QUIET, callbacks=[pause], watchdog=setting).fit(TinyModule(), TinyData(num_batches=50))
    assert pause.threads
    assert not watched(pause.threads)


def test_the_loop_makes_no_call_for_who_watches_it(TinyModule: Any, TinyData: Any) -> None:
    def calls(steps: int, watchdog: bool) -> int:
        made = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal made
            made += event == "call" and "trainkit" in frame.f_code.co_filename

        data = [torch.ones(4, 3)] * steps
        module = TinyModule()
        module.training_step = lambda batch, batch_idx: module(batch).mean()
        trainer = Trainer(**QUIET, watchdog=watchdog, log_every_n_steps=0)
        sys.setprofile(count)
        try:
            trainer.fit(module, DataLoader(data, None))  # type: ignore[arg-type]
        finally:
            sys.setprofile(None)
        return made

    with_it, without = (calls(250, on) - calls(50, on) for on in (True, False))
    assert abs(with_it - without) < 50  # 200 steps more; some calls depend on the clock


def test_an_evaluation_that_takes_its_time_is_left_alone(
    TinyModule: Any, TinyData: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    class Slow(TinyModule):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time.sleep(0.4)

    Trainer(**QUIET, watchdog=0.1).validate(Slow(), TinyData(num_batches=3), verbose=False)
    assert not told_by(capfd.readouterr().err)


def test_the_error_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(MissingRankError("rank 1 was missing", [1])))
    assert (str(error), error.ranks) == ("rank 1 was missing", [1])
