"""What several processes log is the one value that one process would have; what does not fit together is an error."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Result, run
from trainkit.metrics.exchange import Entry, difference

PREAMBLE = """
import json, os, sys, warnings
import torch
from torch import nn
from trainkit.errors import MisconfigurationException
from trainkit.metrics import TRAIN_BATCH, Metrics
from trainkit.strategies import Strategy
from trainkit.strategies.parallel import ParallelStrategy
from trainkit.world import World

warnings.simplefilter("error")
torch.set_num_threads(1)
WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


def tell(**values):
    print("told " + json.dumps(values), flush=True)
"""

JOIN = """
if WORLD > 1:
    strategy = ParallelStrategy(world=World(WORLD, RANK, WORLD, RANK, launcher="torchrun"))
    strategy.setup_environment()
else:
    strategy = Strategy()
"""

EVALUATED = """
def evaluated(samples, loaders, log, module=None):
    generator = torch.Generator().manual_seed(0)
    metrics = Metrics(module, strategy=strategy)
    metrics.begin("validation", loaders)
    metrics.hook = "on_validation_epoch_start"
    metrics.log("before", 7.0)
    for index in range(loaders):
        x = torch.randn(samples - index, generator=generator)
        label = torch.randint(0, 3, (len(x),), generator=generator)
        mine, batches = range(RANK, len(x), WORLD), 0
        metrics.begin_loader(index, "validation_step")
        for start in range(0, len(mine), 8):
            few = list(mine[start : start + 8])
            metrics.batch, batches = x[few], batches + 1
            log(metrics, x[few], label[few])
        metrics.end_loader(index, batches)
    metrics.end_loaders()
    metrics.hook = "on_validation_epoch_end"
    metrics.log("after", RANK + 1.0, reduce_fx="sum")
    metrics.log("own", float(RANK), rank_zero_only=True)
    results, together = metrics.end_evaluation()
    seen = {name: float(value) for name, value in metrics.callback_metrics.items()}
    return [{n: v.hex() for n, v in result.items()} for result in results], seen, sorted(metrics.progress_bar_metrics)
"""

OBJECTS = (
    PREAMBLE
    + """
import torchmetrics

class Largest(torchmetrics.CatMetric):
    def compute(self):
        return super().compute().amax()


class Two(nn.Module):
    # an object that is not torchmetrics', finds no other process by itself and computes nothing from nothing
    def __init__(self):
        super().__init__()
        self.reset()

    def update(self, x):
        self.seen.append(x)

    def compute(self):
        return torch.cat(self.seen).amax() * 0 + 2

    def reset(self):
        self.seen = []


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.auroc = torchmetrics.AUROC(task="binary")  # lists of tensors, none of them where there was no batch
        self.error = torchmetrics.MeanSquaredError()
        self.pearson = torchmetrics.PearsonCorrCoef()  # computes from the states of each process
        self.twice = torchmetrics.MeanMetric() * 2  # one inside another
        self.largest = Largest()
        self.two = Two()
        self.own = torchmetrics.SumMetric(sync_on_compute=False)
        self.collection = torchmetrics.MetricCollection(
            {"precision": torchmetrics.Precision("multiclass", num_classes=3, average="macro"),
             "recall": torchmetrics.Recall("multiclass", num_classes=3, average="macro")}, prefix="of/"
        )


def log(metrics, x, label):
    module = metrics.module
    metrics.log("mean", x.mean())
    module.auroc.update(torch.sigmoid(x), label % 2)
    metrics.log("auroc", module.auroc)
    module.error.update(x, x * 1.1 + 0.1)
    metrics.log("error", module.error)
    module.pearson.update(x, x**3)
    metrics.log("pearson", module.pearson)
    module.twice.update(x)
    metrics.log("twice", module.twice)
    module.largest.update(x)
    metrics.log("largest", module.largest)
    module.two.update(x)
    metrics.log("two", module.two)
    module.own.update(len(x))
    metrics.log("samples of a process", module.own)
    module.collection.update(torch.nn.functional.one_hot(label, 3).float(), (label + 1) % 3)
    for name, metric in module.collection.items(keep_base=False, copy_state=False):
        metrics.log(name, metric)
"""
    + EVALUATED
    + JOIN
    + """
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchmetrics on one or two samples
    found = {str(samples): evaluated(samples, 1, log, Parts()) for samples in (103, 8, 1)}
module = Parts()
found["again"] = [evaluated(103, 1, log, module)[1]["auroc"] for _ in range(2)]
found["updates"], found["computed"] = module.auroc.update_count, float(module.auroc.compute())
tell(**found)
"""
)

NUMBERS = """
def log(metrics, x, label):
    right = (label == 1).float()
    metrics.log("accuracy", right.mean())
    metrics.log("right", right.sum(), reduce_fx="sum")
    metrics.log("right_as_number", int(right.sum()), reduce_fx="sum", prog_bar=True)
    metrics.log("share", int(right.sum()) / len(x))
    metrics.log("loss", (x**2).mean(), on_step=True, on_epoch=True)
    metrics.log("least", x.min(), reduce_fx="min")
    metrics.log("most", x.double().max(), reduce_fx="max", sync_dist=True)
    metrics.log("hidden", x.max(), logger=False)
"""

CHECKS = (
    PREAMBLE
    + NUMBERS
    + EVALUATED
    + JOIN
    + """
found = {"results": {}}
for samples in (103, 3):
    for loaders in (1, 2):
        found["results"][f"{samples} {loaders}"] = evaluated(samples, loaders, log)


def error_of(function):
    try:
        function()
    except MisconfigurationException as error:
        return str(error)
    return None


def ends(*logged):
    metrics = Metrics(strategy=strategy)
    metrics.begin("validation")
    metrics.begin_loader(0, "validation_step")
    for name, options in logged:
        metrics.log(name, 1.0, **options)
    metrics.end_loader(0, 1)


def steps(*logged):
    metrics = Metrics(strategy=strategy)
    metrics.start_batches(TRAIN_BATCH)
    for name, options in logged:
        metrics.log(name, 1.0, **options)
    metrics.agree_on_steps()


mine = RANK == WORLD - 1
if WORLD > 1:
    found["errors"] = {
        "keys": error_of(lambda: ends(("a", {}), ("c" if mine else "b", {}))),
        "one less": error_of(lambda: ends(("a", {}), *([] if mine else [("b", {})]))),
        "none": error_of(lambda: ends(*([] if mine else [("b", {})]))),
        "order": error_of(lambda: ends(*([("a", {}), ("b", {})][:: -1 if mine else 1]))),
        "options": error_of(lambda: ends(("a", {"reduce_fx": "sum" if mine else "mean"}))),
        "point": error_of(lambda: steps(("a", {"sync_dist": True})) if mine else ends(("a", {}))),
        "steps": error_of(lambda: steps(*([] if mine else [("a", {"sync_dist": True})]))),
        "alone": error_of(lambda: ends(("a", {}), *([] if mine else [("b", {"rank_zero_only": True})]))),
        "own steps": error_of(lambda: steps(*([] if mine else [("a", {})]))),
    }

metrics = Metrics(strategy=strategy)
metrics.start_batches(TRAIN_BATCH)
calls = []
if WORLD > 1:
    all_reduce, gather = strategy.all_reduce, strategy.gather_objects
    strategy.all_reduce = lambda *a: (calls.append("reduce"), all_reduce(*a))[1]
    strategy.gather_objects = lambda *a: (calls.append("gather"), gather(*a))[1]
found["shown"] = []
for metrics.x in range(4):
    metrics.batch = torch.zeros(RANK + 1)  # batches of different sizes
    metrics.log("mean", torch.tensor(float(metrics.x * 10 + RANK)), sync_dist=True, on_epoch=True)
    metrics.log("sum", metrics.x + RANK, sync_dist=True, reduce_fx="sum")
    metrics.log("most", metrics.x + RANK, sync_dist=True, reduce_fx="max")
    metrics.log("own", float(RANK))
    before = len(calls)
    metrics.callback_metrics, metrics.logged_metrics, metrics.progress_bar_metrics
    assert len(calls) == before  # reading tells nobody
    if metrics.x % 2:
        metrics.agree_on_steps()
        calls.append("point")
    found["shown"].append({name: float(value) for name, value in metrics.callback_metrics.items()})
metrics.end_batches()
found["epoch"] = float(metrics.callback_metrics["mean_epoch"])
found["calls"] = calls.copy()

calls.clear()
metrics = Metrics(strategy=strategy)
metrics.start_batches(TRAIN_BATCH)
for metrics.x in range(120):  # a row for each update
    metrics.log("own", float(RANK))
    metrics.agree_on_steps()
found["calls_without_sync"] = len(calls)
tell(**found)

# The last process ends; another one waits for it.
if WORLD == 2 and not mine:
    try:
        ends(("a", {}))
    except RuntimeError as error:
        print("waited", error)
"""
)


def told(stdout: str) -> Any:
    return json.loads(next(line for line in stdout.splitlines() if line.startswith("told ")).removeprefix("told "))


def told_by(results: list[Result]) -> list[Any]:
    return [told(result.out) for result in results]


def told_alone(source: str) -> Any:
    """Run a program in this process, as the one process there is."""
    with contextlib.redirect_stdout(io.StringIO()) as said, warnings.catch_warnings():
        exec(source, {})
    return told(said.getvalue())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Result]]:
    """What so many processes said, which are run once."""

    @functools.cache
    def of(processes: int) -> list[Result]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("processes"))
            return run(processes, CHECKS, timeout=110)

    return of


@pytest.fixture(scope="module")
def found(results: Callable[[int], list[Result]]) -> Callable[[int], list[dict[str, Any]]]:
    return lambda processes: told_by(results(processes)) if processes > 1 else [told_alone(CHECKS)]


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_a_validation_is_the_same_number_on_any_number_of_processes(
    processes: int, found: Callable[[int], list[dict[str, Any]]]
) -> None:
    exact = ("accuracy", "right", "right_as_number", "share", "least", "most", "hidden", "before")
    (alone,) = found(1)
    for here in found(processes):
        for case, (each_loader, seen, on_bar) in here["results"].items():
            expected, expected_seen, expected_on_bar = alone["results"][case]
            assert on_bar == expected_on_bar, case
            assert list(seen) == list(expected_seen), case
            for loader, of_one in zip(each_loader, expected, strict=True):
                assert list(loader) == list(of_one), case
                for name, value in loader.items():
                    if name in ("after", "own"):
                        continue
                    if name.split("/dataloader")[0] in exact:
                        assert value == of_one[name], (case, name)
                    assert float.fromhex(value) == pytest.approx(float.fromhex(of_one[name]), abs=1e-6), (case, name)
                assert float.fromhex(loader["after"]) == processes * (processes + 1) / 2


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one process and each of two say of metric objects."""
    pytest.importorskip("torchmetrics")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("objects"))
        return [told_alone(OBJECTS), *told_by(run(2, OBJECTS, timeout=110))]


@pytest.mark.parametrize("samples", ["103", "8", "1"])
def test_metric_objects_compute_what_all_processes_updated_them_with(samples: str, objects: list[Any]) -> None:
    alone, *both = [of_one[samples][1] for of_one in objects]
    assert both[0]["samples of a process"] == (int(samples) + 1) // 2  # it was told not to look at the others
    for here in both:
        assert list(here) == list(alone)
        here, expected = ({n: v for n, v in o.items() if n not in ("after", "own")} for o in (here, alone))
        expected["samples of a process"] = here["samples of a process"]
        assert here == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_a_metric_object_goes_on_with_its_own_updates(objects: list[Any]) -> None:
    alone, *both = objects
    for here in both:
        assert here["again"] == pytest.approx(alone["again"], abs=1e-6)
        assert here["updates"] < alone["updates"]
        assert here["computed"] == here["again"][1]  # kept: nobody is asked again


def test_what_rank_zero_logs_alone_is_its_own(found: Callable[[int], list[dict[str, Any]]]) -> None:
    owns = [here["results"]["103 1"][1]["own"] for here in found(4)]
    assert owns == [0, 1, 2, 3]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_log_different_things_all_fail_and_say_who_logged_what(
    processes: int, found: Callable[[int], list[dict[str, Any]]]
) -> None:
    first = "rank 0" if processes == 2 else "ranks 0, 1, 2"
    last = f"rank {processes - 1}"
    for here in found(processes):
        errors = here["errors"]
        assert f"{first} logged ['a', 'b'], {last} logged ['a', 'c'] (only some logged ['b', 'c'])" in errors["keys"]
        assert f"{first} logged ['a', 'b'], {last} logged ['a'] (only some logged ['b'])" in errors["one less"]
        assert f"{first} logged ['b'], {last} logged []" in errors["none"]
        assert f"{first} logged ['a', 'b'], {last} logged ['b', 'a'] (in another order)" in errors["order"]
        assert "a (mean by epoch in validation_step)" in errors["options"]
        assert f"{last} logged ['a (sum by epoch in validation_step)'] (with other options)" in errors["options"]
        assert f"{last} is at a log point" in errors["point"]
        assert f"{first} is at the end of the validation's loader 0" in errors["point"]
        assert f"{first} logged ['a'], {last} logged []" in errors["steps"]
        assert errors["alone"] is None
        assert errors["own steps"] is None


def test_values_by_step_are_of_all_processes_from_a_log_point_to_the_next(
    found: Callable[[int], list[dict[str, Any]]],
) -> None:
    for processes in (2, 4):
        sizes = range(1, processes + 1)
        for rank, here in enumerate(found(processes)):
            means = [values["mean"] for values in here["shown"]]
            weighted = [
                sum(size * (x * 10 + size - 1) for size in sizes) / sum(sizes)  # batches of 1, 2, ... samples
                for x in range(4)
            ]
            assert means == pytest.approx([rank, weighted[1], weighted[1], weighted[3]])
            assert here["shown"][3]["sum"] == sum(3 + other for other in range(processes))
            assert here["shown"][3]["most"] == 3 + processes - 1
            assert here["shown"][3]["own"] == rank
            assert here["epoch"] == pytest.approx(sum(weighted) / 4)


def test_no_process_tells_another_anything_but_at_log_points_and_ends(
    found: Callable[[int], list[dict[str, Any]]],
) -> None:
    for here in found(4):
        point = ["reduce"] * 3  # keys, sums, extremes
        assert here["calls"] == [*point, "point", *point, "point", "reduce", "reduce"]
        assert here["calls_without_sync"] == 3  # in 120 updates with a row each, of which nobody wants a common value
    assert found(1)[0]["calls"] == ["point", "point"]


def test_a_process_that_never_comes_is_an_error_that_says_so(results: Callable[[int], list[Result]]) -> None:
    said = next(line for line in results(2)[0].out.splitlines() if line.startswith("waited"))
    assert "process 0 of 2 waited at the end of the validation's loader 0 for the others" in said


def test_a_difference_names_few_sides_however_many_processes_there_are() -> None:
    def entry(name: str) -> Entry:
        return Entry(name, "validation_step", "", None, "mean", False, True, False, None, False, False, True, None)

    everyone = [("the end", [entry(f"loss_{rank}")], False) for rank in range(1000)]
    assert "and 996 more" in difference(everyone)
    everyone = [("the end", [entry("b" if rank == 500 else "a")], False) for rank in range(1000)]
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7, ... logged ['a'], rank 500 logged ['b']" in difference(everyone)


DECISIONS = (
    PREAMBLE
    + """
from torch.utils.data import DataLoader
from trainkit import Module, Trainer
from trainkit.callbacks import EarlyStopping, ModelCheckpoint
from trainkit.loggers import Logger


class Records(Logger):
    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


class Net(Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        self.log("mine", float(RANK * 10 + self.current_epoch * (1 - 2 * RANK)))  # better on one, worse on the other
        self.log("all", float(RANK + batch_idx), sync_dist=True)
        return self.line(batch[:, None]).mean()

    def on_train_epoch_end(self):
        self.log("ended", float(RANK))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "mine"}}


stopping = [EarlyStopping("mine", patience=3), EarlyStopping("ended", patience=9)]
saving = [ModelCheckpoint("checkpoints", monitor="all", filename="{all:.1f}", every_n_train_steps=3, save_top_k=-1)]
records = Records()
trainer = Trainer(
    accelerator="cpu", max_epochs=3, logger=records, log_every_n_steps=2, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[*stopping, *saving],
)
module = Net()
trainer.fit(module, DataLoader(torch.arange(16.0), batch_size=2, num_workers=0))
gathered = module.all_gather({"a": [RANK, 1.5], "b": torch.ones(2) * RANK})
tell(
    waited=[s.wait_count for s in stopping], best=[float(s.best_score) for s in stopping],
    lr=trainer.optimizers[0].param_groups[0]["lr"], scores=sorted(map(float, saving[0].best_k_models.values())),
    rows=[row["all"] for _, row in records.rows if "all" in row],
    gathered=[[t.tolist() for t in gathered["a"]], gathered["b"].tolist()], kinds=[str(t.dtype) for t in gathered["a"]],
)
"""
)


def test_processes_decide_alike_whatever_each_of_them_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = told_by(run(2, DECISIONS, timeout=110))
    rows = first.pop("rows")
    second.pop("rows")
    assert first == second
    assert first["waited"] == [2, 2]  # rank 0's gets worse
    assert first["best"] == [0.0, 0.5]  # and what the end of the epoch logs is of both
    assert first["lr"] == 0.25
    assert rows == [1.5, 3.5] * 3
    assert first["scores"] == [0.5, 1.5, 2.5, 3.5]  # after updates 3, 6, 9 and 12
    assert first["gathered"] == [[[0, 1], [1.5, 1.5]], [[0, 0], [1, 1]]]


HALF_AN_EPOCH = (
    PREAMBLE
    + """
from torch.utils.data import DataLoader
from trainkit import Module, Trainer


class Net(Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        for reduce in ("mean", "sum", "min", "max"):
            self.log(reduce, batch.sum() / len(batch), on_step=False, on_epoch=True, reduce_fx=reduce)
        self.log("samples", len(batch), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
        if batch_idx == 0:
            self.log("first", float(len(batch)), on_step=False, on_epoch=True, reduce_fx="sum")
        return self.line(batch[:, None]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


steps, before, after = sys.argv[1:]
trainer = Trainer(
    accelerator="cpu", max_epochs=1, max_steps=int(steps), logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
warnings.simplefilter("ignore")  # other batches than before
data = DataLoader(torch.arange(48.0), batch_size=12 // WORLD)
trainer.fit(Net(), data, ckpt_path=before or None, ckpt_strict=False)
trainer.save_checkpoint(after)
tell(**{name: float(value) for name, value in trainer.callback_metrics.items() if name not in ("min", "max", "sum")})
"""
)


@pytest.mark.slow
def test_half_an_epoch_of_three_processes_goes_on_in_two_and_ends_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (whole,) = told_by(run(1, HALF_AN_EPOCH, "-1", "", "whole.ckpt"))
    three = told_by(run(3, HALF_AN_EPOCH, "1", "", "three.ckpt"))
    two = told_by(run(2, HALF_AN_EPOCH, "2", "three.ckpt", "two.ckpt"))
    one = told_by(run(1, HALF_AN_EPOCH, "-1", "two.ckpt", "one.ckpt"))
    assert [each["samples"] for each in (*three, *two, *one)] == [12, 12, 12, 24, 24, 48]
    assert one == [whole]
