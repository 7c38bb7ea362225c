"""What several processes log is the one value that one process would have; what does not fit together is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Result, run
from trainkit.metrics.exchange import Entry, difference

PREAMBLE = """
import json, os, sys, warnings
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader
from trainkit import Callback, Module, Trainer
from trainkit.callbacks import EarlyStopping, ModelCheckpoint
from trainkit.errors import MisconfigurationException
from trainkit.loggers import Logger
from trainkit.metrics import TRAIN_BATCH, Metrics
from trainkit.strategies import Strategy
from trainkit.strategies.parallel import ParallelStrategy
from trainkit.world import World

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "pkg_resources|.*deprecated")
torch.set_num_threads(1)
WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


def tell(**values):
    print("told " + json.dumps(values), flush=True)
"""

EVALUATED = """
class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")
        self.auroc = torchmetrics.AUROC(task="binary")  # lists of tensors, none of them where there was no batch
        self.r2 = torchmetrics.R2Score()
        self.pearson = torchmetrics.PearsonCorrCoef()  # computes from the states of each process
        self.twice = torchmetrics.MeanMetric() * 2  # one inside another
        self.cat = torchmetrics.CatMetric()
        self.collection = torchmetrics.MetricCollection(
            {"precision": torchmetrics.Precision("multiclass", num_classes=3, average="macro"),
             "recall": torchmetrics.Recall("multiclass", num_classes=3, average="macro")}, prefix="of/"
        )
        self.spread = Spread()


class Spread(nn.Module):
    # an object that is not torchmetrics' and finds no other process by itself
    def __init__(self):
        super().__init__()
        self.reset()

    def update(self, x):
        self.seen.append(x)

    def compute(self):
        return torch.cat(self.seen).amax() * 0 + 2

    def reset(self):
        self.seen = []


class LargestOf(torchmetrics.CatMetric):
    def compute(self):
        return super().compute().amax()


def evaluated(samples, loaders=1, objects=True):
    generator = torch.Generator().manual_seed(0)
    module = Parts()
    module.cat = LargestOf()
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
            right = (label[few] == 1).float()
            metrics.log("accuracy", right.mean())
            metrics.log("right", right.sum(), reduce_fx="sum")
            metrics.log("right_as_number", int(right.sum()), reduce_fx="sum", prog_bar=True)
            metrics.log("share", float(right.mean()))
            metrics.log("loss", (x[few] ** 2).mean(), on_step=True, on_epoch=True)
            metrics.log("least", x[few].min(), reduce_fx="min")
            metrics.log("most", x[few].double().max(), reduce_fx="max", sync_dist=True)
            metrics.log("hidden", x[few].max(), logger=False)
            if not objects:
                continue
            module.accuracy.update(torch.nn.functional.one_hot(label[few], 3).float(), torch.ones_like(label[few]))
            metrics.log("objects/accuracy", module.accuracy)
            module.auroc.update(torch.sigmoid(x[few]), (x[few] > 0.3).long() if len(few) < 2 else label[few] % 2)
            metrics.log("objects/auroc", module.auroc)
            module.r2.update(x[few], x[few] * 1.1 + 0.1)
            metrics.log("objects/r2", module.r2)
            module.pearson.update(x[few], x[few] ** 3)
            metrics.log("objects/pearson", module.pearson)
            module.twice.update(x[few])
            metrics.log("objects/twice", module.twice)
            module.cat.update(x[few])
            metrics.log("objects/cat", module.cat)
            module.spread.update(x[few])
            metrics.log("objects/spread", module.spread)
            module.collection.update(torch.nn.functional.one_hot(label[few], 3).float(), (label[few] + 1) % 3)
            for name, metric in module.collection.items(keep_base=False, copy_state=False):
                metrics.log(name, metric)
        metrics.end_loader(index, batches)
        if objects:
            for part in module.modules():
                if hasattr(part, "reset"):
                    part.reset()
    metrics.end_loaders()
    metrics.hook = "on_validation_epoch_end"
    metrics.log("after", RANK + 1.0, reduce_fx="sum")
    metrics.log("own", float(RANK), rank_zero_only=True)
    results, together = metrics.end_evaluation()
    seen = {name: float(value) for name, value in metrics.callback_metrics.items()}
    return [{n: v.hex() for n, v in result.items()} for result in results], seen, sorted(metrics.progress_bar_metrics)
"""

CHECKS = (
    PREAMBLE
    + EVALUATED
    + """
if WORLD > 1:
    strategy = ParallelStrategy(world=World(WORLD, RANK, WORLD, RANK, launcher="torchrun"))
    strategy.setup_environment()
else:
    strategy = Strategy()
found = {"results": {}}
for samples in (103, 3):
    for loaders in (1, 2):
        found["results"][f"{samples} {loaders}"] = evaluated(samples, loaders, objects=loaders == 1 and samples > 3)
    found["results"][f"{samples} objects"] = evaluated(samples)


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
found["calls"] = calls
tell(**found)

# The last process ends; another one waits for it.
if WORLD == 2 and not mine:
    try:
        ends(("a", {}))
    except RuntimeError as error:
        print("waited", error)
"""
)


def told(result: Result) -> Any:
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("told ")]
    return json.loads(lines[-1].removeprefix("told "))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Result]]:
    """What 1, 2, 3 and 4 processes said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("processes"))
        return {processes: run(processes, CHECKS, timeout=110) for processes in (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def found(results: dict[int, list[Result]]) -> dict[int, list[dict[str, Any]]]:
    return {processes: [told(result) for result in each] for processes, each in results.items()}


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_a_validation_is_the_same_number_on_any_number_of_processes(
    processes: int, found: dict[int, list[dict[str, Any]]]
) -> None:
    exact = ("accuracy", "right", "right_as_number", "share", "least", "most", "hidden", "before")
    (alone,) = found[1]
    for here in found[processes]:
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


def test_what_rank_zero_logs_alone_is_its_own(found: dict[int, list[dict[str, Any]]]) -> None:
    owns = [here["results"]["103 1"][1]["own"] for here in found[4]]
    assert owns == [0, 1, 2, 3]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_log_different_things_all_fail_and_say_who_logged_what(
    processes: int, found: dict[int, list[dict[str, Any]]]
) -> None:
    first = "rank 0" if processes == 2 else "ranks 0, 1, 2"
    last = f"rank {processes - 1}"
    for here in found[processes]:
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
    found: dict[int, list[dict[str, Any]]],
) -> None:
    for processes in (2, 3, 4):
        sizes = range(1, processes + 1)
        for rank, here in enumerate(found[processes]):
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
    found: dict[int, list[dict[str, Any]]],
) -> None:
    for here in found[4]:
        point = ["reduce"] * 3  # keys, sums, extremes
        assert here["calls"] == [*point, "point", *point, "point", "reduce", "reduce"]
    assert found[1][0]["calls"] == ["point", "point"]


def test_a_process_that_never_comes_is_an_error_that_says_so(results: dict[int, list[Result]]) -> None:
    said = next(line for line in results[2][0].stdout.splitlines() if line.startswith("waited"))
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
    first, second = [told(result) for result in run(2, DECISIONS)]
    rows = first.pop("rows")
    second.pop("rows")
    assert first == second
    assert first["waited"] == [2, 2]  # rank 0's gets worse
    assert first["best"] == [0.0, 0.5]  # and what the end of the epoch logs is of both
    assert first["lr"] == 0.25
    assert rows == [1.5, 3.5] * 3
    assert first["scores"] == [0.5, 1.5, 2.5, 3.5]  # after updates 3, 6, 9 and 12
    assert first["gathered"] == [[[0, 1], [1.5, 1.5]], [[0, 0], [1, 1]]]
