"""Norms of gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from trainkit import Trainer
from trainkit.gradients import grad_norm


@pytest.mark.parametrize("norm_type", [1, 2, 1.25, "2", "inf", math.inf])
def test_the_total_is_that_of_one_long_vector(norm_type: Any) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(1, 1))
    module[1](module[0](torch.randn(5, 3))).square().sum().backward()
    norms = grad_norm(module, norm_type, group_separator="-")
    kind = float(norm_type)
    assert list(norms) == [
        *(f"grad_{kind}_norm-{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")),
        f"grad_{kind}_norm_total",
    ]
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    torch.testing.assert_close(norms[f"grad_{kind}_norm-1.bias"], module[1].bias.grad.norm(kind))
    torch.testing.assert_close(norms[f"grad_{kind}_norm_total"], torch.cat([g.flatten() for g in gradients]).norm(kind))


def test_without_gradients_there_is_nothing() -> None:
    assert grad_norm(nn.Linear(1, 1), 2) == {}


@pytest.mark.parametrize("norm_type", [0, -1.5, "nan"])
def test_norms_that_are_none_are_refused(norm_type: Any) -> None:
    with pytest.raises(ValueError, match="norm_type must be above 0"):
        grad_norm(nn.Linear(1, 1), norm_type)


def test_a_module_can_log_them(TinyModule: Any, TinyData: Any) -> None:
    class Watched(TinyModule):  # type: ignore[misc]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log_dict(grad_norm(self, norm_type=2))

    off: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=1, accelerator="cpu", **off)
    trainer.fit(Watched(), datamodule=TinyData())
    assert trainer.callback_metrics["grad_2.0_norm_total"] > 0
