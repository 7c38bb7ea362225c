"""Worker processes: how many fit a machine, what they hear, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainkit.data.loader import Loader
from trainkit.data.workers import suggested_max_num_workers


@pytest.mark.parametrize(("cores", "processes", "workers"), [(8, 1, 7), (8, 2, 3), (8, 8, 1), (8, 20, 1), (1, 1, 1)])
def test_one_core_is_left_to_each_process(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert suggested_max_num_workers(processes) == workers


def test_a_system_that_does_not_say_counts_as_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert suggested_max_num_workers(1) == 1


def test_no_process_is_an_error() -> None:
    with pytest.raises(ValueError, match="local_world_size must be at least 1"):
        suggested_max_num_workers(0)


# ---------------------------------------------------------------- signals, and the end of the main process
class Ends(Dataset[Any]):
    """Ends its process at one sample."""

    def __init__(self, how: Any) -> None:
        self.how = how

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        if index == 23:
            self.how()
        return index


def batches(data: Any, **settings: Any) -> list[Any]:
    settings = {"num_workers": 2, "collate_fn": list, **settings}
    loader = Loader(DataLoader(data, 4, **settings), name="data", argument="limit", seed=1)
    return [batch for _, batch, _ in loader.epoch(3)]


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ended() -> None:
    os._exit(7)


@pytest.mark.parametrize(("how", "said"), [(killed, "was killed .signal 9: most often the"), (ended, "exit code 7")])
@pytest.mark.parametrize("persistent", [True, False])
def test_a_worker_that_dies_is_told_of_with_what_it_was_loading(how: Any, said: str, persistent: bool) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"^data: a worker process.*{said}.*while loading batch .*5") as caught:
        batches(Ends(how), persistent_workers=persistent)
    assert "of epoch 3: samples with the indices" in str(caught.value)
    assert "[20, 21, 22, 23]" in str(caught.value)
    assert time.monotonic() - began < 8


def ended_well() -> None:
    os._exit(0)


def test_a_worker_that_a_library_ends_without_an_error_is_told_of_too() -> None:
    with pytest.raises(RuntimeError, match=r"^data: a worker process ended with exit code 0 while loading batch .*5"):
        batches(Ends(ended_well))


def test_the_death_of_a_worker_is_heard_of_by_whoever_waits_for_a_batch_and_nobody_else() -> None:
    source: Any = DataLoader(Ends(killed), 4, num_workers=1, prefetch_factor=5, collate_fn=list)
    before = set(multiprocessing.active_children())
    opened = Loader(source, name="data", argument="limit", seed=1).epoch(0)
    next(opened)
    (worker,) = set(multiprocessing.active_children()) - before
    worker.join(timeout=10)
    for _ in range(1000):  # torch's handler would raise here
        pass
    with pytest.raises(RuntimeError, match="a worker process was killed"):
        list(opened)


class Signalled(Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        for number in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
            os.kill(os.getpid(), getattr(signal, number))
        return index


class SignalledStream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return (Signalled()[index] for index in range(12))


@pytest.mark.parametrize("data", [Signalled(), SignalledStream()], ids=lambda data: type(data).__name__)
def test_a_worker_leaves_signals_to_the_main_process(data: Any) -> None:
    assert batches(data, num_workers=1) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


class Stuck(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index > 3:
            time.sleep(60)
        return index


def test_a_worker_that_is_stuck_is_ended_though_it_leaves_signals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.3)
    loader = Loader(DataLoader(Stuck(), 2, num_workers=1), name="data", argument="limit", seed=1)
    before = set(multiprocessing.active_children())
    opened = loader.epoch(0)
    next(opened)
    (worker,) = set(multiprocessing.active_children()) - before
    began = time.monotonic()
    del opened
    loader.close()
    assert time.monotonic() - began < 5
    assert not worker.is_alive()


class Hears(Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_loader_that_is_used_outside_of_a_run_is_untouched() -> None:
    source: Any = DataLoader(Hears(), 2, num_workers=1, collate_fn=list)
    assert batches(Hears(), num_workers=1) == [[True, True]]
    loader = Loader(source, name="data", argument="limit", seed=1)
    assert list(source) == [[False, False]]
    assert [batch for _, batch, _ in loader.epoch(0)] == [[True, True]]
    assert (source.worker_init_fn, type(source.dataset), source.collate_fn) == (None, Hears, list)


RUN = """
import multiprocessing, sys, torch
from torch.utils.data import DataLoader
from trainkit import Module, Trainer

class Line(Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        return self.line(batch).sum()
    def validation_step(self, batch, batch_idx): ...
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

data = [torch.zeros(1)] * 100_000
settings = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
kept = DataLoader(data[:4], num_workers=1, persistent_workers=True)
Trainer(max_epochs=1, accelerator="cpu", **settings).fit(Line(), DataLoader(data, num_workers=2), kept)
"""


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("ending", ["SIGKILL", "SIGTERM"])
def test_workers_end_with_the_main_process_which_a_signal_to_all_reaches_alone(ending: str) -> None:
    run = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stdout is not None
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 3
    assert all(map(is_running, workers))
    if ending == "SIGKILL":
        run.kill()
    else:
        os.killpg(run.pid, signal.SIGTERM)
    run.wait(timeout=30)
    run.stdout.close()
    until = time.monotonic() + 2  # a tenth of a second where nothing else is running
    while any(map(is_running, workers)) and time.monotonic() < until:
        time.sleep(0.005)
    assert not any(map(is_running, workers))
    assert run.returncode == (-signal.SIGKILL if ending == "SIGKILL" else 143)
