"""The range test's numbers: which rates, which losses, and what is suggested."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from trainkit import Trainer
from trainkit.errors import MisconfigurationException
from trainkit.lr_range import LRFinder
from trainkit.tune import Tuner


@pytest.fixture(name="trainer")
def quiet_trainer() -> Trainer:
    return Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip


def test_losses_are_those_of_a_loop_written_by_hand(TinyModule: Any, TinyData: Any, trainer: Trainer) -> None:
    finder = Tuner(trainer).lr_find(TinyModule(), datamodule=TinyData(), num_training=20, early_stop_threshold=None)
    module = TinyModule()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-8)
    batches = list(TinyData().train_dataloader())
    mean, losses, rates = 0.0, [], []
    for update in range(20):
        rates.append(1e-8 if update == 0 else 1e-8 * (1 / 1e-8) ** ((update + 1) / 20))
        optimizer.param_groups[0]["lr"] = rates[-1]
        x, y = batches[update % 8]
        loss = mse_loss(module.line(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = 0.98 * mean + (1 - 0.98) * loss.item()
        losses.append(mean / (1 - 0.98 ** (update + 2)))
    assert finder is not None
    assert finder.results == {"lr": rates, "loss": losses}


@pytest.mark.parametrize(("mode", "middle"), [("linear", 0.6), ("exponential", 0.01 * 100**0.6)])
def test_rates_go_from_the_first_to_the_last(mode: str, middle: float) -> None:
    finder = LRFinder(mode, 0.01 if mode == "exponential" else 0.0, 1.0, 5)
    rates = [finder.rate(update) for update in range(5)]
    assert rates[0] == finder.lr_min
    assert rates[2] == pytest.approx(middle)
    assert rates[4] == pytest.approx(1.0)


@pytest.mark.parametrize(("accumulate", "updates"), [(1, 30), (3, 30)])
def test_every_update_has_one_rate_and_one_loss(
    TinyModule: Any, TinyData: Any, accumulate: int, updates: int, trainer: Trainer
) -> None:
    trainer.accumulate_grad_batches = accumulate
    finder = Tuner(trainer).lr_find(
        TinyModule(), datamodule=TinyData(), num_training=updates, early_stop_threshold=None, max_lr=1e-3
    )  # more than the Trainer's one epoch has
    assert finder is not None
    assert len(finder.results["lr"]) == len(finder.results["loss"]) == updates


def test_it_stops_when_the_loss_is_far_above_its_best(TinyModule: Any, TinyData: Any, trainer: Trainer) -> None:
    finder = Tuner(trainer).lr_find(TinyModule(), datamodule=TinyData(), max_lr=1e6)
    assert finder is not None
    losses = finder.results["loss"]
    assert 10 < len(losses) < 100
    assert losses[-1] > 4 * min(losses) >= losses[-2]


@pytest.mark.filterwarnings("ignore:a batch is skipped")
def test_updates_without_a_loss_are_nan_and_are_not_looked_at(TinyModule: Any, TinyData: Any, trainer: Trainer) -> None:
    class SkipsSome(TinyModule):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 4 == 3 else super().training_step(batch, batch_idx)

    finder = Tuner(trainer).lr_find(SkipsSome(), datamodule=TinyData(), num_training=40, max_lr=0.1)
    assert finder is not None
    assert [math.isnan(loss) for loss in finder.results["loss"]] == [False, False, False, True] * 10
    assert finder.suggestion() in finder.results["lr"]


def test_the_steepest_descent_is_suggested() -> None:
    finder = LRFinder("linear", 0.0, 1.0, 8)
    finder.results = {"lr": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "loss": [9.0, 9.0, 8.0, 4.0, 3.0, math.inf, 50.0]}
    assert finder.suggestion(skip_begin=0, skip_end=2) == 2.0
    assert finder.suggestion(skip_begin=3, skip_end=0) == 3.0  # the infinite loss is passed over
    finder.results = {"lr": [0.0, 1.0, 2.0], "loss": [5.0, 1.0, 0.0]}
    assert finder.suggestion(skip_begin=0, skip_end=0) == 0.0  # the first one may be it


@pytest.mark.parametrize("losses", [[], [1.0], [1.0, math.nan], [math.nan] * 5])
def test_no_suggestion_follows_from_fewer_than_two_losses(losses: list[float], caplog: Any) -> None:
    finder = LRFinder("exponential", 1e-8, 1.0, 100)
    finder.results = {"lr": [0.1 * index for index in range(len(losses))], "loss": losses}
    with caplog.at_level(logging.ERROR):
        assert finder.suggestion(skip_begin=0, skip_end=0) is None
    assert "no learning rate can be suggested" in caplog.text
    assert "num_training" in caplog.text


def test_a_plot_shows_the_losses_and_marks_the_suggestion() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    finder = LRFinder("exponential", 1e-4, 1.0, 14)
    rates = [finder.rate(update) for update in range(14)]
    finder.results = {"lr": rates, "loss": [9.0] * 10 + [8.0, 3.0, 1.0, 1.0]}
    figure = finder.plot(suggest=True)
    assert figure is not None
    curve, point = figure.axes[0].lines
    assert list(curve.get_xdata()) == rates
    assert list(point.get_xdata()) == [finder.suggestion()]
    assert figure.axes[0].get_xscale() == "log"
    axes = matplotlib.figure.Figure().add_subplot()
    finder.mode = "linear"
    assert finder.plot(ax=axes) is axes.figure
    assert (axes.get_xscale(), len(axes.lines)) == ("linear", 1)
    matplotlib.pyplot.close("all")


def test_one_optimizer_is_needed(TinyModule: Any, TinyData: Any, trainer: Trainer) -> None:
    class Several(TinyModule):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    class Without(TinyModule):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return None

    with pytest.raises(MisconfigurationException, match=r"needs one optimizer.* returned 2"):
        Tuner(trainer).lr_find(Several(), datamodule=TinyData())
    with pytest.warns(UserWarning, match="will not be updated"):  # noqa: SIM117 - it must not hide the error
        with pytest.raises(MisconfigurationException, match=r"needs one optimizer.* returned 0"):
            Tuner(trainer).lr_find(Without(), datamodule=TinyData())


def test_training_batches_are_needed(TinyModule: Any, TinyData: Any, trainer: Trainer) -> None:
    trainer.limit_train_batches = 0
    with pytest.raises(MisconfigurationException, match="limit_train_batches=0"):
        Tuner(trainer).lr_find(TinyModule(), datamodule=TinyData())


def test_manual_optimization_gets_the_rates_too(TinyModule: Any, TinyData: Any, trainer: Trainer) -> None:
    class Manual(TinyModule):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer, loss = self.optimizers(), self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return {"loss": loss}

    automatic = Tuner(trainer).lr_find(TinyModule(), datamodule=TinyData(), num_training=20)
    manual = Tuner(trainer).lr_find(Manual(), datamodule=TinyData(), num_training=20)
    assert automatic is not None
    assert manual is not None
    assert manual.results == automatic.results
