from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainkit import Module, Trainer
from trainkit.callbacks import ModelSummary
from trainkit.callbacks.summary import summarize


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


def test_the_table_lists_layers_parameters_modes_and_totals() -> None:
    net = Net()
    net.head.eval()
    assert str(summarize(net)) == (
        "layer      type        parameters  mode\n"
        "features   Sequential          48  train\n"
        "head       Linear              10  eval\n"
        "(its own)                       1\n"
        "total                          59  under 0.01 MB\n"
        "all trainable"
    )


def test_deeper_layers_are_indented() -> None:
    assert str(summarize(Net(), max_depth=-1)) == (
        "layer      type         parameters  mode\n"
        "features   Sequential           48  train\n"
        "  0        Conv2d               40  train\n"
        "  1        ReLU                  0  train\n"
        "  2        Sequential            8  train\n"
        "    0      BatchNorm2d           8  train\n"
        "head       Linear               10  train\n"
        "(its own)                        1\n"
        "total                           59  under 0.01 MB\n"
        "all trainable"
    )
    assert [layer.name for layer in summarize(Net(), max_depth=2).layers] == [
        "features", "features.0", "features.1", "features.2", "head", "(its own)",
    ]  # fmt: skip


def test_frozen_parameters_are_told_apart_in_the_totals() -> None:
    net = Net()
    net.head.requires_grad_(False)
    summary = summarize(net)
    assert (summary.total_parameters, summary.trainable_parameters, summary.non_trainable_parameters) == (59, 49, 10)
    assert "49 trainable, 10 non-trainable" in str(summary)
    assert "none trainable" in str(summarize(net.head))


def test_shared_parameters_count_once_in_the_totals() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    summary = summarize(nn.Sequential(first, second))
    assert [layer.parameters for layer in summary.layers] == [72, 72]
    assert summary.total_parameters == 80


def test_lazy_layers_are_listed_without_a_count() -> None:
    summary = summarize(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)))
    assert summary.total_parameters == 12
    assert "not known yet" in str(summary)
    assert str(summary).endswith("lazy layers get their parameters, and count, with the first batch")


def test_the_size_is_in_megabytes_of_the_parameters_own_precision() -> None:
    assert summarize(nn.Linear(1000, 1000, bias=False)).megabytes == 4.0
    assert "4.0 MB" in str(summarize(nn.Linear(1000, 1000, bias=False)))
    assert summarize(nn.Linear(1000, 1000, bias=False).half()).megabytes == 2.0


def test_long_names_keep_the_table_within_80_columns() -> None:
    class LayerWithAVeryLongNameThatNobodyWouldType(nn.Linear):
        pass

    net = nn.Module()
    net.add_module("an_extraordinarily_long_name_for_a_layer", LayerWithAVeryLongNameThatNobodyWouldType(1000, 1000))
    assert max(map(len, str(summarize(net)).splitlines())) <= 80


@pytest.mark.parametrize("depth", [-2, 1.5, True, "1"])
def test_a_depth_that_means_nothing_is_an_error_at_construction(depth: Any) -> None:
    with pytest.raises(ValueError, match="max_depth must be -1"):
        ModelSummary(depth)
    with pytest.raises(ValueError, match="max_depth must be -1"):
        summarize(nn.Linear(1, 1), depth)


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
