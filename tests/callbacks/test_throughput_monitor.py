from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from trainkit import Module, Trainer
from trainkit.callbacks import ThroughputMonitor
from trainkit.callbacks.throughput_monitor import compute_dtype
from trainkit.loggers import Logger


class Rows(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, {name: value for name, value in metrics.items() if name != "epoch"}))

    def of(self, stage: str) -> list[tuple[int | None, int, bool]]:
        """Give step, batches and whether there are rates, for each row of a stage."""
        return [
            (step, row[f"{stage}/batches"], f"{stage}/device/batches_per_sec" in row)
            for step, row in self.rows
            if f"{stage}/batches" in row
        ]


class Net(Module):
    flops_per_batch: Any = 10

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(batches: int) -> DataLoader[Any]:
    return DataLoader(torch.ones(3 * batches, 2), batch_size=3)  # type: ignore[arg-type]


def trainer_with(every: int, window: int = 4, **settings: Any) -> tuple[Trainer, Rows]:
    logger = Rows()
    monitor = ThroughputMonitor(len, length_fn=torch.Tensor.numel, window_size=window)
    options: dict[str, Any] = {"max_epochs": 2, "logger": logger, "callbacks": monitor} | settings
    return Trainer(
        log_every_n_steps=every, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        accelerator="cpu", **options,
    ), logger  # fmt: skip


def test_training_and_validation_are_logged_with_names_and_steps_of_their_own() -> None:
    trainer, logger = trainer_with(every=1)
    trainer.fit(Net(), loader(5), loader(3))
    assert logger.of("train") == [(n - 1, n, n >= 4) for n in range(1, 11)]
    assert logger.of("validate") == [(1, 1, False), (2, 2, False), (3, 3, False)] * 2
    first, last = logger.rows[0][1], logger.rows[-4][1]
    assert {**first, "train/time": 0} == {"train/time": 0, "train/batches": 1, "train/samples": 3, "train/lengths": 6}
    assert last["train/samples"] == 30
    per_second = last["train/device/batches_per_sec"]
    assert last["train/device/samples_per_sec"] == pytest.approx(3 * per_second)
    assert last["train/device/items_per_sec"] == pytest.approx(6 * per_second)
    assert last["train/device/flops_per_sec"] == pytest.approx(10 * per_second)
    assert "train/device/mfu" not in last  # what the cpu could do is not known


@pytest.mark.parametrize(
    ("every", "accumulate", "rows"),
    [(3, 1, [(2, 3, False), (5, 6, True), (8, 9, True)]), (2, 2, [(1, 4, True), (3, 7, True), (5, 10, True)])],
)
def test_rates_are_there_at_the_first_log_after_a_windows_batches(every: int, accumulate: int, rows: Any) -> None:
    trainer, logger = trainer_with(every=every, accumulate_grad_batches=accumulate)
    trainer.fit(Net(), loader(5))
    assert logger.of("train") == rows


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_second_evaluation_goes_on_counting(stage: str) -> None:
    trainer, logger = trainer_with(every=2)
    for _ in range(2):
        if stage == "predict":
            trainer.predict(Predicting(), loader(5))
        else:
            getattr(trainer, stage)(Net(), loader(5), verbose=False)
    assert logger.of(stage) == [(2, 2, False), (4, 4, True), (7, 7, False), (9, 9, True)]


def test_validations_of_one_epoch_share_an_x_axis_and_one_alone_begins_anew() -> None:
    trainer, logger = trainer_with(every=1, window=2, val_check_interval=2, max_epochs=1)
    trainer.fit(Net(), loader(4), loader(2))
    trainer.validate(Net(), loader(2), verbose=False)
    assert logger.of("validate") == [
        (1, 1, False),
        (2, 2, True),
        (3, 1, False),
        (4, 2, True),
        (1, 3, False),
        (2, 4, True),
    ]


class Predicting(Net):
    def forward(self, batch: Any) -> Any:
        return batch


def test_the_clock_is_read_when_something_is_logged_and_not_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    perf_counter = time.perf_counter

    def counting() -> float:
        nonlocal reads
        reads += 1
        return perf_counter()

    trainer, _ = trainer_with(every=10, max_epochs=1)
    monkeypatch.setattr("trainkit.callbacks.throughput_monitor.time.perf_counter", counting)
    trainer.fit(Net(), loader(40))
    assert reads == 1 + 1 + 4  # the start, the first batch, the four logs


def test_a_validation_does_not_count_in_the_time_of_the_training() -> None:
    class Slow(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time.sleep(0.2)

    trainer, logger = trainer_with(every=1)
    trainer.fit(Slow(), loader(2), loader(1))
    times = [row["train/time"] for _, row in logger.rows if "train/time" in row]
    assert times[-1] < 0.2
    assert times == sorted(times)


def test_operations_of_each_batch_are_added_up() -> None:
    class Growing(Net):
        @property
        def flops_per_batch(self) -> int:  # type: ignore[override]
            return 1000 if self.trainer.global_step > 3 else 10

    trainer, logger = trainer_with(every=3, max_epochs=1)  # measured after batches 1, 3, 6
    trainer.fit(Growing(), loader(6))
    row = logger.rows[-1][1]
    flops = row["train/device/flops_per_sec"] / row["train/device/batches_per_sec"] * 5
    assert flops == pytest.approx(2 * 10 + 3 * 1000, rel=1e-6)


def test_without_flops_per_batch_a_warning_says_what_to_set() -> None:
    class Plain(Module):
        training_step, validation_step = Net.training_step, Net.validation_step
        configure_optimizers = Net.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

    trainer, logger = trainer_with(every=1, max_epochs=1)
    with pytest.warns(UserWarning, match="Plain has no flops_per_batch"):
        trainer.fit(Plain(), loader(5))
    assert "train/device/flops_per_sec" not in logger.rows[-1][1]
    assert "train/device/samples_per_sec" in logger.rows[-1][1]


@pytest.mark.parametrize("settings", [{"every": 0}, {"every": 1, "logger": False}])
def test_without_logging_nothing_is_measured(settings: Any) -> None:
    trainer, logger = trainer_with(max_epochs=1, **settings)
    trainer.fit(Net(), loader(2), loader(2))
    assert logger.rows == []


def test_arguments_of_throughput_that_do_not_work_are_errors_at_construction() -> None:
    with pytest.raises(ValueError, match="window_size"):
        ThroughputMonitor(len, window_size=1)
    with pytest.raises(TypeError, match="colour"):
        ThroughputMonitor(len, colour="blue")


def test_the_peak_is_that_of_the_dtype_the_precision_computes_in() -> None:
    names = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    assert {name: compute_dtype(name) for name in names} == names
