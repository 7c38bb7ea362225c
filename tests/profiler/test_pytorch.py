"""PyTorchProfiler: operators and labels, which steps are recorded, and the files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerAction, ProfilerActivity

from trainkit import Callback, Trainer
from trainkit.errors import MisconfigurationException
from trainkit.profiler import PyTorchProfiler
from trainkit.profiler.pytorch import default_schedule

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def labels(profiler: PyTorchProfiler) -> Counter[str]:
    """Return how often each of trainkit's labels was recorded."""
    events = profiler.function_events or []
    return Counter(event.name.split("]", 2)[2] for event in events if event.name.startswith("[pl]"))


def steps(profiler: PyTorchProfiler) -> dict[str, int]:
    """Return how many steps of each kind were recorded."""
    found = labels(profiler)
    return {
        kind: count
        for kind in ("training_step", "validation_step", "test_step", "predict_step")
        if (count := found[f"[LightningModule]TinyModule.{kind}"])
    }


def traces(directory: Path) -> list[str]:
    return sorted(path.name.split(".1")[0] for path in directory.glob("*.pt.trace.json"))


def test_outside_of_a_run_everything_is_recorded(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path, "nested")
    with profiler.profile("a"):
        ones = torch.ones(42)
        with profiler.profile("b"):
            zeros = torch.zeros(42)
        with profiler.profile("training_step"):
            _ = ones + zeros
    profiler.describe()
    assert profiler.function_events is not None
    names = {event.name for event in profiler.function_events}
    assert {"[pl][profile]a", "[pl][profile]b", "aten::ones", "aten::zeros", "aten::add"} <= names
    report = (tmp_path / "nested.txt").read_text()
    assert report.startswith("Profiler Report\nProfile stats for: records\n")
    assert "aten::add" in report


def test_a_schedule_picks_steps_of_every_kind_by_itself(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path)
    trainer = Trainer(**{**QUIET, "num_sanity_val_steps": 2}, max_epochs=2, profiler=profiler)
    trainer.fit(TinyModule(), TinyData())
    assert steps(profiler) == {"training_step": 3, "validation_step": 3}
    assert traces(tmp_path) == [
        "fit-[Strategy]SingleDeviceStrategy.training_step",
        "fit-[Strategy]SingleDeviceStrategy.validation_step",
    ]
    trainer.test(TinyModule(), TinyData(), verbose=False)
    assert steps(profiler) == {"test_step": 3}
    assert traces(tmp_path)[-1] == "test-[Strategy]SingleDeviceStrategy.test_step"


def test_a_run_too_short_for_the_schedule_is_recorded_as_a_whole(
    TinyModule: Any, TinyData: Any, tmp_path: Path
) -> None:
    profiler = PyTorchProfiler(tmp_path)
    trainer = Trainer(**QUIET, max_epochs=1, profiler=profiler)
    with pytest.warns(UserWarning, match=r"training_step runs 4 times only, so all are recorded"):
        trainer.fit(TinyModule(), TinyData(num_batches=4))
    assert steps(profiler) == {"training_step": 4, "validation_step": 4}


def test_five_steps_in_several_epochs_are_enough(TinyModule: Any, TinyData: Any) -> None:
    profiler = PyTorchProfiler(export_to_chrome=False)
    Trainer(**QUIET, max_epochs=3, limit_val_batches=0, profiler=profiler).fit(TinyModule(), TinyData(num_batches=2))
    assert steps(profiler) == {"training_step": 3}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (None, {"training_step": 8, "validation_step": 8}),
        (torch.profiler.schedule(wait=1, warmup=1, active=1, repeat=1), {"training_step": 1, "validation_step": 1}),
        (torch.profiler.schedule(wait=2, warmup=1, active=1, repeat=2), {"training_step": 2, "validation_step": 2}),
        (torch.profiler.schedule(wait=0, warmup=1, active=3, repeat=2), {"training_step": 6, "validation_step": 6}),
    ],
)
def test_a_schedule_of_ones_own_is_kept_to(
    TinyModule: Any, TinyData: Any, schedule: Callable[[int], ProfilerAction] | None, expected: dict[str, int]
) -> None:
    profiler = PyTorchProfiler(export_to_chrome=False, schedule=schedule)
    Trainer(**QUIET, max_epochs=1, profiler=profiler).fit(TinyModule(), TinyData())
    assert steps(profiler) == expected


def test_validation_inside_a_window_leaves_the_window_alone(TinyModule: Any, TinyData: Any) -> None:
    profiler = PyTorchProfiler(export_to_chrome=False)
    trainer = Trainer(**QUIET, max_epochs=1, val_check_interval=3, limit_val_batches=2, profiler=profiler)
    with pytest.warns(UserWarning, match="validation_step runs 2 times only"):
        trainer.fit(TinyModule(), TinyData())
    assert steps(profiler)["training_step"] == 3


def test_submodules_are_labelled_while_it_is_on_only(TinyModule: Any, TinyData: Any) -> None:
    for record, expected in ((True, 3), (False, 0)):
        profiler = PyTorchProfiler(export_to_chrome=False, record_module_names=record)
        module = TinyModule()
        Trainer(**QUIET, max_epochs=1, limit_val_batches=0, profiler=profiler).fit(module, TinyData())
        assert labels(profiler)["torch.nn.modules.linear.Linear: line"] == expected
        assert not module.line._forward_hooks
        assert not module.line._forward_pre_hooks


def test_the_trace_is_one_that_chrome_and_tensorboard_read(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    Trainer(
        **{**QUIET, "logger": True},
        default_root_dir=tmp_path, max_epochs=1, limit_val_batches=0, log_every_n_steps=1,
        profiler=PyTorchProfiler(filename="ops", record_shapes=True, group_by_input_shapes=True),
    ).fit(TinyModule(), TinyData())  # fmt: skip
    run = tmp_path / "lightning_logs" / "version_0"
    (trace,) = run.glob("fit-ops-*training_step.*.pt.trace.json")
    recorded = json.loads(trace.read_text())
    names = {event["name"] for event in recorded["traceEvents"] if "name" in event}
    assert "[pl][profile][LightningModule]TinyModule.training_step" in names
    assert recorded["Framework"] == "trainkit"
    report = (run / "fit-ops.txt").read_text()
    assert report.startswith("FIT Profiler Report\nProfile stats for: records\n")
    assert "Input Shapes" in report


def test_stacks_are_written_for_flame_graphs(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path, with_stack=True, export_to_flame_graph=True, export_to_chrome=False)
    Trainer(**QUIET, max_epochs=1, limit_val_batches=0, profiler=profiler).fit(TinyModule(), TinyData())
    assert [path.name for path in tmp_path.iterdir()] == ["fit-[Strategy]SingleDeviceStrategy.training_step.stack"]


def test_a_handler_of_ones_own_takes_the_place_of_the_files(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    ready: list[Any] = []
    profiler = PyTorchProfiler(tmp_path, on_trace_ready=ready.append)
    Trainer(**QUIET, max_epochs=1, limit_val_batches=0, profiler=profiler).fit(TinyModule(), TinyData())
    assert [type(each) for each in ready] == [torch.profiler.profile]
    assert list(tmp_path.iterdir()) == []
    assert steps(profiler) == {"training_step": 3}


def test_a_trace_without_a_place_is_told_of(TinyModule: Any, TinyData: Any) -> None:
    profiler = PyTorchProfiler()
    trainer = Trainer(**{**QUIET, "fast_dev_run": 5, "logger": True}, profiler=profiler)
    with pytest.warns(UserWarning, match="no directory for its trace"):
        trainer.fit(TinyModule(), TinyData())


def test_a_failed_run_leaves_nothing_on(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                raise ZeroDivisionError

    profiler = PyTorchProfiler(tmp_path)
    module = TinyModule()
    with pytest.raises(ZeroDivisionError):
        Trainer(**QUIET, max_epochs=1, profiler=profiler, callbacks=Fails()).fit(module, TinyData())
    assert not torch.autograd._profiler_enabled()  # type: ignore[no-untyped-call]
    assert not module.line._forward_hooks
    assert steps(profiler)["training_step"] == 2  # of three; the last two were under way
    Trainer(**QUIET, max_epochs=1, profiler=profiler).fit(module, TinyData())
    assert steps(profiler)["training_step"] == 3


def test_turned_off_it_records_nothing(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path, "ops", enabled=False)
    Trainer(**QUIET, max_epochs=1, profiler=profiler).fit(TinyModule(), TinyData())
    assert profiler.function_events is None
    assert list(tmp_path.iterdir()) == []


def test_the_default_schedule_is_torchs() -> None:
    torchs = torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)
    assert [default_schedule(step) for step in range(12)] == [torchs(step) for step in range(12)]


@pytest.mark.parametrize("schedule", ["fast", 3, lambda step: "RECORD"])
def test_a_schedule_that_is_none_is_refused(schedule: Any) -> None:
    with pytest.raises(MisconfigurationException, match="schedule must"):
        PyTorchProfiler(schedule=schedule)


def test_unknown_options_are_named() -> None:
    with pytest.raises(MisconfigurationException, match=r"sort_by_key must be one of .*Received: 'size'"):
        PyTorchProfiler(sort_by_key="size")
    with pytest.raises(KeyError, match="row_limit is an argument of the profiler"):
        PyTorchProfiler(table_kwargs={"row_limit": 3})
    with pytest.raises(KeyError, match="sort_by is an argument of the profiler: sort_by_key="):
        PyTorchProfiler(table_kwargs={"sort_by": "count"})
    with pytest.raises(KeyError, match="no option 'colour'"):
        PyTorchProfiler(table_kwargs={"colour": "red"})
    with pytest.warns(UserWarning, match="no option \\['memory'\\]"):
        PyTorchProfiler(memory=True)


@pytest.mark.parametrize("key", sorted(PyTorchProfiler.AVAILABLE_SORT_KEYS))
def test_reports_are_sorted_by_any_key_and_as_long_as_asked(key: str) -> None:
    profiler = PyTorchProfiler(
        sort_by_key=key, row_limit=1, table_kwargs={"max_name_column_width": 80}, profile_memory=True
    )
    with profiler.profile("a"):
        torch.ones(3) + torch.zeros(3)
    report = profiler.summary()
    rows = report.split("\n---")
    assert report.count("aten::") + report.count("[pl]") + report.count("ProfilerStep") == 1, rows


@pytest.mark.gpu
def test_on_a_gpu_its_kernels_are_recorded(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path)
    assert profiler.sort_by_key == "cuda_time_total"
    assert ProfilerActivity.CUDA in profiler.options["activities"]
    with profiler.profile("a"):
        torch.ones(300, 300, device="cuda") @ torch.ones(300, 300, device="cuda")
    assert "CUDA total" in profiler.summary()


@pytest.mark.gpu
def test_nvtx_ranges_are_emitted_without_a_report(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path, "ops", emit_nvtx=True)
    Trainer(**{**QUIET, "accelerator": "gpu", "devices": 1}, max_epochs=1, profiler=profiler).fit(
        TinyModule(), TinyData()
    )
    assert list(tmp_path.iterdir()) == []
    assert not torch.autograd._profiler_enabled()  # type: ignore[no-untyped-call]
