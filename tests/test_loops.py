"""Lightning's names for the loops: what they count and keep."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from trainkit import Module, Trainer
from trainkit.lightning.demos import BoringModel

BARE = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@pytest.mark.parametrize("batches", [1, 2])
def test_the_index_of_a_batch_stays_until_the_next_one_begins(batches: int) -> None:
    seen: list[tuple[str, int, int]] = []

    class Notes(BoringModel):
        def note(self, where: str) -> None:
            loop = self.trainer.fit_loop
            seen.append((where, loop.epoch_loop.batch_idx, loop.total_batch_idx))

        def on_train_start(self) -> None:
            self.note("start")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.note("step")
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.note("end")

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.note("validation")

        def on_train_epoch_end(self) -> None:
            self.note("epoch end")

    trainer = Trainer(**BARE, max_epochs=2, limit_train_batches=batches, limit_val_batches=1)
    trainer.fit(Notes())
    expected = [("start", -1, -1)]
    for epoch in range(2):
        for index in range(batches):
            expected += [(where, index, epoch * batches + index) for where in ("step", "end")]
        last = (batches - 1, epoch * batches + batches - 1)
        expected += [("validation", *last), ("epoch end", *last)]
    assert seen == expected
    assert (trainer.fit_loop.batch_idx, trainer.fit_loop.total_batch_idx) == (batches - 1, 2 * batches - 1)


def test_the_loop_keeps_what_predict_returned() -> None:
    class Counts(BoringModel):
        def predict_step(self, batch: Any, batch_idx: int) -> int:
            return batch_idx

    trainer = Trainer(**BARE, limit_predict_batches=2)
    assert trainer.predict(Counts()) == trainer.predict_loop.predictions == [0, 1]
    assert trainer.predict(Counts(), return_predictions=False) is None
    assert trainer.predict_loop.predictions == []


def test_a_predict_step_with_an_iterator_goes_through_several_loaders() -> None:
    class Takes(Module):
        def predict_step(self, dataloader_iter: Any) -> Any:
            return next(dataloader_iter)

    trainer = Trainer(**BARE, limit_predict_batches=2)
    both = trainer.predict(Takes(), [itertools.count(), itertools.count(5)])
    assert both == [[(0, 0, 0), (1, 1, 0)], [(5, 0, 1), (6, 1, 1)]]


@pytest.mark.parametrize("name", ["predict_step", "forward"])
def test_predicting_with_nothing_is_refused(name: str) -> None:
    module = BoringModel()
    setattr(module, name, None)
    with pytest.raises(ValueError, match="has None for predict_step or forward"):
        Trainer(**BARE).predict(module, [torch.ones(1, 32)])
