"""Profiler: reports and their files, and what stands for "off"."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from trainkit import Module, Trainer
from trainkit.errors import MisconfigurationException
from trainkit.profiler import (
    AdvancedProfiler,
    PassThroughProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)

QUIET = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_epochs": 1,
    "limit_train_batches": 2,
    "limit_val_batches": 2,
    "log_every_n_steps": 1,
}
KINDS = [Profiler, PassThroughProfiler, SimpleProfiler, AdvancedProfiler, PyTorchProfiler]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> type[Profiler]:
    return request.param


class Counter(Profiler):
    """As a user would write it."""

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        self.counts: dict[str, int] = {}
        self.calls: list[Any] = []

    def start(self, action_name: str) -> None:
        self.counts[action_name] = self.counts.get(action_name, 0) + 1

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        self.calls.append(("setup", stage, local_rank, log_dir))

    def teardown(self, stage: str | None) -> None:
        self.calls.append(("teardown", stage))
        super().teardown(stage)

    def summary(self) -> str:
        return f"{sum(self.counts.values())} actions, 100% of them\n"


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("simple", SimpleProfiler),
        ("Simple", SimpleProfiler),
        ("advanced", AdvancedProfiler),
        ("pytorch", PyTorchProfiler),
        (None, PassThroughProfiler),
    ],
)
def test_a_name_is_short_for_an_object(given: str | None, made: type[Profiler]) -> None:
    assert type(Trainer(**QUIET, logger=False, profiler=given).profiler) is made


def test_an_object_is_taken_as_it_is(kind: type[Profiler]) -> None:
    profiler = kind()
    assert Trainer(**QUIET, logger=False, profiler=profiler).profiler is profiler


@pytest.mark.parametrize("given", ["fast", "", "xla", 1, True, object(), ["simple"]])
def test_anything_else_is_refused_when_the_trainer_is_made(given: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"profiler must be one of \['advanced', 'pytorch', 'simple'\]"):
        Trainer(**QUIET, logger=False, profiler=given)


def test_a_class_is_answered_with_what_was_forgotten() -> None:
    with pytest.raises(MisconfigurationException, match="forget the brackets"):
        Trainer(**QUIET, logger=False, profiler=SimpleProfiler)  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["dirpath", "filename"])
def test_paths_that_are_none_are_refused(kind: type[Profiler], argument: str) -> None:
    with pytest.raises(TypeError, match=f"{argument} must be a path or None. Received: 3"):
        kind(**{argument: 3})


def test_the_block_gets_the_name_and_errors_pass(kind: type[Profiler]) -> None:
    profiler = kind()
    with profiler.profile("outer") as outer, profiler.profile("inner") as inner:
        assert (outer, inner) == ("outer", "inner")
    with pytest.raises(ZeroDivisionError), profiler.profile("broken"):
        raise ZeroDivisionError
    with profiler.profile("broken"):  # it can be measured again
        pass
    profiler.describe()


def test_a_profiler_survives_pickling_in_the_middle_of_an_action(kind: type[Profiler], tmp_path: Path) -> None:
    profiler = kind(dirpath=tmp_path, filename="report")
    with profiler.profile("something"):
        copy = pickle.loads(pickle.dumps(profiler))
    profiler.describe()
    assert (type(copy), copy.dirpath, copy.filename) == (kind, tmp_path, "report")
    with copy.profile("else"):
        pass
    copy.describe()


def test_a_profiler_of_ones_own_hears_of_every_run(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    profiler = Counter(filename="counts")
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, profiler=profiler)
    module = TinyModule()
    trainer.fit(module, TinyData())
    trainer.test(module, TinyData(), verbose=False)
    log_dir = str(tmp_path / "lightning_logs" / "version_0")
    assert profiler.calls == [
        ("setup", "fit", None, log_dir),
        ("teardown", "fit"),
        ("setup", "test", None, log_dir),
        ("teardown", "test"),
    ]
    assert profiler.counts["run_training_batch"] == 2
    assert Path(log_dir, "fit-counts.txt").read_text().endswith("actions, 100% of them\n")
    assert Path(log_dir, "test-counts.txt").exists()


def test_a_report_is_written_behind_the_last_one(tmp_path: Path) -> None:
    profiler = Counter(tmp_path / "reports", "counts")
    for _ in range(2):
        profiler.start("something")
        profiler.describe()
    assert (tmp_path / "reports" / "counts.txt").read_text() == ("1 actions, 100% of them\n2 actions, 100% of them\n")


@pytest.mark.parametrize(("rank", "name"), [(None, "fit-a_b.txt"), (1, "fit-a_b-1.txt")])
def test_the_file_is_named_after_stage_and_process(tmp_path: Path, rank: int | None, name: str) -> None:
    profiler = Counter(tmp_path, "a/:b")
    profiler.setup("fit", local_rank=rank, log_dir="elsewhere")
    profiler.describe()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert profiler.local_rank == (rank or 0)


def test_without_a_file_rank_0_logs_the_report(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO):
        for rank in (0, 1):
            profiler = Counter(tmp_path)
            profiler.setup("fit", local_rank=rank)
            profiler.describe()
    assert caplog.messages == ["0 actions, 100% of them\n"]
    assert list(tmp_path.iterdir()) == []


def test_each_run_has_its_report_in_its_own_directory(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    profiler = SimpleProfiler(filename="times")
    for version in (0, 1):
        Trainer(**QUIET, default_root_dir=tmp_path, profiler=profiler).fit(TinyModule(), TinyData())
        run = tmp_path / "lightning_logs" / f"version_{version}"
        assert profiler.dirpath == str(run)
        assert (run / "fit-times.txt").read_text().startswith("FIT Profiler Report\n")


def test_users_code_is_measured_through_the_trainer(TinyModule: Any, TinyData: Any) -> None:
    class Measures(TinyModule):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with self.trainer.profiler.profile("loss of mine"):
                return self.loss(batch)

    off = Trainer(**QUIET, logger=False)
    off.fit(Measures(), TinyData())
    on = Trainer(**QUIET, logger=False, profiler="simple")
    on.fit(Measures(), TinyData())
    assert type(off.profiler) is PassThroughProfiler
    assert len(on.profiler.recorded_durations["loss of mine"]) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["simple", "advanced", "pytorch"])
def test_a_profiler_changes_no_result(name: str, TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    def trained(**settings: Any) -> tuple[Module, dict[str, Any]]:
        trainer = Trainer(
            **{**QUIET, "limit_train_batches": 7, "limit_val_batches": 6}, default_root_dir=tmp_path, **settings
        )
        module = TinyModule()
        trainer.fit(module, TinyData(shuffle=False))
        return module, dict(trainer.callback_metrics)

    plain, watched = trained(), trained(profiler=name)
    assert plain[1] == watched[1]
    for before, after in zip(plain[0].parameters(), watched[0].parameters(), strict=True):
        assert before.equal(after)
    assert [len(part._forward_hooks) for part in watched[0].modules()] == [0, 0]
