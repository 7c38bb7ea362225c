"""Starting the processes of a run: real ones, how they end, and what comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit import Trainer, launch
from trainkit.errors import MisconfigurationException
from trainkit.lightning.demos import BoringModel
from trainkit.world import World

PROGRAM = """
import os, sys, time, warnings
import torch
from torch.utils.data import DataLoader
from trainkit import Module, Trainer

class Line(Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.line = torch.nn.Linear(3, 1)

    def prepare_data(self):
        print("prepared by", self.trainer.global_rank, flush=True)

    def training_step(self, batch, batch_idx):
        rank = self.trainer.global_rank
        if batch_idx == 1:
            warnings.warn(f"rank {rank} is careful")
            print("here", rank, os.getpid(), flush=True)
        if batch_idx == 2 and rank == 1:
            if "raise" in sys.argv:
                raise ValueError("rank 1 is broken")
            if "leave" in sys.argv:
                os._exit(7)
        if "slow" in sys.argv:
            time.sleep(0.2)
        return self.line(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    trainer = Trainer(devices=2, accelerator="cpu", max_epochs=1000 if "slow" in sys.argv else 1,
                      enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1)
    module = Line()
    trainer.fit(module, DataLoader(torch.ones(24, 3), 4))
    print("fitted", trainer.global_rank, trainer.world_size, trainer.global_step, sys.argv[1:], flush=True)
"""


class Program:
    """A program that runs in a folder of its own, and the processes that it starts."""

    def __init__(self, folder: Path, *words: str, module: bool = False) -> None:
        (folder / "own").mkdir(exist_ok=True)
        (folder / "own" / "__init__.py").touch()
        (folder / "own" / "train.py").write_text(PROGRAM)
        self.out, self.err = folder / "out", folder / "err"
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        checkout = Path(__file__).resolve().parents[1]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), env.get("PYTHONPATH")]))
        program = ["-m", "own.train"] if module else [str(folder / "own" / "train.py")]
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *program, *words], cwd=folder, env=env, stdout=out, stderr=err, start_new_session=True
            )

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        until = time.monotonic() + seconds
        while text not in (said := self.out.read_text()):
            assert time.monotonic() < until, said + self.err.read_text()
            assert self.process.poll() is None, said + self.err.read_text()
            time.sleep(0.05)
        return said

    def pid(self, rank: int) -> int:
        """Return the process of a rank, which has told it."""
        said = self.wait_for(f"here {rank} ")
        return next(int(line.split()[2]) for line in said.splitlines() if line.startswith(f"here {rank} "))

    def workers(self) -> list[int]:
        """Return the processes that it started and that still run."""
        mark, found = f"TRAINKIT_LAUNCHER={self.process.pid}".encode(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def end(self, seconds: float = 60.0) -> int:
        """Return the exit code, when nobody is left."""
        code = self.process.wait(seconds)
        until = time.monotonic() + 15
        while self.workers():
            assert time.monotonic() < until, "it left processes behind"
            time.sleep(0.05)
        return code

    def close(self) -> None:
        for pid in [*self.workers(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start the program; whatever happens, nobody is left behind."""
    started: list[Program] = []

    def begin(*words: str, module: bool = False) -> Program:
        started.append(Program(tmp_path, *words, module=module))
        return started[-1]

    yield begin
    for program in started:
        program.close()


# ---------------------------------------------------------------- the same command again
def test_a_program_is_started_again_as_each_process_and_ends_as_they_end(
    start: Callable[..., Program], tmp_path: Path
) -> None:
    program = start("--value", "$5 $$", module=True)
    assert program.end() == 0, program.err.read_text()
    said, told = program.out.read_text().splitlines(), program.err.read_text()
    assert sorted(line for line in said if line.startswith("fitted")) == [
        f"fitted {rank} 2 3 ['--value', '$5 $$']" for rank in (0, 1)
    ]
    assert [line for line in said if line.startswith("prepared")] == ["prepared by 0"]
    assert told.count("2 processes on 1 node, started by the Trainer") == 1
    assert "rank 0 is careful" in told
    assert "rank 1 is careful" not in told
    (log,) = tmp_path.glob("lightning_logs/version_0/logs/rank*.log")
    assert log.name == "rank1.log"
    assert "rank 1 is careful" in log.read_text()


def test_the_traceback_of_the_rank_that_failed_comes_first_and_ends_all(start: Callable[..., Program]) -> None:
    program = start("raise")
    assert program.end() == 1
    told = program.err.read_text()
    assert told.count("Traceback") == 1
    assert told.index("ValueError: rank 1 is broken") < told.index("rank 0 lost its connection")
    assert "fitted" not in program.out.read_text()


def test_the_exit_code_of_a_process_that_left_is_the_programs(start: Callable[..., Program]) -> None:
    program = start("leave")
    assert program.end() == 7
    assert "rank 1 ended with exit code 7" in program.err.read_text()


# ---------------------------------------------------------------- signals
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_within_seconds(start: Callable[..., Program], rank: int) -> None:
    program = start("slow")
    os.kill(program.pid(rank), signal.SIGKILL)
    assert program.end(20) == 128 + signal.SIGKILL
    assert f"rank {rank} was ended by SIGKILL" in program.err.read_text()


def test_a_killed_program_leaves_no_orphans_and_they_have_saved(start: Callable[..., Program], tmp_path: Path) -> None:
    program = start("slow")
    program.pid(1)
    program.process.kill()
    assert program.end(20) == -signal.SIGKILL
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")), program.err.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_program_means_what_it_means_for_one_process(
    start: Callable[..., Program], tmp_path: Path, number: int
) -> None:
    program = start("slow")
    program.pid(1)
    program.process.send_signal(number)
    assert program.end(20) == 128 + number
    told = program.err.read_text()
    assert "Traceback" not in told
    assert told.count("finishing this step and saving") == told.count("interrupted after step") == 1
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))


# ---------------------------------------------------------------- the call in processes made of this one
class Fails(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_rank == 1 and batch_idx == 1:
            raise ZeroDivisionError("rank 1 divides")
        return super().training_step(batch, batch_idx)


class Logs(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("batch", float(batch_idx))
        return super().training_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.tensor([float(self.trainer.global_rank)])


def trainer_of(strategy: str = "auto", **settings: Any) -> Trainer:
    return Trainer(
        devices=2, accelerator="cpu", strategy=strategy, max_epochs=1, limit_train_batches=3, limit_val_batches=1,
        limit_predict_batches=2, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, **settings
    )  # fmt: skip


def test_in_a_test_the_call_runs_in_children_and_what_rank_0_had_comes_back() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    environ = dict(os.environ)
    trainer, module = trainer_of(), Logs()
    before = module.layer.weight.detach().clone()
    trainer.fit(module)
    saved = torch.load(trainer.checkpoint_callback.best_model_path)["state_dict"]  # type: ignore[union-attr]
    assert not torch.equal(module.layer.weight, before)
    assert torch.equal(module.layer.weight, saved["layer.weight"])
    assert (trainer.global_step, trainer.current_epoch, trainer.state.finished) == (3, 1, True)
    assert trainer.callback_metrics["batch"] == 2
    assert trainer.log_dir == "lightning_logs/version_0" or str(trainer.log_dir).endswith("lightning_logs/version_0")
    assert not torch.distributed.is_initialized()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers
    assert dict(os.environ) == environ
    predicted = trainer.predict(module)
    assert predicted is not None
    assert [batch.item() for batch in predicted] == [0.0, 0.0]
    assert trainer.strategy.world == World(size=2, local_size=2)


def test_in_a_test_an_error_keeps_its_type_and_the_traceback_of_its_process() -> None:
    with pytest.raises(ZeroDivisionError, match="rank 1 divides") as raised:
        trainer_of(logger=False, enable_checkpointing=False).fit(Fails())
    assert "in training_step" in str(raised.value.__cause__)


@pytest.mark.slow
def test_new_processes_train_weights_of_their_own() -> None:
    trainer, module = trainer_of("ddp_spawn", logger=False, enable_checkpointing=False), BoringModel()
    before = module.layer.weight.detach().clone()
    trainer.fit(module)
    assert not torch.equal(module.layer.weight, before)
    assert trainer.global_step == 3


# ---------------------------------------------------------------- which way
def test_several_nodes_are_refused_with_the_commands_that_start_them() -> None:
    trainer = trainer_of(num_nodes=2)
    with pytest.raises(MisconfigurationException, match=r"torchrun --nnodes 2 --nproc-per-node 2.*srun --nodes 2"):
        trainer.fit(BoringModel())


def test_what_cannot_be_pickled_is_forked_and_an_error_where_it_must_be_pickled() -> None:
    class Local(BoringModel):
        pass

    assert launch.way_of(trainer_of(), {"model": BoringModel()}) == "spawn"
    assert launch.way_of(trainer_of(), {"model": Local()}) == "fork"
    assert launch.way_of(trainer_of("ddp_fork"), {"model": BoringModel()}) == "fork"
    assert launch.way_of(trainer_of("ddp_notebook"), {"model": BoringModel()}) == "fork"
    with pytest.raises(MisconfigurationException, match=r"Local.*ddp_fork"):
        launch.way_of(trainer_of("ddp_spawn"), {"model": Local()})


def test_a_notebook_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.get_ipython", lambda: None, raising=False)
    assert launch.way_of(trainer_of(), {"model": BoringModel()}) == "fork"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    trainer = trainer_of()
    trainer.strategy.device = torch.device("cuda")
    with pytest.raises(MisconfigurationException, match="cuda is in use"):
        launch.way_of(trainer, {"model": BoringModel()})


def test_nobody_is_started_for_one_process_or_by_a_process_that_was() -> None:
    assert launch.needed(World(size=2, local_size=2))
    assert not launch.needed(World())
    assert not launch.needed(World(size=2, local_size=2, launcher="torchrun"))
