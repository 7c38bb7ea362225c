from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainkit import Module, Trainer
from trainkit.callbacks import ModelSummary, RichModelSummary
from trainkit.summary import summarize


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(4)))
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.features(batch).mean((2, 3))).mean() * self.scale

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(*callbacks: ModelSummary, times: int = 1, **settings: Any) -> None:
    trainer = Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=list(callbacks),
        **settings,
    )  # fmt: skip
    net = Net()
    for _ in range(times):
        trainer.fit(net, torch.utils.data.DataLoader(torch.ones(4, 1, 4, 4), batch_size=2))


def test_the_trainer_prints_it_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    fit()
    assert capsys.readouterr().out == str(summarize(Net())) + "\n"


def test_max_depth_0_and_enable_model_summary_false_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    fit(ModelSummary(max_depth=0))
    fit(enable_model_summary=False)
    assert capsys.readouterr().out == ""


def test_a_second_fit_of_the_same_model_prints_it_once(capsys: pytest.CaptureFixture[str]) -> None:
    fit(ModelSummary(), times=2)
    assert capsys.readouterr().out.count("layer") == 1


def test_outside_of_a_terminal_it_is_plain_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    fit(ModelSummary(max_depth=-1))
    text = capsys.readouterr().out
    assert text.isascii()
    assert "\x1b" not in text


@pytest.mark.parametrize("depth", [-2, 1.5, True, "1"])
def test_a_depth_that_means_nothing_is_an_error_at_construction(depth: Any) -> None:
    for kind in (ModelSummary, RichModelSummary):
        with pytest.raises(ValueError, match="max_depth must be -1"):
            kind(depth)


def test_summarize_can_be_overridden_and_prints_by_itself_or_returns_what_to_print(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Mine(ModelSummary):
        @staticmethod
        def summarize(
            summary_data: Any, total_parameters: int, trainable_parameters: int, model_size: float,
            total_training_modes: Any, **summarize_kwargs: Any,
        ) -> Any:  # fmt: skip
            assert [title for title, _ in summary_data] == [" ", "Name", "Type", "Params", "Mode"]
            assert summary_data[1][1] == ["features", "head", "(its own)"]
            assert (total_parameters, trainable_parameters) == (59, 59)
            assert total_training_modes == {"train": 6, "eval": 0}
            assert summarize_kwargs == {"total_flops": 0, "colour": "blue"}
            print("printed by itself")
            return f"{model_size * 1e6:.0f} bytes"

    fit(Mine(colour="blue"))
    assert capsys.readouterr().out == "printed by itself\n236 bytes\n"


def test_rich_draws_lines_around_it_and_outside_of_a_terminal_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    fit(RichModelSummary(max_depth=2))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\u2502 0 \u2502 features   \u2502 Sequential \u2502     48 \u2502 train \u2502" in text
    assert text.endswith("59 parameters, under 0.01 MB\nall trainable\n")
    assert max(map(len, text.splitlines())) <= 80


def test_a_rich_summary_takes_the_place_of_the_default_one(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(logger=False, callbacks=RichModelSummary(), enable_checkpointing=False)
    assert [type(c) for c in trainer.callbacks if isinstance(c, ModelSummary)] == [RichModelSummary]
