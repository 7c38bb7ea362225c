"""Runs that go on after a kill: on another number of processes, and by themselves when torchrun starts them again.

The long ones (`pytest -m slow`) take minutes: agents wait for each other for tens of seconds.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

SCRIPT = """
import json, os, signal, sys, time
from datetime import timedelta
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from trainkit import Callback, Module, Trainer, seed_everything
from trainkit.callbacks import ModelCheckpoint
from trainkit.loggers import CSVLogger
from trainkit.strategies import DDPStrategy

torch.set_num_threads(1)
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
ARGS = {"samples": 96, "batch": 12 // WORLD, "accumulate": 1, "delay": 0.0, "kills": [], "epochs": 2, "keep": "all",
        "ckpt_path": None, **json.loads(sys.argv[1])}


class Numbered(Dataset):
    def __len__(self):
        return ARGS["samples"]

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(8, generator=generator), torch.randn(1, generator=generator), index


class Net(Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        time.sleep(ARGS["delay"])
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("index", batch[2].double().mean(), on_epoch=True, on_step=False)
        with open(f"steps-{os.getpid()}", "a") as steps:
            row = [time.time(), self.current_epoch, batch_idx, WORLD, RANK, batch[2].tolist(), self.global_step]
            steps.write(json.dumps(row) + "\\n")
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Kills(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        for at, rank in ARGS["kills"]:
            done = f"killed-{at}-{rank}"
            if trainer.progress.total_batch == at and rank == RANK and not os.path.exists(done):
                open(done, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)


seed_everything(3, verbose=False)
net = Net()
trainer = Trainer(
    accelerator="cpu", logger=CSVLogger("."), enable_progress_bar=False, enable_model_summary=False,
    num_sanity_val_steps=0, max_epochs=ARGS["epochs"], log_every_n_steps=1, accumulate_grad_batches=ARGS["accumulate"],
    strategy=DDPStrategy(timeout=timedelta(seconds=6)) if "RANK" in os.environ else "auto", keep_batch=ARGS["keep"],
    callbacks=[ModelCheckpoint(every_n_train_steps=1), Kills()],
)
loaders = [DataLoader(Numbered(), ARGS["batch"], shuffle=shuffle) for shuffle in (True, False)]
trainer.fit(net, *loaders, ckpt_path=ARGS["ckpt_path"])
if RANK == 0:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "loss_step"}
    torch.save({"weights": list(net.state_dict().values()), "metrics": metrics, "step": trainer.global_step}, "end.pt")
"""


class Step(NamedTuple):
    """What one process has trained on in one batch."""

    time: float
    epoch: int
    batch: int
    world: int
    rank: int
    samples: list[int]
    step: int


def steps_in(folder: Path) -> list[Step]:
    """Return what all processes have trained on, in order of time."""
    lines = [line for path in folder.glob("steps-*") for line in path.read_text().splitlines(keepends=True)]
    return sorted(Step(*json.loads(line)) for line in lines if line.endswith("\n"))


def order_that_counts(steps: list[Step]) -> list[tuple[int, int]]:
    """Return (epoch, sample) in the order of training; of a batch that was trained again after a kill, the last time.

    What came after the checkpoint is lost with the weights, so it does not count.
    """
    last: dict[tuple[int, int], dict[int, Step]] = {}
    for step in steps:  # in order of time
        ranks = last.setdefault((step.epoch, step.batch), {})
        if any(other.world != step.world for other in ranks.values()):
            ranks.clear()
        ranks[step.rank] = step
    kept = [last[place][rank] for place in sorted(last) for rank in sorted(last[place])]
    return [(step.epoch, sample) for step in kept for sample in step.samples]


def end_of(folder: Path) -> dict[str, Any]:
    """Return what a run had at its end."""
    end: dict[str, Any] = torch.load(folder / "end.pt")
    return end


def check_like(folder: Path, whole: Path, rounding: float = 1e-6) -> None:
    """Compare a run that was cut with one that was not: each sample once, in order; weights and metrics."""
    assert order_that_counts(steps_in(folder)) == order_that_counts(steps_in(whole))
    cut, end = end_of(folder), end_of(whole)
    assert cut["step"] == end["step"]
    assert cut["metrics"] == pytest.approx(end["metrics"], abs=rounding)
    for one, other in zip(cut["weights"], end["weights"], strict=True):
        torch.testing.assert_close(one, other, atol=rounding, rtol=0)


Train = Callable[..., str]


@pytest.fixture
def train(environment: Callable[..., dict[str, str]]) -> Train:
    """Train in a folder, in one process or under torchrun with some options, and return what it said."""

    def run(folder: Path, *options: str, timeout: float = 90.0, **arguments: Any) -> str:
        folder.mkdir(exist_ok=True)
        (folder / "train.py").write_text(SCRIPT)
        launcher = ["-m", "torch.distributed.run", *options] if options else []
        command = [sys.executable, *launcher, "train.py", json.dumps(arguments)]
        done = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


def test_a_killed_process_is_started_again_and_the_run_goes_on_by_itself(train: Train, tmp_path: Path) -> None:
    kills = [[0, 1], [11, 0]]
    said = train(tmp_path / "cut", "--standalone", "--nproc-per-node=2", "--max-restarts=2", kills=kills)
    assert "(restart 1 of 2): there is no checkpoint of it yet, it begins again at its start" in said
    assert "(restart 2 of 2): it goes on from lightning_logs/version_0/checkpoints/epoch=1-step=11.ckpt" in said
    train(tmp_path / "whole")
    check_like(tmp_path / "cut", tmp_path / "whole")
    (rows,) = (tmp_path / "cut").glob("*/version_*/metrics.csv")  # one directory, with the rows of one run
    (expected,) = (tmp_path / "whole").glob("*/version_*/metrics.csv")
    assert len(rows.read_text().splitlines()) == len(expected.read_text().splitlines())
    assert (rows.parent / "restarts.json").exists()


TWO_FITS = """
import os, signal, sys
import torch
from torch.utils.data import DataLoader
from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.loggers import CSVLogger

class Net(Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        print("step", name, self.global_step, flush=True)
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

class Ends(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if name == "second" and trainer.global_step == 5 and not os.path.exists("ended"):
            open("ended", "w").close()
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))

data = DataLoader(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), 4)
for name, epochs in (("first", 1), ("second", 2)):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [ModelCheckpoint(every_n_train_steps=2), Ends()]
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, logger=CSVLogger(".", name=name), **quiet)
    net = Net()
    trainer.fit(net, data)
    print("at the end", name, net.net.weight.sum().item(), trainer.log_dir)
"""


@pytest.mark.parametrize(("ended_by", "restarts"), [("SIGKILL", "3"), ("SIGTERM", "0")])
def test_a_script_that_is_started_again_trains_only_what_it_had_not(
    ended_by: str, restarts: str, environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "two.py").write_text(TWO_FITS)
    of_torchrun = {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": restarts,
    }  # fmt: skip

    def start(*more: str) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env = environment({**of_torchrun, "MASTER_PORT": str(free.getsockname()[1])})
        command = [sys.executable, "two.py", ended_by, *more]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False).stdout.split(
            "\n"
        )

    first, again, other = start(), start(), start("another command")
    trained = [line.removeprefix("step ") for line in other if line.startswith("step")]
    assert trained == [f"first {step}" for step in range(4)] + [f"second {step}" for step in range(8)]
    # a signal is noted, the step finished and saved; but without restarts only the run that it ended is noted at all
    noted = ended_by == "SIGKILL"
    rest = [f"second {step}" for step in range(4 if noted else 6, 8)]
    trained = [line.removeprefix("step ") for line in again if line.startswith("step")]
    assert trained == (rest if noted else [f"first {step}" for step in range(4)] + rest)
    assert first[:4] == [f"step first {step}" for step in range(4)]
    for name, retrained in (("first", not noted), ("second", False)):
        ends = [line.split()[-2:] for line in [*again, *other] if line.startswith(f"at the end {name}")]
        assert [weight for weight, _ in ends] == [ends[1][0]] * 2
        assert [Path(log_dir).name for _, log_dir in ends] == [f"version_{n + retrained}" for n in (0, 1)]


# ---------------------------------------------------------------- on another number of processes
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 3}, {"samples": 91, "accumulate": 2}, {"samples": 91, "batch": 3}],
    ids=["plain", "inside a window", "a rest", "batch of each given"],
)
def test_a_run_killed_on_four_goes_on_on_any_number(
    settings: dict[str, Any], processes: Callable[..., Any], tmp_path: Path
) -> None:
    def train(folder: Path, nproc: int, **arguments: Any) -> None:
        folder.mkdir(exist_ok=True)
        said = json.dumps({**settings, **arguments})
        processes(nproc, SCRIPT, said, folder=folder, check="kills" not in arguments, timeout=200)

    train(tmp_path / "whole", 4)
    for nproc in (4, 3, 2, 1):
        folder = tmp_path / f"on{nproc}"
        train(folder, 4, kills=[[5, rank] for rank in range(4)])
        before = len(steps_in(folder))
        train(folder, nproc, ckpt_path="last")
        assert len(steps_in(folder)) > before
        check_like(folder, tmp_path / "whole", rounding=0.0 if nproc == 4 else 1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_batch_of_each_process_may_stay_instead(processes: Callable[..., Any], tmp_path: Path) -> None:
    def train(nproc: int, **arguments: Any) -> str:
        said: str = processes(nproc, SCRIPT, json.dumps({"batch": 3, **arguments}), check=False, timeout=200)[0].err
        return said

    train(4, kills=[[5, rank] for rank in range(4)])
    said = train(2, ckpt_path="last", keep="each")
    assert "A batch has 6 samples in all, 3 for each process; it had 12, 3 for each." in said
    order = order_that_counts(steps_in(tmp_path))
    assert sorted(order) == [(epoch, sample) for epoch in range(2) for sample in range(96)]


# ---------------------------------------------------------------- under torchrun
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shared", ["0", "1"], ids=["the agent's store", "a store of their own"])
def test_many_kills_are_as_many_restarts(
    shared: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", shared)
    kills = [[at, at % 2] for at in range(2, 16)]
    options = ("--standalone", "--nproc-per-node=2", "--max-restarts=14")
    said = train(tmp_path / "cut", *options, kills=kills, timeout=600)
    assert said.count("torchrun has started this run again") == 14
    train(tmp_path / "whole")
    check_like(tmp_path / "cut", tmp_path / "whole")


def long_script(folder: Path) -> None:
    folder.mkdir()
    arguments = json.dumps({"samples": 480, "delay": 0.2})
    (folder / "train.py").write_text(SCRIPT.replace("sys.argv[1]", repr(arguments)))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["one is killed", "one is cut off and comes back", "one comes late"])
def test_nodes_that_come_and_go(
    what: str, nodes: Any, environment: Callable[..., dict[str, str]], train: Train, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    long_script(folder)

    def trained(world: int) -> int:
        return sum(step.world == world for step in steps_in(folder))

    def more(world: int, steps: int = 8) -> Callable[[], bool]:
        least = trained(world) + steps
        return lambda: trained(world) >= least

    with nodes(folder, environment()) as two:
        two.start(0, "train.py", "--max-restarts=3")
        if what == "one comes late":
            two.until(more(1))
        two.start(1, "train.py", "--max-restarts=3")
        two.until(more(2))
        if what == "one is killed":
            two.kill(1)
            two.until(more(1))
        elif what == "one is cut off and comes back":
            two.cut(1)
            two.until(more(1))
            two.heal(1)
            two.until(more(2))
        codes = [two.wait(node) for node in list(two.agents)]
        assert not any(codes), two.said()
    train(tmp_path / "whole", samples=480)
    check_like(folder, tmp_path / "whole")
    assert len(list(folder.glob("*/version_*"))) == 1


# ---------------------------------------------------------------- traps
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.Rprop])
def test_a_checkpoint_from_before_the_first_update_and_one_after_it_go_on_exactly(
    kind: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    from trainkit import Callback, Module, Trainer

    class Net(Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return kind(self.parameters(), lr=0.01)  # type: ignore[call-arg]

    class Saves(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 0:
                trainer.save_checkpoint("step=0.ckpt")

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(f"step={trainer.global_step}.ckpt")

    def fit(**settings: Any) -> tuple[list[Tensor], Any]:
        generator = torch.Generator().manual_seed(0)
        data = torch.utils.data.DataLoader(torch.randn(12, 4, generator=generator), 4)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        module, ckpt_path = Net(), settings.pop("ckpt_path", None)
        trainer = Trainer(accelerator="cpu", enable_checkpointing=False, max_epochs=1, **quiet, **settings)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return [p.detach().clone() for p in module.parameters()], trainer.optimizers[0]

    whole, _ = fit(callbacks=[Saves()])
    for step in range(3):
        weights, optimizer = fit(ckpt_path=f"step={step}.ckpt")
        assert all(torch.equal(one, other) for one, other in zip(weights, whole, strict=True)), step
        counters = [state["step"] for state in optimizer.state.values()]
        assert len({counter.data_ptr() for counter in counters}) == len(counters) == 4
        assert [float(counter) for counter in counters] == [3.0] * 4


def test_the_trainers_own_launcher_gives_workers_a_store_of_their_own() -> None:
    from trainkit.launch import surroundings

    with surroundings(2):
        assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
