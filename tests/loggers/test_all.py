"""What every logger promises a run, whoever wrote it: one conformance suite over all of them."""

from __future__ import annotations

import copy
import pickle
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit import Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.loggers import (
    CSVLogger,
    DummyLogger,
    JSONLinesLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from trainkit.rank_zero import rank_zero_only

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(mlflow|wandb|pydantic|google).*")  # their own


class Recorder(Logger):
    """As a user would write one."""

    def __init__(self, save_dir: str | Path) -> None:
        self.folder = str(save_dir)
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.hparams: dict[str, Any] = {}
        self.ended: list[str] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    @property
    def save_dir(self) -> str:
        return self.folder

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None) -> None:
        self.hparams.update(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.ended.append(status)


def offline_wandb(path: Path) -> WandbLogger:
    return WandbLogger(save_dir=path, offline=True, settings={"silent": True, "x_disable_stats": True})


def local_mlflow(path: Path) -> MLFlowLogger:
    return MLFlowLogger(save_dir=path / "mlruns")


MAKERS: dict[str, Callable[[Path], Logger]] = {
    "base": lambda path: Logger(),
    "dummy": lambda path: DummyLogger(),
    "user": Recorder,
    "csv": CSVLogger,
    "json": JSONLinesLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": offline_wandb,
    "mlflow": local_mlflow,
}


@dataclass
class Options:
    rate: float = 0.1


QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "limit_train_batches": 3,
    "limit_val_batches": 2,
    "num_sanity_val_steps": 0,
}


@pytest.fixture(params=MAKERS)
def logger(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a new database takes it seconds; test_mlflow.py has one
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield MAKERS[request.param](tmp_path)
    if request.param == "wandb":
        import wandb

        wandb.finish()


def test_it_takes_every_call_of_a_run_and_every_form_of_hyper_parameters(logger: Logger) -> None:
    logger.check_writable()
    logger.log_hyperparams({"lr": 0.1, "nested": {"a": [1, 2], "b": None}, "tensor": torch.ones(2), "f": len})
    logger.log_hyperparams(Namespace(width=3, options=Options()), metrics={"loss": 1.0})
    logger.log_hyperparams({})
    logger.log_graph(torch.nn.Linear(1, 1))
    for step in range(3):
        logger.log_metrics({"loss": 0.5, "count": 3, "tensor": torch.tensor([2.0])}, step=step)
    logger.log_metrics({"loss": 0.5})
    logger.log_metrics({})
    logger.save()
    logger.sync()
    logger.after_save_checkpoint(ModelCheckpoint())
    logger.finalize("success")
    logger.log_metrics({"test_loss": 0.5}, step=3)  # fit, then test
    logger.finalize("failed")
    assert logger.group_separator == "/"


def test_its_copies_log_to_the_same_run(logger: Logger) -> None:
    for duplicate in (copy.deepcopy, lambda original: pickle.loads(pickle.dumps(original))):
        logger.log_metrics({"loss": 1.0}, step=0)
        twin = duplicate(logger)
        assert type(twin) is type(logger)
        assert (twin.name, twin.version, twin.save_dir) == (logger.name, logger.version, logger.save_dir)
        twin.log_metrics({"loss": 2.0}, step=1)
        assert twin.version == logger.version
        twin.finalize("success")


def test_it_changes_no_result(logger: Logger, TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    def trained(logger: Any) -> tuple[list[Any], dict[str, Any], Any]:
        torch.manual_seed(3)
        trainer = Trainer(**QUIET, max_epochs=2, logger=logger, default_root_dir=tmp_path, enable_checkpointing=False)
        module = TinyModule()
        trainer.fit(module, TinyData(shuffle=True))
        return list(module.parameters()), dict(trainer.callback_metrics), torch.rand(1)

    alone, logged = trained(False), trained(logger)
    assert all(a.equal(b) for a, b in zip(alone[0], logged[0], strict=True))
    assert alone[1:] == logged[1:]


def test_two_fits_and_a_test_in_a_row(logger: Logger, TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    trainer = Trainer(**QUIET, max_epochs=1, logger=logger, default_root_dir=tmp_path)
    module = TinyModule()
    trainer.fit(module, TinyData())
    assert trainer.logger is logger
    assert trainer.loggers == [logger]
    assert module.logger is logger
    first = (logger.name, logger.version)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, TinyData())
    trainer.test(module, TinyData(), verbose=False)
    assert (logger.name, logger.version) == first
    Trainer(**QUIET, max_epochs=1, logger=logger, default_root_dir=tmp_path).fit(TinyModule(), TinyData())


def test_checkpoints_lie_in_the_directory_of_the_run(
    logger: Logger, TinyModule: Any, TinyData: Any, tmp_path: Path
) -> None:
    trainer = Trainer(**QUIET, max_epochs=1, logger=logger, default_root_dir=tmp_path / "root")
    trainer.fit(TinyModule(), TinyData())
    version = logger.version
    folder = f"version_{version}" if isinstance(version, int) else version or ""
    expected = Path(logger.save_dir or tmp_path / "root", logger.name or "", folder, "checkpoints")
    assert Path(trainer.checkpoint_callback.dirpath) == expected.resolve()  # type: ignore[union-attr]
    assert [path.suffix for path in expected.iterdir()] == [".ckpt"]


def test_in_other_processes_it_does_nothing(logger: Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    logger.check_writable()
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    logger.finalize("success")
    logger.experiment.anything(1)["else"].works = True
    assert list(tmp_path.iterdir()) == []
    assert not isinstance(logger, Recorder) or logger.rows == []


def test_all_of_them_at_once(TinyModule: Any, TinyData: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = [Recorder(tmp_path), CSVLogger(tmp_path), JSONLinesLogger(tmp_path), TensorBoardLogger(tmp_path)]
    trainer = Trainer(**QUIET, max_epochs=1, logger=loggers)
    trainer.fit(TinyModule(lr=0.02), TinyData())
    recorder, table, lines, board = loggers
    assert recorder.hparams == {"lr": 0.02}  # type: ignore[attr-defined]
    assert [step for step, _ in recorder.rows] == [0, 1, 2, 2]  # type: ignore[attr-defined]
    assert recorder.ended == ["success"]  # type: ignore[attr-defined]
    assert table.log_dir == lines.log_dir == board.log_dir  # one directory for one run
    assert len(Path(table.log_dir or "", "metrics.csv").read_text().splitlines()) == 1 + 4
    assert len(Path(table.log_dir or "", "metrics.jsonl").read_text().splitlines()) == 4
    assert trainer.logger is recorder
    assert trainer.log_dir == str(tmp_path)  # the first logger decides


def test_a_trial_run_hears_of_a_stand_in_only(logger: Logger, TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", enable_progress_bar=False, fast_dev_run=2, logger=logger)
    trainer.fit(TinyModule(), TinyData())
    assert [type(each) for each in trainer.loggers] == [DummyLogger]
    assert trainer.logger.experiment.add_image("a", 3) is not logger  # type: ignore[union-attr]
    assert not isinstance(logger, Recorder) or logger.rows == []
    assert list(tmp_path.iterdir()) == []


def test_hyper_parameters_are_not_logged_if_the_trainer_is_told_so(
    TinyModule: Any, TinyData: Any, tmp_path: Path
) -> None:
    recorder = Recorder(tmp_path)
    Trainer(**QUIET, max_epochs=1, logger=recorder, enable_autolog_hparams=False).fit(TinyModule(), TinyData())
    assert recorder.hparams == {}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_hyper_parameters_are_logged_without_a_fit_too(
    TinyModule: Any, TinyData: Any, tmp_path: Path, stage: str
) -> None:
    recorder = Recorder(tmp_path)
    trainer = Trainer(**QUIET, logger=recorder)
    getattr(trainer, stage)(TinyModule(lr=0.3), TinyData(), verbose=False)
    assert recorder.hparams == {"lr": 0.3}


def test_a_failed_and_an_interrupted_run_are_told_apart(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    class Fails(TinyModule):  # type: ignore[misc, valid-type]
        def on_train_batch_end(self, *_: Any) -> None:
            raise self.error

    recorder = Recorder(tmp_path)
    for error in (ValueError, KeyboardInterrupt):
        module = Fails()
        module.error = error
        with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
            Trainer(**QUIET, max_epochs=1, logger=recorder, enable_checkpointing=False).fit(module, TinyData())
    assert recorder.ended == ["failed", "interrupted"]


def test_what_is_logged_after_a_fit_comes_behind_it(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    trainer = Trainer(**QUIET, max_epochs=1, logger=recorder)
    module = TinyModule()
    trainer.fit(module, TinyData())
    recorder.rows.clear()
    trainer.validate(module, TinyData(), verbose=False)
    trainer.test(module, TinyData(), verbose=False)
    assert [step for step, _ in recorder.rows] == [3, 3]


@pytest.mark.parametrize("given", [3, "csv", CSVLogger, [CSVLogger], [None], object()], ids=str)
def test_what_is_no_logger_is_refused_when_the_trainer_is_made(given: Any) -> None:
    with pytest.raises(TypeError, match=r"logger must be True, False, or Logger objects\. Received"):
        Trainer(accelerator="cpu", logger=given)


@pytest.mark.parametrize("several", [tuple, iter, lambda loggers: dict(enumerate(loggers)).values()])
def test_several_loggers_come_in_anything_that_holds_them(several: Callable[..., Any], tmp_path: Path) -> None:
    loggers = [Recorder(tmp_path), CSVLogger(tmp_path)]
    assert Trainer(accelerator="cpu", logger=several(loggers)).loggers == loggers


def test_the_loggers_can_be_replaced(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=[Recorder(tmp_path), CSVLogger(tmp_path)], default_root_dir=tmp_path)
    trainer.logger = CSVLogger(tmp_path / "new")
    assert [type(each) for each in trainer.loggers] == [CSVLogger]
    assert trainer.log_dir == str(tmp_path / "new" / "lightning_logs" / "version_0")
    trainer.logger = None
    assert trainer.loggers == []
    assert trainer.log_dir == str(tmp_path)
    trainer.loggers = [Recorder(tmp_path)]
    assert isinstance(trainer.logger, Recorder)


@pytest.mark.parametrize(("name", "version"), [("train.sh", 1234), ("bash", 0), ("interactive", 0)])
def test_a_slurm_job_that_is_requeued_goes_on_in_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: int
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setenv("SLURM_JOB_NAME", name)
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path)
    assert trainer.logger is not None
    assert trainer.logger.version == version


def test_the_newest_checkpoint_of_a_loggers_runs_is_found(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    settings = {**QUIET, "default_root_dir": tmp_path}
    Trainer(**settings, max_epochs=1, logger=Recorder(tmp_path)).fit(TinyModule(), TinyData())
    resumed = Trainer(**settings, max_epochs=2, logger=Recorder(tmp_path))
    resumed.fit(TinyModule(), TinyData(), ckpt_path="last")
    assert resumed.global_step == 6
    assert next(step for step, _ in resumed.logger.rows) == 3  # type: ignore[union-attr]
