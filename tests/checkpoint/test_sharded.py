"""Checkpoints that several processes write, in real processes: saved, killed, spread over others, made one again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.checkpoint import store
from trainkit.file_commands import main as command

PREAMBLE = """
import errno, json, os, sys, threading, warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.checkpoint import layout, store
from trainkit.errors import CheckpointError
from trainkit.strategies import FSDPStrategy

torch.set_num_threads(1)
WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


class Net(Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data(samples=96, **settings):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, 8, generator=g), torch.randn(samples, 1, generator=g)
    return DataLoader(TensorDataset(x, y), 12 // WORLD, **settings)


def trainer(*callbacks, strategy="auto", **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings = {**quiet, "accelerator": "cpu", "devices": WORLD, "max_epochs": 2, **settings}
    return Trainer(strategy=strategy, callbacks=list(callbacks), **settings)


def fsdp(form="sharded", **settings):
    return FSDPStrategy(state_dict_type=form, auto_wrap_policy={nn.Linear}, **settings)


def weights(trainer):
    return layout.whole(trainer.module.state_dict(), on_rank_zero=False)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def near(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], atol=1e-5) for k in one)


def tell(**values):
    print("told " + json.dumps(values), flush=True)
"""

Told = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def told(telling: Told) -> Told:
    """Run a body in so many processes and return what each of them told, by rank; one is a plain `python -c`."""
    return lambda nproc, body, *args: telling(nproc, PREAMBLE + body, *args, timeout=120)


# ---- weights that are one
TIED = """
class Tied(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1))
        self.net[2].weight = self.net[0].weight

run = trainer(strategy=FSDPStrategy(state_dict_type="sharded"), max_epochs=1)
run.fit(Tied(), data())
run.save_checkpoint("tied.ckpt")
again = trainer(strategy=FSDPStrategy(state_dict_type="sharded"), max_epochs=1)
again.fit(Tied(), data(), ckpt_path="tied.ckpt")
net = again.module.net
tell(same=same(weights(again), weights(run)), tied=net[2].weight is net[0].weight)
"""


def test_tied_weights_are_written_once(told: Told) -> None:
    assert all(rank["same"] and rank["tied"] for rank in told(2, TIED))
    learned = 8 * 8 + 8 + 8 + 8 + 1
    written = sum(Path(f"tied.ckpt/{rank}.data").stat().st_size for rank in range(2))
    assert written == 4 * learned * 3  # with Adam's two
    state = store.load("tied.ckpt")["state_dict"]
    assert torch.equal(state["net.0.weight"], state["net.2.weight"])


# ---- traps of torch's own state dicts of optimizers
EARLY = """
class Early(Callback):
    def on_train_start(self, trainer, module):
        trainer.save_checkpoint(f"{sys.argv[1]}.ckpt")

class Counted(Net):
    def configure_optimizers(self):
        return torch.optim.NAdam(self.parameters(), lr=0.01)

def fitted(*callbacks, **settings):
    run = trainer(*callbacks, strategy=fsdp(sys.argv[1]), max_epochs=1)
    run.fit(Counted(), data(), **settings)
    counts = [state["step"] for state in run.optimizers[0].state.values()]
    return weights(run), [int(count) for count in counts], len({count.data_ptr() for count in counts})

expected, early, again = fitted(), fitted(Early()), fitted(ckpt_path=f"{sys.argv[1]}.ckpt")
tell(same=[same(one[0], expected[0]) for one in (early, again)], steps=[one[1:] for one in (expected, early, again)])
"""


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_save_before_the_first_step_makes_no_step_and_each_parameter_counts_its_own(form: str, told: Told) -> None:
    for rank in told(2, EARLY, form):
        assert rank["same"] == [True, True]
        assert rank["steps"] == [[[8] * 4, 4]] * 3


# ---- a run
RUN = """
background = sys.argv[1] == "background"
checkpoint = ModelCheckpoint("ck", monitor="val", save_top_k=2, save_last=True, asynchronous=background)
run = trainer(checkpoint, strategy=fsdp(), max_epochs=3)
run.fit(Net(), data(shuffle=True), data(24))
expected = weights(run)
run.save_checkpoint("end.ckpt")
names = sorted(os.listdir("ck"))

part = trainer(ModelCheckpoint("part", every_n_train_steps=5, save_top_k=-1, asynchronous=background),
               strategy=fsdp(), max_steps=13, max_epochs=3)
part.fit(Net(), data(shuffle=True), data(24))
saved = sorted(os.listdir("part"))
again = trainer(ModelCheckpoint("part", save_top_k=-1), strategy=fsdp(), max_epochs=3)
again.fit(Net(), data(shuffle=True), data(24), ckpt_path="last")
steps = [int(v["step"]) for v in again.optimizers[0].state.values()]

losses = []
for path in ("end.ckpt", checkpoint.best_model_path):
    losses += [trainer(strategy=fsdp()).validate(Net(), data(24), ckpt_path=path, verbose=False)[0]["val"]]
predicted = trainer(strategy=fsdp()).predict(Net(), data(24), ckpt_path="end.ckpt")
tell(names=names, saved=saved, from_=os.path.basename(again.ckpt_path), same=same(weights(again), expected),
     steps=steps,
     best=os.path.basename(checkpoint.best_model_path), kept=len(checkpoint.best_k_models), losses=losses,
     best_loss=checkpoint.best_model_score.item(), failed=checkpoint.failed_saves, hidden=len(os.listdir("ck")),
     last=os.path.basename(checkpoint.last_model_path), predicted=len(predicted), joint=run.background.joint)
"""


@pytest.mark.parametrize("when", ["now", "background"])
def test_a_run_saves_directories_and_goes_on_from_them_to_the_last_bit(when: str, told: Told) -> None:
    for rank in told(2, RUN, when):
        assert len(rank["names"]) == 3
        assert rank["last"] == "last.ckpt"
        assert rank["best"] in rank["names"]
        assert rank["kept"] == 2
        assert rank["failed"] == 0
        assert rank["joint"]
        assert rank["saved"] == ["epoch=0-step=5.ckpt", "epoch=1-step=10.ckpt"]
        assert rank["from_"] == "epoch=1-step=10.ckpt"
        assert rank["same"]
        assert rank["steps"] == [24] * 4  # each parameter's count is its own
        assert rank["losses"][1] == rank["best_loss"]
    for name in ("ck/last.ckpt", "end.ckpt", "part/epoch=1-step=10.ckpt"):
        assert sorted(os.listdir(name)) == ["0.data", "1.data", "plain.data", "trainkit.json"]
    state = store.load("ck/last.ckpt")
    assert [state["global_step"], len(state["ranks"]), len(state["optimizer_states"])] == [24, 2, 1]
    assert {tuple(value.shape) for value in state["state_dict"].values()} == {(7, 8), (7,), (1, 7), (1,)}
    assert command("inspect", ["end.ckpt", "ck/last.ckpt"]) == 0


def test_training_goes_on_while_a_directory_is_written_and_averages_of_weights_are_in_it(told: Told) -> None:
    body = """
from trainkit.callbacks import EMAWeightAveraging

trained_on, seen, real = threading.Event(), [], os.fsync


class Note(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 4:
            trained_on.set()


def fsync(descriptor):
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/{RANK}.data"):
        seen.append(trained_on.wait(30))  # the save after step 3 is on the disk when step 4 is done
    real(descriptor)


os.fsync = fsync
save = {"every_n_train_steps": 3, "save_top_k": -1, "asynchronous": True}
run = trainer(ModelCheckpoint("ck", **save), EMAWeightAveraging(decay=0.9), Note(), strategy=fsdp(), max_steps=7)
run.fit(Net(), data())
again = trainer(EMAWeightAveraging(decay=0.9), strategy=fsdp(), max_steps=7, enable_checkpointing=False)
again.fit(Net(), data(), ckpt_path="ck/epoch=0-step=3.ckpt")
tell(seen=seen, names=sorted(os.listdir("ck")), same=same(weights(run), weights(again)))
"""
    for rank in told(2, body):
        assert rank["seen"] == [True, True]
        assert rank["names"] == ["epoch=0-step=3.ckpt", "epoch=0-step=6.ckpt"]
        assert rank["same"]
    state = store.load("ck/epoch=0-step=3.ckpt")
    average, trained = state["state_dict"], state["current_model_state"]
    assert average.keys() == trained.keys()
    assert not torch.equal(average["net.0.weight"], trained["net.0.weight"])


# ---- other processes, other strategies
@pytest.mark.parametrize(
    "others",
    [((2, "fsdp-sharded"), (2, "ddp"), (1, "auto")), pytest.param(((4, "fsdp-full"),), marks=pytest.mark.slow)],
)
def test_any_number_of_processes_and_any_strategy_goes_on_from_a_directory_and_from_one_file(
    others: tuple[tuple[int, str], ...], told: Told
) -> None:
    whole = """
run = trainer(strategy=sys.argv[1], max_epochs=2)
run.fit(Net(), data())
torch.save(weights(run), "expected.pt")
part = trainer(ModelCheckpoint("one"), strategy=sys.argv[1], max_epochs=1)
part.fit(Net(), data())
tell(path=part.checkpoint_callback.best_model_path)
"""
    one = told(1, whole, "auto")[0]["path"]
    begin = """
run = trainer(ModelCheckpoint("four"), strategy=fsdp(), max_epochs=1)
run.fit(Net(), data())
tell(path=run.checkpoint_callback.best_model_path)
"""
    four = told(4, begin)[0]["path"]
    assert sorted(os.listdir(four)) == ["0.data", "1.data", "2.data", "3.data", "plain.data", "trainkit.json"]
    go_on = """
expected = torch.load("expected.pt")
found = []
for path in sys.argv[2:]:
    strategy = fsdp(sys.argv[1].removeprefix("fsdp-")) if sys.argv[1].startswith("fsdp") else sys.argv[1]
    run = trainer(ModelCheckpoint(f"from-{sys.argv[1]}-{WORLD}"), strategy=strategy, max_epochs=2)
    run.fit(Net(), data(), ckpt_path=path)
    steps = [int(v["step"]) for v in run.optimizers[0].state.values()]
    found.append([near(weights(run), expected), run.global_step, steps])
tell(found=found, path=run.checkpoint_callback.best_model_path)
"""
    for nproc, strategy in others:
        for rank in told(nproc, go_on, strategy, four, one):
            assert rank["found"] == [[True, 16, [16] * 4]] * 2, (nproc, strategy)
            last = rank["path"]
        assert os.path.isdir(last) == (strategy == "fsdp-sharded")


# ---- without processes
def test_a_directory_becomes_one_file_or_weights_for_others_without_any_processes(told: Told) -> None:
    run = """
run = trainer(strategy=fsdp(), max_epochs=1)
run.fit(Net(), data())
run.save_checkpoint("many.ckpt")
run.save_checkpoint("weights.ckpt", weights_only=True)
torch.save(weights(run), f"{RANK}.pt")
tell()
"""
    told(2, run)
    expected = torch.load("0.pt")
    assert command("convert", ["many.ckpt", "one.ckpt"]) == 0
    assert command("convert", ["many.ckpt", "one.safetensors"]) == 0
    assert command("convert", ["weights.ckpt", "weights.safetensors"]) == 0
    assert [name for name in os.listdir() if name.startswith(".trainkit")] == []
    from safetensors.torch import load_file

    many, one = store.load("many.ckpt"), store.load("one.ckpt")
    theirs = torch.load("one.ckpt", weights_only=True)
    assert many.keys() == one.keys() == theirs.keys()
    assert "optimizer_states" not in store.load("weights.ckpt")
    for name, value in expected.items():
        held = (many["state_dict"], one["state_dict"], theirs["state_dict"], load_file("one.safetensors"))
        for state in (*held, load_file("weights.safetensors")):
            assert torch.equal(state[name], value)
    for index, values in many["optimizer_states"][0]["state"].items():
        for name, value in values.items():
            assert torch.equal(one["optimizer_states"][0]["state"][index][name], value)
    from trainkit import Module

    class Net(Module):
        def __init__(self) -> None:
            super().__init__()
            nn = torch.nn
            self.net = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 1))

    rebuilt = Net.load_from_checkpoint("many.ckpt")
    assert all(torch.equal(value, expected[name]) for name, value in rebuilt.state_dict().items())


# ---- what goes wrong
def test_a_rank_whose_disk_is_full_is_an_error_on_all_and_leaves_nothing(told: Told) -> None:
    body = """
real, fails = os.fsync, [0]


def fsync(descriptor):
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    if path.endswith("/1.data"):
        fails[0] += 1
        if fails[0] in (2, 4):
            raise OSError(errno.ENOSPC, "No space left on device")
    real(descriptor)


os.fsync = fsync
found = {}
for background in (False, True):
    fails[0] = 0
    folder = f"ck-{background}"
    checkpoint = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=2, save_last=True, asynchronous=background)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = trainer(checkpoint, strategy=fsdp(), max_steps=10)
        run.fit(Net(), data())
    said = [str(one.message) for one in told if "nothing was saved" in str(one.message)]
    found[folder] = [sorted(os.listdir(folder)), checkpoint.failed_saves, said, checkpoint.best_model_path]
fails[0] = 1
try:
    run.save_checkpoint("by-hand.ckpt")
except CheckpointError as error:
    found["by hand"] = str(error)
tell(**found)
"""
    for rank in told(2, body):
        for folder in ("ck-False", "ck-True"):
            names, failed, said, best = rank[folder]
            assert failed == len(said) == 2
            assert names == ["epoch=0-step=2.ckpt", "epoch=0-step=6.ckpt", "epoch=1-step=10.ckpt", "last.ckpt"]
            assert os.path.basename(best) == "epoch=1-step=10.ckpt"
            assert all("the disk is full" in text and "(rank 1)" in text for text in said)
        assert "the disk is full" in rank["by hand"]
    assert not os.path.lexists("by-hand.ckpt")
    assert [name for name in os.listdir() if name.startswith(".trainkit")] == []


def test_what_can_not_be_saved_and_what_is_damaged_is_an_error_in_all_processes(told: Told) -> None:
    body = """
class Mistaken(Callback):
    def state_dict(self):
        return {"object": object()} if RANK == 0 else {}


def error_of(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


run = trainer(strategy=fsdp(), max_steps=2)
run.fit(Net(), data())
run.save_checkpoint("good.ckpt")
found = {"there": error_of(lambda: run.save_checkpoint("good.ckpt", overwrite=False))}
run.save_checkpoint("good.ckpt")  # over itself
found["step"] = store.step_of("good.ckpt")
run.callbacks.append(Mistaken())
found["mistake"] = error_of(lambda: run.save_checkpoint("mistaken.ckpt"))
dist.barrier()
if RANK == 0:
    with open("good.ckpt/1.data", "r+b") as file:
        file.seek(9)
        file.write(b"!")
dist.barrier()
found["flipped"] = error_of(lambda: trainer(strategy=fsdp()).fit(Net(), data(), ckpt_path="good.ckpt"))
dist.barrier()
if RANK == 0:
    os.unlink("good.ckpt/1.data")
dist.barrier()
found["missing"] = error_of(lambda: trainer(strategy=fsdp()).validate(Net(), data(), ckpt_path="good.ckpt"))
tell(**found)
"""
    for rank in told(2, body):
        assert rank["there"].startswith("CheckpointExistsError")
        assert rank["step"] == 2
        assert "TypeError" in rank["mistake"]
        assert "Mistaken/object is an object" in rank["mistake"]
        assert "good.ckpt is damaged: 1.data (" in rank["flipped"]
        assert "its 1.data is missing" in rank["missing"]
    assert sorted(name for name in os.listdir() if "ckpt" in name) == ["good.ckpt"]


# ---- killed
KILLED = """
import os, random, signal, sys, time
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from trainkit.checkpoint import disk, sharded_save, store

torch.set_num_threads(1)
trials, seed = int(sys.argv[1]), int(sys.argv[2])
random.seed(seed)


def train(rank, folder, rendezvous, told):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    group, mesh, step = dist.new_group(backend="gloo"), init_device_mesh("cpu", (2,)), 0
    while True:
        step += 1
        weight = distribute_tensor(torch.full((40, 50), float(step)), mesh, [Shard(0)])
        state = {"global_step": step, "optimizer_states": [], "state_dict": {"w": weight, "n": torch.tensor(step)}}
        parts = sharded_save.take_apart(state, rank == 0)
        sharded_save.write(f"{folder}/{step}.ckpt", parts, True, group, replace=False)
        if rank == 0:
            os.write(told, b".")
            if step > 2:
                disk.remove(f"{folder}/{step - 2}.ckpt")
        sharded_save.write(f"{folder}/last.ckpt", parts, True, group)


def check(folder, acknowledged):
    names = sorted(os.listdir(folder))
    found = {}
    for name in (name for name in names if not name.startswith(".")):
        state = store.load(f"{folder}/{name}")  # whole: every byte is what was written
        step = state["global_step"]
        assert name in (f"{step}.ckpt", "last.ckpt"), name
        assert torch.equal(state["state_dict"]["w"], torch.full((40, 50), float(step))), name  # of one moment
        found[name] = step
    assert max(found.values(), default=0) >= acknowledged, (found, acknowledged)
    assert len(found) <= 4, found
    hidden = [name for name in names if name.startswith(".")]
    assert all(name.startswith(disk.TEMPORARY) for name in hidden)
    assert sorted(disk.sweep(folder)) == hidden
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    return len(hidden)


left = 0
for trial in range(trials):
    folder, rendezvous = os.path.abspath(f"ck-{trial}"), os.path.abspath(f"rendezvous-{trial}")
    os.mkdir(folder)
    read, write = os.pipe()
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                train(rank, folder, rendezvous, write)
            finally:
                os._exit(1)
        children.append(child)
    os.close(write)
    os.read(read, 1)  # one is saved
    time.sleep(random.uniform(0, 0.25))
    first, second = random.sample(children, 2) if random.random() < 0.5 else children
    os.kill(first, signal.SIGKILL)
    if random.random() < 0.3:
        time.sleep(random.uniform(0, 0.05))  # the other goes on alone for a moment, and sees it fail
    os.kill(second, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    acknowledged = 1
    while said := os.read(read, 4096):
        acknowledged += len(said)
    os.close(read)
    left += check(folder, acknowledged)
print("left", left)
"""


def survive(trials: int, seed: int, folder: Path) -> int:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(trials), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_a_save_that_is_killed_leaves_whole_directories_or_none(tmp_path: Path) -> None:
    survive(8, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_hundred_saves_that_are_killed_leave_whole_directories_or_none(seed: int, tmp_path: Path) -> None:
    assert survive(100, seed, tmp_path) > 10  # or none was killed in the middle
