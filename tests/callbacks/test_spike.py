from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from trainkit import Module, Trainer
from trainkit.callbacks import ModelCheckpoint, SpikeDetection
from trainkit.callbacks.spike import TrainingSpikeException


class Scripted(Module):
    """Its losses are the ones it is given."""

    def __init__(self, losses: list[float], as_dict: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.losses, self.as_dict = losses, as_dict

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.weight.sum() * 0 + self.losses[int(batch)]
        return {"loss": loss} if self.as_dict else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def loader(length: int) -> DataLoader[Any]:
    return DataLoader(torch.arange(length))  # type: ignore[arg-type]


def fit(losses: list[float], root: Path, callbacks: Any, epochs: int = 1, **settings: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs, logger=False, callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=None if isinstance(callbacks, list) else False, accelerator="cpu", default_root_dir=root,
    )  # fmt: skip
    trainer.fit(Scripted(losses, settings.pop("as_dict", False)), loader(len(losses)), **settings)
    return trainer


FALLING = [1.0, 0.5, 0.33, 0.25]


@pytest.mark.parametrize(
    ("losses", "settings"),
    [
        ([*FALLING, 10.0], {}),
        ([*FALLING, math.inf], {}),
        ([*FALLING, math.inf], {"finite_only": False}),
        ([*FALLING, -math.inf], {}),
        ([*FALLING, math.nan], {}),
        ([-loss for loss in FALLING] + [-10.0], {"mode": "max"}),
        ([*FALLING, 10.0], {"warmup": 4}),
        ([*FALLING, 0.7], {"rtol": 1.0, "window": 2}),
        ([*FALLING, 0.9], {"rtol": None, "atol": 0.3}),
        ([*FALLING, 0.3], {"rtol": None}),
        ([math.nan, 1.0, 1.0, 1.0, 5.0], {}),
    ],
)
def test_a_jump_ends_the_run_and_notes_the_batch_and_the_one_before(
    losses: list[float], settings: dict[str, Any], tmp_path: Path
) -> None:
    detection = SpikeDetection(**settings)
    with pytest.raises(TrainingSpikeException, match="batch 4") as caught:
        fit([*losses, 0.1], tmp_path, detection)
    assert caught.value.batch_idx == 4
    assert json.loads((tmp_path / "skip_batches.json").read_text()) == detection.bad_batches == [3, 4]


@pytest.mark.parametrize(
    ("losses", "settings"),
    [
        ([*FALLING, 0.6], {}),
        ([*FALLING, -math.inf], {"finite_only": False}),
        ([*FALLING, math.nan], {"finite_only": False}),
        ([*FALLING, 10.0], {"mode": "max"}),
        ([*FALLING, 10.0], {"warmup": 5}),
        ([*FALLING, 0.7], {"rtol": 1.0, "window": 4}),
        ([*FALLING, 0.9], {"rtol": 0.1, "atol": 0.5}),
        ([5.0, 1.0], {"warmup": 0}),
    ],
)
def test_what_is_near_the_mean_or_better_or_in_the_warmup_is_no_spike(
    losses: list[float], settings: dict[str, Any], tmp_path: Path
) -> None:
    fit([*losses, 0.1], tmp_path, SpikeDetection(**settings))
    assert list(tmp_path.iterdir()) == []


def test_a_loss_in_a_dict_is_found_and_the_mean_goes_on_over_epochs(tmp_path: Path) -> None:
    detection = SpikeDetection(window=3)
    fit([2.0, 1.0], tmp_path, detection, epochs=2, as_dict=True)
    assert detection.state_dict()["running"] == [1.0, 2.0, 1.0]
    assert detection.last_val == 1.0


@pytest.mark.parametrize(("path", "file"), [("a/b", "a/b/skip_batches.json"), ("mine.json", "mine.json")])
def test_the_file_goes_where_it_is_wanted(path: str, file: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingSpikeException):
        fit([1.0, 9.0], tmp_path, SpikeDetection(exclude_batches_path=tmp_path / path))
    assert json.loads((tmp_path / file).read_text()) == [0, 1]


def test_a_resumed_run_judges_by_the_losses_before(tmp_path: Path) -> None:
    losses = [*FALLING, 0.9, 0.2]

    def callbacks() -> list[Any]:
        return [
            SpikeDetection(rtol=1.0, window=3, warmup=5, exclude_batches_path=tmp_path),
            ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1),
        ]

    whole, again = callbacks(), callbacks()
    fit(losses, tmp_path, whole)
    fit(losses, tmp_path, again, ckpt_path=tmp_path / "step=3.ckpt")
    assert again[0].state_dict() == whole[0].state_dict()
    assert again[0].state_dict()["running"] == pytest.approx([0.25, 0.9, 0.2])


def test_a_state_has_the_settings_too() -> None:
    first = SpikeDetection(mode="max", warmup=7, atol=1.0, rtol=None, exclude_batches_path="here")
    first.bad_batches = [3, 4]
    second = SpikeDetection()
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert (second.mode, second.warmup, second.atol, second.rtol) == ("max", 7, 1.0, None)


@pytest.mark.parametrize("settings", [{"mode": "least"}, {"window": 0}])
def test_settings_that_can_not_work_are_errors_at_construction(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SpikeDetection(**settings)


def test_something_else_than_a_loss_is_a_type_error() -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(TypeError, match="Received: list"):
        SpikeDetection().on_train_batch_end(trainer, Scripted([]), [1.0], None, 0)
