"""Every Trainer argument with values that can't be: refused when the Trainer is made, in words that name it."""

from __future__ import annotations

import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainkit import Trainer
from trainkit.checkpoint.io import CheckpointIO
from trainkit.errors import MisconfigurationException
from trainkit.precision import MixedPrecision, Precision

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Odd:
    """Something nobody expects."""

    def __repr__(self) -> str:
        return "Odd()"


NAN, INFINITE = float("nan"), float("inf")
NO_NUMBER: list[Any] = ["3", "", NAN, INFINITE, 1.5, True, [1], {"n": 1}, Odd(), torch.tensor(1), 1j]
NO_LIMIT: list[Any] = ["1", True, [1], Odd(), -1, -0.5, 1.5, NAN, INFINITE, -INFINITE, 1j]
NO_FLAG: list[Any] = ["yes", 1, 0, "True", NAN, [True], Odd()]

WRONG: dict[str, list[Any]] = {
    "accelerator": ["tpu", "", None, 1, ["cpu"]],
    "strategy": ["dpp", "", None, 1, ["auto"]],
    "devices": [0, -2, [], [0], True, None, 1.5, "two", 10**12],
    "gpus": [0, -1, "1", True, 1.5, NAN],
    "precision": ["fp16", 8, NAN, True, Odd(), torch.float16],
    "logger": ["tensorboard", 1, 0, Odd(), [True], Precision],
    "callbacks": ["EarlyStopping", 1, True, Odd(), [None], [Precision()], dict],
    "fast_dev_run": [-1, "yes", 1.5, NAN, INFINITE, [1], Odd()],
    "max_epochs": [*NO_NUMBER, -2, -(10**9)],
    "min_epochs": [*NO_NUMBER, -1],
    "max_steps": [*NO_NUMBER, -2, None],
    "min_steps": [*NO_NUMBER, -1],
    "max_time": ["1:00", "", 60, 1.5, True, NAN, {"hour": 1}, {"hours": NAN}, {"hours": -1}, timedelta(-1), [1]],
    "limit_train_batches": NO_LIMIT,
    "limit_val_batches": NO_LIMIT,
    "limit_test_batches": NO_LIMIT,
    "limit_predict_batches": NO_LIMIT,
    "overfit_batches": NO_LIMIT,
    "val_check_interval": [*NO_LIMIT, 0, 0.0, "1:00", {"hour": 1}, timedelta(seconds=-1)],
    "check_val_every_n_epoch": [*NO_NUMBER, 0, -1],
    "num_sanity_val_steps": [*NO_NUMBER, -2],
    "log_every_n_steps": [*NO_NUMBER, -1],
    "enable_checkpointing": NO_FLAG,
    "enable_progress_bar": NO_FLAG,
    "enable_model_summary": NO_FLAG,
    "num_nodes": [*NO_NUMBER, 0, -1, None],
    "profiler": ["fast", 1, Odd()],
    "compile": [
        "fast", "", "AUTO", 1, 0.5, ["auto"], Odd(), {"speed": 1}, {"mode": "auto"}, {"mode": 1}, {"backend": 3},
        {"dynamic": "yes"}, {"fullgraph": 1}, {"options": []}, {"mode": "default", "options": {"a": 1}},
        {"backend": "none"},
    ],
    "fused_optimizers": NO_FLAG,
    "matmul_precision": ["low", "", "HIGH", 32, True, ["high"]],
    "channels_last": NO_FLAG,
    "barebones": NO_FLAG,
    "plugins": ["fp8", 1, Odd(), [Odd()]],
    "sync_batchnorm": NO_FLAG,
    "use_distributed_sampler": NO_FLAG,
    "keep_batch": ["global", "", True, 1, ["all"]],
    "enable_autolog_hparams": NO_FLAG,
    "watchdog": ["30", 0, 0.0, -1, NAN, INFINITE, timedelta(0), timedelta(-1), [1], Odd(), 1j],
    "model_registry": ["mine", 1],
    "accumulate_grad_batches": [*NO_NUMBER, 0, -1, None],
    "gradient_clip_val": ["1", True, NAN, [1], Odd(), 1j],
    "gradient_clip_algorithm": ["max", "", "NORM", 2, True, ["norm"]],
    "deterministic": ["error", *NO_FLAG[1:]],
    "benchmark": NO_FLAG,
    "inference_mode": NO_FLAG,
    "detect_anomaly": NO_FLAG,
    "nan_policy": ["stop", "SKIP", True, 1, ["skip"]],
    "reload_dataloaders_every_n_epochs": [*NO_NUMBER, -1, None],
    "default_root_dir": [5, True, b"runs", ["runs"], Odd(), NAN],
}  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "value"),
    [(argument, value) for argument, values in WRONG.items() for value in values],
    ids=lambda value: value if isinstance(value, str) and value in WRONG else repr(value)[:30],
)
def test_a_wrong_value_is_refused_in_words_that_name_the_argument(argument: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=argument) as caught:
        Trainer(**{**QUIET, argument: value})
    message = str(caught.value)
    assert len(message) > 40, message
    assert message.endswith((".", "Did you forget the brackets?")), message


def test_every_argument_is_in_the_table() -> None:
    assert WRONG.keys() == inspect.signature(Trainer).parameters.keys()


RIGHT: dict[str, list[Any]] = {
    "strategy": ["auto", "single_device", "ddp"],
    "fast_dev_run": [True, False, 0, 1, 7],
    "max_epochs": [None, -1, 0, 1, 10**12],
    "min_epochs": [None, 0, 3],
    "max_steps": [-1, 0, 5],
    "min_steps": [None, 0, 3],
    "max_time": [None, "00:00:10:00", timedelta(hours=1), {"minutes": 1.5}],
    "limit_train_batches": [None, 0, 0.0, 1, 1.0, 0.5, 10**9],
    "overfit_batches": [None, 0, 0.0, 3, 0.25],
    "val_check_interval": [None, 1, 0.25, 1.0, "00:00:10:00", {"minutes": 1}, timedelta(minutes=1)],
    "check_val_every_n_epoch": [1, 5],
    "num_sanity_val_steps": [None, -1, 0, 5],
    "log_every_n_steps": [None, 0, 1, 1000],
    "num_nodes": [1, 2],
    "profiler": [None],
    "compile": [None, False, True, "auto", "default", "max-autotune", {}, {"mode": None}, {"dynamic": False}],
    "fused_optimizers": [True, False, None],
    "matmul_precision": [None, "highest", "high", "medium"],
    "channels_last": [True, False, None],
    "barebones": [False],
    "plugins": [None, [], CheckpointIO()],
    "sync_batchnorm": [True, False],
    "use_distributed_sampler": [True, False],
    "keep_batch": ["all", "each", None],
    "enable_autolog_hparams": [True, False],
    "model_registry": [None],
    "accumulate_grad_batches": [1, 8],
    "gradient_clip_val": [None, 0, 0.0, 1, 0.5, INFINITE],
    "gradient_clip_algorithm": [None, "norm", "value"],
    "benchmark": [None],
    "inference_mode": [True, False],
    "detect_anomaly": [True, False],
    "nan_policy": [None, "off", "raise", "skip"],
    "reload_dataloaders_every_n_epochs": [0, 2],
    "default_root_dir": [None, "", ".", "runs", Path("runs"), "~"],
    "callbacks": [None, [], ()],
}


@pytest.mark.parametrize(
    ("argument", "value"),
    [(argument, value) for argument, values in RIGHT.items() for value in values],
    ids=lambda value: value if isinstance(value, str) and value in RIGHT else repr(value)[:30],
)
def test_a_right_value_is_taken(argument: str, value: Any) -> None:
    Trainer(**{**QUIET, argument: value})


def test_a_floating_point_number_of_numpy_is_a_fraction() -> None:
    assert Trainer(**QUIET, limit_val_batches=np.float64(0.5)).limit_val_batches == 0.5  # type: ignore[arg-type]


def test_counting_batches_across_epochs_needs_a_number_of_them() -> None:
    Trainer(**QUIET, check_val_every_n_epoch=None, val_check_interval=100)  # type: ignore[arg-type]
    Trainer(**QUIET, check_val_every_n_epoch=None, val_check_interval="00:00:10:00")  # type: ignore[arg-type]
    Trainer(**QUIET, check_val_every_n_epoch=None)  # type: ignore[arg-type]
    for interval in (0.5, 1.0):
        with pytest.raises(
            MisconfigurationException, match="check_val_every_n_epoch=None counts batches across epochs"
        ):
            Trainer(**QUIET, check_val_every_n_epoch=None, val_check_interval=interval)  # type: ignore[arg-type]


def test_the_clip_value_is_kept_as_it_was_given() -> None:
    for given in (None, 0, -1, 2, 0.5):
        assert Trainer(**QUIET, gradient_clip_val=given).gradient_clip_val == given  # type: ignore[arg-type]


def test_arguments_come_from_the_environment_unless_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "3")
    monkeypatch.setenv("PL_TRAINER_GRADIENT_CLIP_ALGORITHM", "value")
    monkeypatch.setenv("PL_TRAINER_NOTHING_OF_THE_KIND", "1")
    trainer = Trainer(**QUIET)  # type: ignore[arg-type]
    assert (trainer.max_epochs, trainer.gradient_clip_algorithm) == (3, "value")
    assert Trainer(**QUIET, max_epochs=5).max_epochs == 5  # type: ignore[arg-type]
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "many")
    with pytest.raises(MisconfigurationException, match=r"max_epochs must be a whole number\. Received: 'many'"):
        Trainer(**QUIET)  # type: ignore[arg-type]


def test_barebones_turns_off_what_costs_time_and_refuses_it_beside_itself() -> None:
    trainer = Trainer(accelerator="cpu", barebones=True)
    assert (trainer.loggers, trainer.callbacks) == ([], [])
    assert (trainer.num_sanity_val_steps, trainer.log_every_n_steps) == (0, 0)
    for argument, value in {
        "logger": True,
        "fast_dev_run": 1,
        "enable_progress_bar": True,
        "profiler": "simple",
    }.items():
        with pytest.raises(MisconfigurationException, match=f"{argument}=.* beside barebones=True"):
            Trainer(accelerator="cpu", barebones=True, **{argument: value})  # type: ignore[arg-type]


def test_plugins_bring_a_precision_and_a_place_for_checkpoints() -> None:
    class Elsewhere(CheckpointIO):
        pass

    precision, place = MixedPrecision("bf16-mixed"), Elsewhere()
    trainer = Trainer(**QUIET, plugins=[precision, place])  # type: ignore[arg-type]
    assert trainer.precision_plugin is precision
    assert trainer.precision == "bf16-mixed"
    assert trainer.checkpoint_io is place
    with pytest.raises(MisconfigurationException, match="both say the precision"):
        Trainer(**QUIET, precision="64-true", plugins=precision)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="plugins has two of a kind"):
        Trainer(**QUIET, plugins=[place, Elsewhere()])  # type: ignore[arg-type]


def test_limits_that_are_left_out_are_lightnings() -> None:
    trainer = Trainer(**QUIET)  # type: ignore[arg-type]
    assert (trainer.max_epochs, trainer.max_steps, trainer.min_epochs, trainer.min_steps) == (None, -1, None, None)
    assert (trainer.limit_train_batches, trainer.overfit_batches, trainer.val_check_interval) == (1.0, 0.0, 1.0)
    assert (trainer.num_sanity_val_steps, trainer.log_every_n_steps, trainer.check_val_every_n_epoch) == (2, 50, 1)
    assert Trainer(**QUIET, overfit_batches=None).overfit_batches == 0.0  # type: ignore[arg-type]
    assert Trainer(**QUIET, max_steps=5).max_epochs == -1  # type: ignore[arg-type]
    assert Trainer(**QUIET, max_time="00:00:00:05").max_epochs == -1  # type: ignore[arg-type]
    assert Trainer(**QUIET, min_steps=5).min_epochs == 1  # type: ignore[arg-type]


def test_a_whole_float_above_one_is_a_number_of_batches() -> None:
    trainer = Trainer(**QUIET, limit_train_batches=2.0, limit_val_batches=1e6, overfit_batches=3.0)  # type: ignore[arg-type]
    limits = (trainer.limit_train_batches, trainer.limit_val_batches, trainer.overfit_batches)
    assert limits == (2, 1_000_000, 3)
    assert all(type(limit) is int for limit in limits)


def test_a_root_folder_is_absolute_and_may_begin_at_home() -> None:
    assert Trainer(**QUIET, default_root_dir="~/runs").default_root_dir == str(Path.home() / "runs")  # type: ignore[arg-type]
    assert Trainer(**QUIET).default_root_dir == str(Path.cwd())  # type: ignore[arg-type]


def test_switches_of_torch_are_set_and_may_be_left_alone() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        Trainer(**QUIET, deterministic=True, benchmark=True)  # type: ignore[arg-type]
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark  # what benchmark tries is not deterministic
        Trainer(**QUIET)  # type: ignore[arg-type]
        assert torch.are_deterministic_algorithms_enabled()
        Trainer(**QUIET, deterministic="warn")  # type: ignore[arg-type]
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        Trainer(**QUIET, deterministic=False, benchmark=True)  # type: ignore[arg-type]
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def test_nan_is_not_a_number_of_anything() -> None:
    for argument in inspect.signature(Trainer).parameters:
        with pytest.raises((ValueError, TypeError), match=argument):
            Trainer(**{**QUIET, argument: NAN})
