"""DDP in real processes: the same weights, metrics and files as one process, whatever number of them trains."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.strategies import DDPStrategy

PREAMBLE = """
import json, os, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainkit import Callback, Module, Trainer, seed_everything

torch.set_num_threads(1)
WORLD = int(os.environ.get("WORLD_SIZE", 1))
GLOBAL_BATCH = 12


class Net(Module):
    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16) if norm else nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data(samples=96, batch=None, **settings):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, 8, generator=g), torch.randn(samples, 1, generator=g)
    return DataLoader(TensorDataset(x, y), batch or GLOBAL_BATCH // WORLD, **settings)


def trainer(**settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(**{**quiet, "accelerator": "cpu", "max_epochs": 2, **settings})


def tell(**values):
    print("told " + json.dumps(values), flush=True)


def weights(module):
    return [p.double().sum().item() for p in module.parameters()]
"""


Told = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def told(telling: Told) -> Told:
    """Run a body in so many processes and return what each of them told, by rank; one is a plain `python -c`."""
    return lambda nproc, body, *args: telling(nproc, PREAMBLE + body, *args, timeout=90)


FIT = """
settings = json.loads(sys.argv[1])
module, seen = Net(), []
t = trainer(**settings)
t.fit(module, data(shuffle=True), data())
kind = type(t.strategy).__name__
tell(weights=weights(module), step=t.global_step, rank=t.global_rank, world=t.world_size, strategy=kind)
"""


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
        pytest.param({"precision": "bf16-mixed"}, marks=pytest.mark.slow),
        {"compile": {"backend": "eager"}},
    ],
)
def test_two_processes_train_what_one_does(told: Told, settings: dict[str, Any]) -> None:
    (alone,) = told(1, "seed_everything(3)" + FIT, json.dumps(settings))
    both = told(2, "seed_everything(3)" + FIT, json.dumps(settings))
    assert [part["rank"] for part in both] == [0, 1]
    assert {part["world"] for part in both} == {2}
    assert both[0]["weights"] == both[1]["weights"]
    assert both[0]["step"] == alone["step"]
    assert both[0]["strategy"] == "DDPStrategy"
    tolerance = 1e-3 if "precision" in settings else 1e-5
    torch.testing.assert_close(
        torch.tensor(both[0]["weights"]), torch.tensor(alone["weights"]), rtol=tolerance, atol=tolerance
    )


STOP = """
class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 5:
            trainer.should_stop = True

t = trainer(callbacks=[Stop()], max_epochs=100)
t.fit(Net(), data())
tell(step=t.global_step, stop=t.should_stop)
"""


def test_one_process_that_stops_stops_all_at_the_same_step(told: Told) -> None:
    first, second = told(2, STOP)
    assert first == second
    assert first["step"] == 6  # the wish went with the gradients of the next update


SIGNAL = """
import signal

class Interrupt(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

t = trainer(callbacks=[Interrupt()], max_epochs=100, default_root_dir=sys.argv[1], enable_checkpointing=True)
try:
    t.fit(Net(), data())
except SystemExit as left:
    tell(step=t.global_step, code=left.code)
"""


def test_a_signal_to_one_process_ends_all_of_them_saved_at_the_same_step(told: Told, tmp_path: Path) -> None:
    first, second = told(2, SIGNAL, str(tmp_path / "run"))
    assert first == second == {"step": 6, "code": 143}
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1


TIMED = """
import time
from datetime import timedelta
from trainkit.callbacks import ModelCheckpoint

NEVER, SOON = timedelta(hours=1), timedelta(seconds=0.1)  # only rank 0's clock counts
saves, validations = [], []

class Notes(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(0.02)

    def on_validation_end(self, trainer, pl_module):
        validations.append(trainer.global_step)

class Keep(ModelCheckpoint):
    def on_save_point(self, trainer, pl_module):
        before = self.last_model_path, len(self.best_k_models), self.best_model_path
        super().on_save_point(trainer, pl_module)
        if before != (self.last_model_path, len(self.best_k_models), self.best_model_path):
            saves.append(trainer.global_step)

first = os.environ["RANK"] == "0"
interval = SOON if first else NEVER
keep = Keep(sys.argv[1], train_time_interval=interval, save_top_k=-1, save_last=False)
t = trainer(callbacks=[keep, Notes()], max_epochs=4, enable_checkpointing=True, val_check_interval=interval,
            check_val_every_n_epoch=None, num_sanity_val_steps=0)
t.fit(Net(), data(), data())
tell(saves=saves, validations=validations)
"""


def test_what_is_done_after_some_time_is_done_by_all_when_the_first_ones_clock_says_so(
    told: Told, tmp_path: Path
) -> None:
    first, second = told(2, TIMED, str(tmp_path / "run"))
    assert first == second
    assert len(first["saves"]) > 1
    assert len(first["validations"]) > 1


SLOW_END = """
import signal, time

class Interrupt(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    def teardown(self, trainer, pl_module, stage):
        if trainer.global_rank == 0:
            time.sleep(1.0)
            print("rank 0 has closed everything", flush=True)

trainer(callbacks=[Interrupt()], max_epochs=100).fit(Net(), data())
"""


def test_under_torchrun_nobody_leaves_before_rank_0_has_closed_everything(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(PREAMBLE + SLOW_END)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = subprocess.run([*launcher, "x.py"], cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
    assert "rank 0 has closed everything" in found.stdout, found.stderr
    assert "exitcode  : 143" in found.stderr


FAILING = """
from trainkit.callbacks import OnExceptionCheckpoint

class Fail(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 3:
            raise ZeroDivisionError("on purpose")

trainer(callbacks=[Fail(), OnExceptionCheckpoint(sys.argv[1])], enable_checkpointing=True).fit(Net(), data())
"""


def test_an_exception_in_one_process_ends_all_and_waits_for_no_checkpoint(
    processes: Callable[..., Any], tmp_path: Path
) -> None:
    first, second = processes(2, PREAMBLE + FAILING, tmp_path / "x", timeout=60, check=False)
    assert first.code != 0
    assert second.code != 0
    assert "ZeroDivisionError: on purpose" in second.err
    assert "a checkpoint of several processes needs all of them" in second.err


MANUAL = """
class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss, on_step=False, on_epoch=True)

for samples in (96, 27, 25):  # in the last batch: 12, 3 and 1
    module = Manual()
    t = trainer(log_every_n_steps=1)
    t.fit(module, data(samples))
    tell(weights=weights(module), step=t.global_step, loss=t.callback_metrics["loss"].item())
"""


@pytest.mark.parametrize("number", [2, 3])
def test_manual_optimization_averages_gradients_in_each_backward(number: int, processes: Callable[..., Any]) -> None:
    alone, *several = (
        [json.loads(line.removeprefix("told ")) for line in rank.out.splitlines() if line.startswith("told ")]
        for count in (1, number)
        for rank in processes(count, PREAMBLE + MANUAL, timeout=90)
    )
    assert all(rank == several[0] for rank in several)
    assert len(alone) == 3
    for here, there in zip(alone, several[0], strict=True):
        assert here["step"] == there["step"]
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        torch.testing.assert_close(torch.tensor(here["weights"]), torch.tensor(there["weights"]), atol=1e-5, rtol=1e-5)


RESUME = """
class Kill(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 11:
            raise RuntimeError("here it ends")

class Noisy(Net):
    def __init__(self):
        super().__init__()
        self.net.insert(2, nn.Dropout(0.5))

from trainkit.callbacks import ModelCheckpoint

def settings(*more):
    keep = ModelCheckpoint("c", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    return {"callbacks": [keep, *more], "max_epochs": 3, "enable_checkpointing": True}

seed_everything(5)
whole = Noisy()
trainer(**settings()).fit(whole, data(shuffle=True))
part = Noisy()
t = trainer(**settings())
t.fit(part, data(shuffle=True), ckpt_path="c/step=10.ckpt")
tell(same=weights(whole) == weights(part), whole=weights(whole), best=t.checkpoint_callback.best_model_path)
"""


def test_a_resumed_run_of_three_processes_is_the_same_to_the_last_bit(told: Told) -> None:
    first, *others = told(3, RESUME)  # a sum over three depends on where in its buckets DDP has a gradient
    assert first["same"]
    assert others == [first] * 2


CONTROL_FLOW = """
class Frozen(Net):
    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch > 0)

module = Frozen()
trainer(max_epochs=2).fit(module, data())
tell(weights=weights(module))
"""


def test_parameters_that_are_unfrozen_between_epochs_learn_on_all_processes(told: Told) -> None:
    (alone,) = told(1, CONTROL_FLOW)
    both = told(2, CONTROL_FLOW)
    assert both[0] == both[1]
    torch.testing.assert_close(torch.tensor(both[0]["weights"]), torch.tensor(alone["weights"]))


UNEVEN = """
samples = int(sys.argv[1])
module = Net()
seen = []
class See(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        seen.append(0 if batch is None else len(batch[0]))

t = trainer(callbacks=[See()], max_epochs=1)
t.fit(module, data(samples, shuffle=True), data(samples))
tell(weights=weights(module), step=t.global_step, seen=seen, val=float(t.callback_metrics["val"]),
     loss=float(t.callback_metrics["loss_epoch"]))
"""


@pytest.mark.parametrize("samples", [97, 100])
def test_what_is_left_at_the_end_of_an_epoch_counts_by_samples(told: Told, samples: int) -> None:
    (alone,) = told(1, "seed_everything(2)" + UNEVEN, str(samples))
    several = told(3, "seed_everything(2)" + UNEVEN, str(samples))
    assert sum(sum(part["seen"]) for part in several) == samples
    assert {len(part["seen"]) for part in several} == {len(alone["seen"])}
    assert several[0]["weights"] == several[1]["weights"] == several[2]["weights"]
    for name in ("weights", "val", "loss"):
        torch.testing.assert_close(torch.tensor(several[0][name]), torch.tensor(alone[name]), rtol=1e-5, atol=1e-6)


HOOKED = """
import warnings
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook, powerSGD_hook
from trainkit.strategies import DDPStrategy


def alone(state, bucket):  # averages nothing
    made = torch.futures.Future()
    made.set_result(bucket.buffer())
    return made


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 6 and trainer.global_rank == 1:
            trainer.should_stop = True


def fitted(stop=False, state=None, hook=None, period=None, ckpt_path=None, **settings):
    callbacks = [Stop()] if stop else []
    strategy = DDPStrategy(ddp_comm_state=state, ddp_comm_hook=hook, model_averaging_period=period)
    t, module = trainer(strategy=strategy, callbacks=callbacks, log_every_n_steps=5, **settings), Net()
    t.fit(module, data(), ckpt_path=ckpt_path)
    t.save_checkpoint("end.ckpt")
    return {"weights": weights(module), "step": t.global_step}


def power():
    return powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2)


def local():
    return post_localSGD_hook.PostLocalSGDState(None, None, 3, False)


told = {
    "none": fitted(),
    "fp16": fitted(hook=default_hooks.fp16_compress_hook, stop=True, max_epochs=4),
    "power": fitted(state=power(), hook=powerSGD_hook.powerSGD_hook),
    "own": fitted(hook=alone, stop=True, max_epochs=4),
    "averaged": fitted(state=local(), hook=post_localSGD_hook.post_localSGD_hook, period=4),
    "not yet": fitted(state=local(), hook=post_localSGD_hook.post_localSGD_hook, period=4, max_steps=15),
}
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    fitted(state=power(), hook=powerSGD_hook.powerSGD_hook, max_epochs=3, ckpt_path="end.ckpt")
warned = [str(warning.message) for warning in heard if "PowerSGDState" in str(warning.message)]
tell(warned=warned, **told)
"""


def test_hooks_of_torch_take_part_in_averaging_gradients(told: Told) -> None:
    first, second = told(2, HOOKED)
    for warned in (first.pop("warned"), second.pop("warned")):
        assert len(warned) == 1
        assert "not to the last bit" in warned[0]
    assert {name for name in first if first[name]["weights"] == second[name]["weights"]} == {
        "none", "fp16", "power", "averaged"
    }  # fmt: skip
    assert {name: one["step"] for name, one in first.items()} == {name: one["step"] for name, one in second.items()}
    assert first["fp16"]["step"] == 7  # as soon as one of them wants
    assert first["own"]["step"] == 8  # which carries no wishes: they ask each other when the epoch is over
    assert first["power"]["weights"] == pytest.approx(first["none"]["weights"], abs=0.5)


@pytest.mark.parametrize("given", [{"model_averaging_period": 4}, {"ddp_comm_state": "PostLocalSGDState"}])
def test_averaging_weights_needs_the_period_and_the_state(given: dict[str, Any]) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

    made = {
        name: PostLocalSGDState(None, None, 3) if value == "PostLocalSGDState" else value
        for name, value in given.items()
    }
    with pytest.raises(ValueError, match="belong together"):
        DDPStrategy(**made)
